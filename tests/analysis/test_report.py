"""The report of a run: what it shows, from records in the format of `metrics.jsonl`."""

import html.parser
import json
import math
import re

import numpy as np
import pytest

from gpt4moe.analysis.canvas import MAX_LAYERS, MAX_POINTS, log_ratio, shown_layers, smooth, thin
from gpt4moe.analysis.history import Series, read_history
from gpt4moe.analysis.report import write_report

LAYERS, EXPERTS = 3, 4
HELD_OUT_KEYS = ("loss", "bits_per_byte", "unigram_loss", "unigram_bits_per_byte", "tokens")


def logged_row(step):
    """One line of metrics.jsonl, all keys of the contract, a function of the step alone."""
    skew = np.array(
        [[1 + 0.5 * math.sin(layer + expert + step / 40) for expert in range(EXPERTS)] for layer in range(3)]
    )
    load = skew / skew.sum(1, keepdims=True)
    loss = 3 + 5 * math.exp(-step / 60) + 0.1 * math.sin(step)
    row = {"step": step, "tokens": step * 4096, "loss": loss, "loss/code": loss - 0.3, "loss/text": loss + 0.4}
    row |= {"epoch/code": step / 100, "epoch/text": step / 200, "load_balance_loss": 1.1, "router_z_loss": 0.2}
    row |= {"grad_norm": 1 + 3 / step, "learning_rate": 1e-3 * min(step / 20, 1), "batch_tokens": 4096}
    row |= {"tokens_per_second": 12_345.0, "model_flops_utilization": 0.31, "step_seconds": 0.33, "goodput": 0.97}
    row |= {"moe/load": load.tolist(), "moe/load_max_over_mean": float(load.max() * EXPERTS)}
    row |= {"moe/load_entropy": [0.9, 0.8, 0.7], "moe/dropped_fraction": [0.0023, 0.0123, 0.0223], "skipped_steps": 0}
    row |= {"moe/router_entropy": [1.2, 1.1, 1.0], "moe/router_largest_logit": [2.0, 3.0, 4.0 + step / 50]}
    row |= {"moe/expert_grad_norm": (load * 3).tolist()}
    if step % 50 == 0:
        row |= {f"eval/{source}/{key}": loss for source in ("code", "text") for key in HELD_OUT_KEYS}
    return row


EXPERT_CHARTS = ("Expert load", "Gradient norm per expert", "Load balance", "Auxiliary losses", "Load entropy")
EXPERT_CHARTS += ("Router entropy", "Router logits", "Dropped assignments", "Dead experts")
EVALUATION = {
    "step": 200,
    "sets": {
        "code": {
            "loss": 2.51,
            "bits_per_byte": 1.62,
            "tokens": 9000,
            "unigram_loss": 7.25,
            "unigram_bits_per_byte": 4.6,
        },
        "text": {
            "loss": 3.21,
            "bits_per_byte": 2.02,
            "tokens": 8000,
            "unigram_loss": 7.5,
            "unigram_bits_per_byte": 4.9,
        },
    },
}
SAMPLES = [{"prompt": "def f(", "text": "x):\n    return <b>x</b> & 1"}, {"prompt": "The", "text": " end."}]


@pytest.fixture
def workdir(tmp_path):
    lines = [json.dumps(logged_row(step)) for step in range(1, 201)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    (tmp_path / "samples.json").write_text(json.dumps(SAMPLES))
    (tmp_path / "config.gin").write_text("NUM_LAYERS = 3\n# a <tag> & more\n")
    (tmp_path / "environment.json").write_text(json.dumps({"jax": "0.10.2"}))
    return tmp_path


class Page(html.parser.HTMLParser):
    """Text and structure of a page; counts tags left open."""

    VOID = ("meta", "link", "br", "path", "use")

    def __init__(self, source):
        super().__init__()
        self.text, self.tags, self.depth = "", [], 0
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.depth += tag not in ("meta", "link", "br")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        self.depth -= 1

    def handle_data(self, data):
        self.text += data


def test_report_shows_the_run_and_stands_alone(workdir):
    path = write_report(workdir)
    source = path.read_text()
    page = Page(source)
    assert page.depth == 0
    assert page.tags.count("svg") == 5 + 9
    for title in EXPERT_CHARTS:
        assert title in page.text, title
    assert "gpt4moe report adds what held-out text shows" in page.text
    assert len(source) < 2_000_000
    for shown in ("819,200", "12,345", "31.0%", "2.510", "7.250", "1.620", "4.600", "9,000", "1.23%", "NUM_LAYERS = 3"):
        assert shown in page.text, shown
    # Escaped, so that what a model writes is shown and never run.
    assert "<b>x</b> & 1" in page.text and "<b>x</b>" not in source
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*\"", source)
    assert "script" not in page.tags
    assert "#010203" not in source and "currentColor" in source


def test_report_shows_how_images_are_read_where_they_are(workdir):
    plain = write_report(workdir).read_text()
    assert "read exactly" not in plain and "loss without images" not in plain
    evaluation = json.loads(json.dumps(EVALUATION))
    rates = {"character_error_rate": 0.031, "exact_match": 0.912, "examples": [["12", "13"]], "documents": 9}
    rates |= {"character_error_rate_without_image": 8.54, "exact_match_without_image": 0.0}
    evaluation["sets"]["text"] |= {"loss_without_image": 7.063, "read": rates}
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    page = write_report(workdir).read_text()
    table = page[page.index("<h2>Held-out text") :]
    table = table[: table.index("</table>")]
    code, text = ([cell for cell in re.findall("<td>(.*?)</td>", row)] for row in table.split("<tr>")[2:])
    assert table.count("<th>") == len(code) == len(text) == 11
    assert text[6:] == ["7.063", "3.1%", "91.2%", "854.0%", "0.0%"] and code[6:] == [""] * 5
    rates["character_error_rate_spelled"] = 0.021
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    page = write_report(workdir).read_text()
    assert "by the encoder alone" in page and page.count("<td>2.1%</td>") == 1


def test_report_of_a_run_without_its_last_files(workdir):
    for name in ("evaluation.json", "samples.json", "config.gin", "environment.json"):
        (workdir / name).unlink()
    page = Page(write_report(workdir).read_text())
    assert "819,200" in page.text and "Samples" not in page.text
    assert "Held-out" not in page.text


def test_report_before_the_first_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No step has been logged yet" in write_report(tmp_path).read_text()


def test_directory_without_a_run_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"^workdir='.*' has no metrics\.jsonl; give"):
        write_report(tmp_path)


def test_torn_last_line_is_passed_over_and_a_broken_one_before_it_refused(workdir):
    log = workdir / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 201, "tok')
    assert read_history(workdir).last("step") == 200
    log.write_text('{"step": \n' + whole)
    with pytest.raises(ValueError, match="line 1 of"):
        read_history(workdir)


def test_history_gives_series_over_tokens(workdir):
    history = read_history(workdir)
    held_out = history.series("eval/code/loss")
    assert held_out.tokens.tolist() == [4096 * step for step in (50, 100, 150, 200)]
    assert history.series("moe/load").values.shape == (200, LAYERS, EXPERTS)
    assert history.names(r"loss/(.+)") == ("code", "text")
    assert history.series("absent").values.shape == (0,) and history.last("absent") is None
    np.testing.assert_allclose(history.total("step_seconds"), 66.0)


def test_a_skipped_step_without_a_loss_leaves_a_gap(workdir):
    log = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows[5]["loss/code"], rows[6]["loss/code"] = None, float("nan")
    log.write_text("\n".join(json.dumps(row) for row in rows))
    assert np.flatnonzero(np.isnan(read_history(workdir).series("loss/code").values)).tolist() == [5, 6]
    assert write_report(workdir).exists()


def test_a_run_in_which_nothing_was_finite_has_a_report_all_the_same(workdir):
    def nulls(value):
        return [nulls(item) for item in value] if isinstance(value, list) else None

    rows = [logged_row(step) for step in range(1, 4)]
    rows = [{k: v if k in ("step", "tokens") else nulls(v) for k, v in row.items()} for row in rows]
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (workdir / "evaluation.json").write_text(json.dumps({"step": 3, "sets": {"code": dict.fromkeys(HELD_OUT_KEYS)}}))
    page = Page(write_report(workdir).read_text())
    assert "12,288" in page.text and page.tags.count("svg") == 5 + 9


def test_of_many_layers_some_are_shown_first_and_last_among_them():
    assert shown_layers(3) == [0, 1, 2]
    assert len(shown_layers(96)) == MAX_LAYERS
    assert {0, 95} <= set(shown_layers(96))


def test_ratios_are_cut_at_a_factor_of_four_and_gaps_stay():
    np.testing.assert_allclose(log_ratio(np.array([0, 0.5, 1, 4, 9, np.nan])), [-2, -1, 0, 2, 2, np.nan])


def test_a_log_of_before_there_were_gradients_of_experts_has_a_report(workdir):
    log = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        del row["moe/expert_grad_norm"], row["moe/router_largest_logit"]
    log.write_text("\n".join(map(json.dumps, rows)))
    assert Page(write_report(workdir).read_text()).tags.count("svg") == 5 + 7


def test_a_run_that_reads_images_has_a_chart_of_its_gates(workdir):
    log = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        row |= {"vision/attention_gate": [0.1, -row["step"] / 200], "vision/feed_forward_gate": [0.2, 0.3]}
    log.write_text("\n".join(map(json.dumps, rows)))
    source = write_report(workdir).read_text()
    page = Page(source)
    assert page.tags.count("svg") == 5 + 9 + 2
    for title in ("Gates of cross-attention", "Gates of its feed-forward"):
        drawn = source[source.index(title) :]
        drawn = drawn[: drawn.index("</svg>")]
        assert "block 0" in drawn and "block 1" in drawn and "block 2" not in drawn


def test_thinning_keeps_the_mean_and_the_last_token():
    values = np.random.default_rng(0).normal(size=(5 * MAX_POINTS, 2, 3))
    thinned = thin(Series(np.arange(5.0 * MAX_POINTS), values))
    assert thinned.values.shape == (MAX_POINTS, 2, 3)
    np.testing.assert_allclose(thinned.values.mean(0), values.mean(0), atol=1e-12)
    np.testing.assert_allclose(thinned.values[3], values[15:20].mean(0), atol=1e-12)
    assert thinned.tokens[-1] == 5 * MAX_POINTS - 1


def test_smoothing_equals_a_slow_loop_and_steps_over_gaps():
    values = np.random.default_rng(1).normal(size=301)
    values[[40, 41, 200]] = np.nan
    reach = 4  # 3 % of 301 points, half to each side
    expected = [np.nanmean(values[max(place - reach, 0) : place + reach + 1]) for place in range(301)]
    np.testing.assert_allclose(smooth(values), expected, atol=1e-12)
