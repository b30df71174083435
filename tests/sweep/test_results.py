"""What a sweep's results count in the log of a run."""

import json

import numpy as np
import pytest

from gpt4moe.config.sweep import SweepConfig
from gpt4moe.configure import build_sweep
from gpt4moe.sweep.cells import make_cells
from gpt4moe.sweep.results import _held_out, count_spikes, row_of
from gpt4moe.sweep.worker import run_folder, write_json

SWEEP = """from __gin__ import dynamic_registration
from gpt4moe.config import sweep
include "gin_configs/run/tiny.gin"
sweep.SweepConfig.axes = {"NUM_EXPERTS": [4]}
sweep.SweepConfig.seeds = 2
"""
# Two layers of four experts over three steps; the last tenth of the steps is the last step.
LOADS = [[[0.25] * 4] * 2, [[0.25] * 4] * 2, [[0.7, 0.2, 0.1, 0.0], [0.4, 0.3, 0.2, 0.1]]]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    file = tmp_path_factory.mktemp("gin") / "sweep.gin"
    file.write_text(SWEEP)
    return build_sweep([str(file)])[1]


def logged():
    """A log of every second step: steps 2, 4 and 6, and an evaluation after 7."""
    rows = []
    for step, load in zip((2, 4, 6), LOADS, strict=True):
        row = {"step": step, "tokens": 512 * step, "loss": 7.0 - step, "step_seconds": 0.5, "tokens_per_second": 1024.0}
        row |= {"model_flops_utilization": 0.1 * step, "skipped_steps": step // 4, "moe/load": load}
        row |= {"moe/dropped_fraction": [0.0, 0.1], "moe/router_entropy": [1.0, 1.2], "loss/files": 7.0 - step}
        rows.append(row | {"moe/router_largest_logit": [0.5, None]})
    earlier = {"eval/files/loss": 9.0, "eval/files/tokens": 100, "eval/files/bits_per_byte": 4.0}
    newest = {"eval/files/loss": 3.0, "eval/files/tokens": 100, "eval/files/bits_per_byte": 2.0}
    return [rows[0], {"step": 2, "tokens": 1024} | earlier, *rows[1:], {"step": 7, "tokens": 3584} | newest]


def leave(folder, cell, state, lines):
    work = run_folder(folder, cell.id)
    work.mkdir(parents=True)
    write_json(work / "cell.json", {"state": state, "reason": None, "attempts": 1, "seconds": 9.0})
    (work / "metrics.jsonl").write_text("\n".join(lines))


def test_a_row_holds_what_the_run_is_and_measured(build, tmp_path):
    cell = make_cells(SweepConfig(axes={"NUM_EXPERTS": [4]}), build)[0]
    sources = [source.name for source in build(cell.overrides)[0].data.sources]
    lines = [json.dumps(row).replace("/files", f"/{sources[0]}") for row in logged()]
    leave(tmp_path, cell, "done", lines)
    row = row_of(tmp_path, cell, build)
    assert (row["NUM_EXPERTS"], row["seed"], row["state"]) == (4, 0, "done")
    assert (row["steps"], row["tokens"], row["skipped_steps"]) == (7, 3584, 1)
    assert (row["loss"], row["train_seconds"], row["tokens_per_second"]) == (1.0, 3.0, 1024.0)
    assert row["held_out_loss"] == 3.0 and row["model_flops_utilization"] == pytest.approx(0.4)
    assert row["load_max_over_mean_by_layer"] == pytest.approx([2.8, 1.6])
    assert (row["load_max_over_mean"], row["dead_experts"]) == (pytest.approx(2.2), 1 / 8)
    assert (row["dropped_fraction"], row["router_entropy"]) == (pytest.approx(0.05), pytest.approx(1.1))
    assert row["router_largest_logit"] is None
    model = build(cell.overrides)[0].model
    assert row["sparsity"] == 1 - model.moe.experts_per_token / 4
    assert row["active_parameters"] < row["total_parameters"]
    embeddings = model.vocab_size * model.model_dim * (1 if model.tie_embeddings else 2)
    assert row["total_parameters"] - row["non_embedding_parameters"] == embeddings


def test_sources_count_by_their_tokens_and_untrained_ones_not_at_all(build, tmp_path):
    found = build(("NUM_EXPERTS=4",))[0].data.sources
    cell = make_cells(SweepConfig(axes={"NUM_EXPERTS": [4]}), build)[0]
    (name,) = [source.name for source in found]
    rows = logged()
    rows[-1] = {"step": 7, "tokens": 3584}
    for source, loss, tokens in ((name, 3.0, 300), ("unseen", 9.0, 500)):
        rows[-1] |= {f"eval/{source}/loss": loss, f"eval/{source}/tokens": tokens}
    leave(tmp_path, cell, "done", map(json.dumps, rows))
    row = row_of(tmp_path, cell, build)
    assert (row["held_out_loss"], row["eval/unseen/loss"]) == (3.0, 9.0)


def test_trained_sources_weigh_as_much_as_they_have_tokens():
    at = {"eval/a/loss": 3.0, "eval/a/tokens": 300, "eval/b/loss": 6.0, "eval/b/tokens": 600}
    assert _held_out([{"eval/a/loss": 9.0}, at], ["a", "b"])["held_out_loss"] == 5.0
    assert _held_out([at | {"eval/b/loss": None}], ["a", "b"])["held_out_loss"] is None


def test_a_run_that_is_not_done_has_no_loss_and_a_cut_line_is_passed_over(build, tmp_path):
    first, second = make_cells(SweepConfig(axes={"NUM_EXPERTS": [4]}, seeds=2), build)
    lines = list(map(json.dumps, logged()))
    leave(tmp_path, first, "failed", [*lines, lines[0][:40]])
    leave(tmp_path, second, "done", lines[:1])
    failed, cut = row_of(tmp_path, first, build), row_of(tmp_path, second, build)
    assert (failed["steps"], failed["skipped_steps"]) == (7, 1)
    assert "loss" not in failed and "held_out_loss" not in failed and not any("eval/" in name for name in failed)
    assert cut["steps"] == 2 and cut["loss"] == 5.0


@pytest.fixture
def falling():
    noise = np.random.default_rng(0).standard_normal(1600)
    return 3 + 4 * np.exp(-np.arange(1600) / 100) + 0.05 * noise


def test_a_loss_that_only_falls_has_no_spike(falling):
    assert count_spikes(falling.tolist()) == 0
    assert count_spikes([]) == count_spikes([3.0]) == 0


def test_neighbours_are_one_spike_and_small_jumps_none(falling):
    falling[800:804] += 1.0  # four steps of one spike
    falling[1200] += 0.8
    falling[1400] += 0.1  # two deviations
    assert count_spikes(falling.tolist()) == 2


def test_steps_without_a_loss_are_passed_over(falling):
    losses = falling.tolist()
    losses[500:520] = [None] * 20
    losses[520] += 1.0
    assert count_spikes(losses) == 1
