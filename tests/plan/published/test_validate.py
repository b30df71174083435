"""`gpt4moe plan validate`: the scores by hand, the bars on published runs, rows of others, what it refuses."""

import json

import pytest

from gpt4moe.launch import main
from gpt4moe.plan.published import scores, validate
from gpt4moe.plan.published.measurements import PUBLISHED_RUNS
from tests.plan.published.test_measurements import write


def test_scores_by_hand():
    assert scores.mape([0.1, -0.3]) == pytest.approx(0.2)
    assert scores.bias([0.1, -0.3]) == pytest.approx(-0.1)
    assert scores.spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert scores.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert scores.spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(0.9487, abs=1e-4)  # ties share their rank
    assert scores.spearman([1, 2], [1, 2]) is None and scores.spearman([1, 1, 1], [1, 2, 3]) is None
    assert scores.mape([]) is None


def test_regret_by_hand():
    """The model picks b, which takes 12 where c takes 10."""
    assert scores.regret({"a": 3, "b": 1, "c": 2}, {"a": 20, "b": 12, "c": 10}) == pytest.approx(0.2)
    assert scores.regret({"a": 3, "b": 2, "c": 1}, {"a": 20, "b": 12, "c": 10}) == 0


def test_left_out_errors_by_hand():
    """Times predicted twice and four times too long: the other's scalar leaves 0.5 and 2 of the truth."""
    assert scores.left_out_errors([1.0, 3.0], ["a", "b"]) == pytest.approx([-0.5, 1.0])
    assert scores.best_scale([1.0, 3.0]) == pytest.approx(1 / 8**0.5)
    assert scores.left_out_errors([1.0, 1.0], ["a", "a"]) == [None, None]  # one measurement told twice


@pytest.fixture(scope="module")
def document():
    return validate.examine(PUBLISHED_RUNS)


def test_bars_of_dense_training(document):
    sources = document["sources"]
    assert sources["megatron-sc21"]["rows"] == 22 and sources["korthikanti"]["rows"] == 12
    for name, bar in (
        ("megatron-sc21", 0.06),
        ("korthikanti", 0.06),
        ("megascale-megatronlm", 0.13),
        ("megascale", 0.13),
    ):
        assert sources[name]["mape"] <= bar, name


def test_one_scalar_a_stack(document):
    told = {name: found["calibrated_mape"] for name, found in document["stacks"].items()}
    assert sum(error is not None for error in told.values()) >= 12
    assert {name: error for name, error in told.items() if error is not None and error > 0.08} == {}


def test_serving(document):
    """Pope et al.: the longest contexts within 2 %, latencies within 15 %."""
    pope = {name: found["mape"] for name, found in document["serving"].items() if name.startswith("pope-")}
    assert pope["pope-max_context/tpu_v4"] < 0.02 and pope["pope-latency/tpu_v4"] < 0.15
    rows = {row["name"]: row for row in document["rows"]}
    assert sum(name.startswith(("pope-", "kipply-", "deepseek-v3-serving")) for name in rows) == 20
    rate = rows["deepseek-v3-serving-decode"]  # tokens a second: too many of them is too short a time
    assert (rate["predicted"] > rate["measured"]) == (rate["error"] < 0)


def test_the_layout_that_it_would_pick(document):
    groups = document["regret_groups"]
    assert len(groups) >= 10
    assert max(group["regret"] for group in groups) < 0.05
    assert all({group["picked"], group["best"]} <= set(group["rows"]) for group in groups)


def test_bars_of_experts(document):
    names = ("deepseek-v3-", "mixtral-", "skywork-", "maxtext-moe-708B", "maxtext-moe-754B", "maxtext-mixtral")
    rows = [row for row in document["rows"] if row["name"].startswith(names) and "serving" not in row["name"]]
    assert len(rows) == 13
    for row in rows:
        assert abs(row["error"]) <= 0.25, row["name"]
        if row["calibrated_error"] is not None:
            assert abs(row["calibrated_error"]) <= 0.15, row["name"]
    left_out = [abs(row["calibrated_error"]) for row in rows if row["calibrated_error"] is not None]
    assert sum(left_out) / len(left_out) <= 0.10


def test_rows_say_what_was_compared(document):
    row = next(row for row in document["rows"] if row["name"] == "korthikanti-175B-full")
    assert row["predicted"] == pytest.approx(row["predicted_seconds"])
    assert row["error"] == pytest.approx(row["predicted"] / 18.13 - 1)
    rate = next(row for row in document["rows"] if row["metric"] == "mfu")
    assert rate["predicted"] / rate["measured"] == pytest.approx(1 / (1 + rate["error"]))
    names = [row["name"] for row in document["rows"]] + [row["name"] for row in document["skipped"]]
    assert len(names) == len(set(names)) == 149
    assert document["overall"]["rows"] == len(document["rows"])


def test_rows_of_others(tmp_path, capsys):
    """Layouts of one model, of a source that is not known, and memory; the document is JSON."""
    rows = [
        {"name": "bloom-a", "tp": 4, "dp": 16, "value": 12},
        {"name": "bloom-b", "tp": 8, "dp": 8, "value": 10},
        {"name": "bloom-c", "measured_metric": "memory_gb", "unit": "GB", "value": 30},
        {"name": "other-a", "measured_metric": "loss", "value": 2},
        {"name": "other-b", "params_active": "2e9"},
        {"name": "other-c", "measured_metric": "gpu_hours"},
    ]
    path = write(tmp_path / "rows.csv", *rows)
    assert main(["plan", "validate", "--csv", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["sources"]) == {"bloom", "bloom-memory"}
    (group,) = document["regret_groups"]
    assert group["rows"] == ["bloom-a", "bloom-b"] and group["best"] == "bloom-b"
    assert group["regret"] == pytest.approx(0 if group["picked"] == "bloom-b" else 0.2)
    assert [item["name"] for item in document["skipped"]] == ["other-a", "other-b", "other-c"]
    assert all(item["reason"] for item in document["skipped"])
    for scored in (*document["sources"].values(), document["overall"]):
        assert {"mape", "bias", "spearman", "regret"} <= set(scored)
    assert main(["plan", "validate", "--csv", str(path)]) == 0
    text = capsys.readouterr().out
    assert "bloom-memory" in text and "skipped 1" in text


def test_a_bad_file_is_one_line(tmp_path, capsys):
    path = write(tmp_path / "rows.csv", {"gpus": "-1"})
    assert main(["plan", "validate", "--csv", str(path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].endswith("line 2, column gpus: '-1' must be a whole number above 0")
    assert main(["plan", "validate", "--csv", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err


def test_rows_of_a_stack_are_scored_by_the_others(tmp_path):
    """Two jobs of one stack: each with the scalar of the other. A job told twice does not fit its twin."""
    one, two = {"name": "some-1"}, {"name": "some-2", "layers": 20, "params_total": "6.5e9", "params_active": "6.5e9"}
    rows = validate.examine(write(tmp_path / "a.csv", one, two))["rows"]
    ratios = [1 + row["error"] for row in rows]
    assert rows[0]["calibrated_error"] == pytest.approx(ratios[0] / ratios[1] - 1)
    assert rows[1]["calibrated_error"] == pytest.approx(ratios[1] / ratios[0] - 1)
    twin = one | {"name": "some-3", "value": 11}
    again = validate.examine(write(tmp_path / "b.csv", one, two, twin))["rows"]
    assert again[0]["calibrated_error"] == pytest.approx(rows[0]["calibrated_error"])


def test_the_scalar_of_a_stack(tmp_path):
    rows = validate.examine(write(tmp_path / "a.csv", {"name": "some-1"}))["rows"]
    slow = {"name": "some-1", "value": 1.25 * rows[0]["predicted_seconds"]}
    (stack,) = validate.examine(write(tmp_path / "b.csv", slow))["stacks"].values()
    assert stack["seconds_scale"] == pytest.approx(1.25)


def test_regret_of_each_source_is_its_largest(tmp_path):
    """Tokens a second of two layouts, the faster one told slower: regret by token, of its own source alone."""
    pairs = []
    for model, penalty in (("bloom-a", 1.0), ("bloom-b", 1.5), ("nobody", 1.0)):
        fast = {"name": f"{model}-1", "tp": 8, "dp": 8, "value": 10 * penalty}
        slow = {"name": f"{model}-2", "tp": 1, "dp": 64, "value": 10}
        seq = {"bloom-a": 2048, "bloom-b": 1024, "nobody": 2048}[model]
        pairs += [fast | {"seq": seq}, slow | {"seq": seq, "value": 10 if penalty > 1 else 20}]
    document = validate.examine(write(tmp_path / "rows.csv", *pairs))
    regrets = [group["regret"] for group in document["regret_groups"]]
    assert len(regrets) == 3 and max(regrets) > 0.3
    of_bloom = [group["regret"] for group in document["regret_groups"] if group["rows"][0].startswith("bloom")]
    assert document["sources"]["bloom"]["regret"] == max(of_bloom)
    assert document["sources"]["nobody"]["regret"] == regrets[2]
    alone = validate.examine(write(tmp_path / "one.csv", *pairs[:2], {"name": "other-1"}))
    assert alone["sources"]["other"]["regret"] is None


def test_utilisation_is_what_is_ranked(document):
    """FLOP/s of a chip, of one kind of chip: the order of utilisation; that of times would be by size."""
    rows = [row for row in document["rows"] if row["source"] == "megatron-sc21"]
    assert document["moe"]["rows"] == 18 and {row["unit"] for row in rows} == {"TFLOP/s"}
    predicted, measured = ([row[name] for row in rows] for name in ("predicted", "measured"))
    by_rate = scores.spearman(predicted, measured)
    by_time = scores.spearman(*([row[f"{name}_seconds"] for row in rows] for name in ("predicted", "measured")))
    found = document["sources"]["megatron-sc21"]["spearman"]
    assert found == pytest.approx(by_rate, abs=0.02) and abs(found - by_time) > 0.02


def test_layouts_that_ran_and_are_told_not_to_fit_are_named(document):
    named = [row["name"] for row in document["rows"] if row.get("fits") is False]
    assert 0 < len(named) < 16
    assert f"predicted not to fit though they ran, {len(named)}: {named[0]}, " in validate.format_document(document)
