"""A found layout as a run file: the trainer builds it, reads the same layout back from it, and trains in it."""

import json

import pytest

from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.shape import shape_of
from gpt4moe.config.check import CallerError
from gpt4moe.configure import build_run
from gpt4moe.launch import main
from gpt4moe.plan.published import own_runs
from gpt4moe.plan.search import gin_export
from gpt4moe.plan.search.layouts import SPACES, Job
from gpt4moe.plan.search.ranking import cost_one, search
from gpt4moe.plan.training import memory

TINY = ("gin_configs/run/tiny.gin",)
OVERRIDES = ("NUM_LAYERS=4", "BATCH_TOKENS=2048", "SEQUENCE_LENGTH=64", "TRAIN_STEPS=2", "CHECKPOINT_EVERY=2")


def found_for(run, num_chips, chip="h100", ramp=()):
    length = run.data.sequence_length
    rows = [batch // length for _, batch in run.train.ramp]
    numerics = memory.NUMERICS["float32_adam"]
    job = Job(
        shape_of(run.model), chip_named(chip), num_chips, rows[-1], length, own_runs.STACK, numerics,
        ramp_rows=tuple(rows[:-1]),
    )  # fmt: skip
    return search(job, SPACES["ours"])


def built(path, text):
    path.write_text(text)
    return build_run([str(path)])[0]


@pytest.mark.parametrize(
    ("gin_file", "overrides", "chip", "num_chips"),
    [
        ("gin_configs/run/tiny.gin", OVERRIDES, "h100", 8),
        ("gin_configs/run/tiny.gin", ("NUM_LAYERS=4", "BATCH_TOKENS=8192"), "a100_40", 32),
        ("gin_configs/run/medium.gin", ("DATA_PATHS=['books']",), "a100_80", 16),
        ("gin_configs/run/gpt4_1p8t_v5p.gin", (), "tpu_v5p", 1024),
    ],
    ids=["tiny_8", "tiny_32", "medium_ramp", "reference"],
)
def test_every_exported_file_builds_as_applied(tmp_path, gin_file, overrides, chip, num_chips):
    """The best of each family and some others; what is read back from the run is the layout that was found."""
    run, _ = build_run([gin_file], overrides)
    found = found_for(run, num_chips, chip)
    chosen = {item.layout: item for item in (*found.ranked[:: len(found.ranked) // 12 + 1], *found.families.values())}
    assert len(chosen) > 5
    for number, item in enumerate(chosen.values()):
        new = built(tmp_path / f"{number}.gin", gin_export.export_text(item, run, 7, (gin_file,), overrides))
        assert new.train.checkpoint_every == 7
        expected = gin_export.applied(run, item)
        assert (new.mesh, new.model, new.data, new.optimizer) == (
            expected.mesh, expected.model, expected.data, expected.optimizer,
        )  # fmt: skip
        assert new.train.ramp == expected.train.ramp and new.train.microbatch_rows == expected.train.microbatch_rows
        assert gin_export.layout_of(new, num_chips) == item.layout


def test_the_reference_read_and_written_again():
    run, _ = build_run(["gin_configs/run/gpt4_1p8t_v6e.gin"])
    layout = gin_export.layout_of(run, 3840)
    assert (layout.tensor, layout.stage, layout.virtual_stages, layout.expert, layout.data) == (8, 15, 4, 16, 32)
    assert (layout.zero, layout.zero_group, layout.microbatch_rows, layout.passes) == (3, 2, 1, 4)
    job = Job(shape_of(run.model), chip_named("tpu_v6e"), 3840, 2048, 8192, own_runs.STACK, memory.MIXED_ADAM)
    again = gin_export.applied(run, cost_one(job, layout, 2048))
    assert again == run


def test_axes_beyond_the_fast_links():
    h100, v6e = chip_named("h100"), chip_named("tpu_v6e")
    sizes = {"data": 26, "fsdp": 1, "stage": 15, "expert": 8, "context": 1, "tensor": 8}
    assert gin_export.slow_degrees(h100, sizes) == {"data": 26, "stage": 15, "expert": 8}
    assert gin_export.slow_degrees(h100, sizes | {"tensor": 4}) == {"data": 26, "stage": 15, "expert": 4}
    assert gin_export.slow_degrees(h100, dict.fromkeys(sizes, 1) | {"fsdp": 4}) == {}
    assert gin_export.slow_degrees(v6e, sizes | {"data": 1, "fsdp": 2, "expert": 16}) == {"stage": 15}


@pytest.mark.parametrize("family", ["stage + expert + FSDP"])
def test_an_exported_file_trains(tmp_path, family, capsys):
    run, _ = build_run(TINY, OVERRIDES)
    item = found_for(run, 8).families[family]
    path = tmp_path / "planned.gin"
    path.write_text(gin_export.export_text(item, run, 2, TINY, OVERRIDES))
    assert main(["train", f"--gin_file={path}", f"--workdir={tmp_path / 'run'}", "--json"]) == 0
    capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "batch_tokens" in row]  # not those of evaluation
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["batch_tokens"] == 2048 and 0 < row["loss"] < 20 for row in rows)
    assert len(json.loads((tmp_path / "run/environment.json").read_text())["devices"]) == 8


def test_an_override_that_names_what_no_file_imports():
    run, _ = build_run(TINY, OVERRIDES)
    item = found_for(run, 8).ranked[0]
    with pytest.raises(
        CallerError, match=r"--gin\.mine\.thing\.width=3 names 'mine', which an exported file does not import"
    ):
        gin_export.export_text(item, run, 2, TINY, ("mine.thing.width=3",))


def test_overrides_of_fields_are_kept(tmp_path):
    overrides = (*OVERRIDES, "optimizer.OptimizerConfig.b2=0.9", "moe.MoeConfig.router=@routers.sigmoid_top_k")
    run, _ = build_run(TINY, overrides)
    item = found_for(run, 8).ranked[0]
    new = built(tmp_path / "kept.gin", gin_export.export_text(item, run, 2, TINY, overrides))
    assert new.optimizer.b2 == 0.9 and new.model.moe.router.__name__ == "sigmoid_top_k"


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_what_is_computed_again_is_read_back(remat):
    run, _ = build_run([*TINY], (*OVERRIDES, f"config.model.ModelConfig.remat='{remat}'"))
    layout = gin_export.layout_of(run, 1)
    job = Job(shape_of(run.model), chip_named("h100"), 1, 32, 64, own_runs.STACK, memory.NUMERICS["float32_adam"])
    item = cost_one(job, layout, 32)
    assert gin_export.applied(run, item).model.remat == remat
    assert layout.remat == {"none": "selective"}.get(remat, remat)
