"""Whole runs of a tiny model: files left behind, resuming, stopping, giving up, refusing."""

import dataclasses
import json
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from gpt4moe import checkpoint
from gpt4moe.accounting import chips, flops, pipeline
from gpt4moe.config.check import CallerError
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.infer import trained
from gpt4moe.model import layout, router
from gpt4moe.train import beginning, evaluate, loop, metrics, schedule, state
from tests.train import tiny
from tests.train.kill_campaign import CLOCK_KEYS

# design.md, section 4
STEP_KEYS = {
    "step",
    "tokens",
    "epoch/code",
    "epoch/text",
    "loss",
    "load_balance_loss",
    "router_z_loss",
    "grad_norm",
    "learning_rate",
    "batch_tokens",
    "tokens_per_second",
    "model_flops_utilization",
    "step_seconds",
    "data_wait_fraction",
    "goodput",
    "skipped_steps",
    "moe/load",
    "moe/load_max_over_mean",
    "moe/load_entropy",
    "moe/dropped_fraction",
    "moe/router_entropy",
    "moe/router_largest_logit",
    "moe/expert_grad_norm",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    tiny.write_corpus(directory)
    return directory


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """(run, work directory, result) of an undisturbed run with evaluations at 6 and 12."""
    run = tiny.run_config(corpus, evaluate_every=6)
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return run, workdir, train(run, workdir)


def train(run, workdir, **options):
    return loop.train(run, workdir, config_text="the text", show_progress=False, **options)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_clock(logged):
    return [{key: value for key, value in row.items() if key not in CLOCK_KEYS} for row in logged]


def test_a_run_leaves_its_files_and_a_row_a_step(finished):
    _, workdir, result = finished
    steps = [row for row in rows(workdir) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert all(row.keys() - {"loss/code", "loss/text"} == STEP_KEYS for row in steps)
    assert [row["batch_tokens"] for row in steps] == [128] * 3 + [256] * 3 + [512] * 6
    assert steps[-1]["tokens"] == result.tokens == sum(row["batch_tokens"] for row in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert (workdir / "config.gin").read_text() == "the text"
    assert "packages" in json.loads((workdir / "environment.json").read_text())


def test_evaluations_are_logged_and_choose_the_best_checkpoint(finished):
    _, workdir, result = finished
    logged = [row for row in rows(workdir) if "eval/text/loss" in row]
    assert [row["step"] for row in logged] == [6, 12]
    assert logged[-1]["eval/code/bits_per_byte"] == pytest.approx(result.evaluation.sets["code"].bits_per_byte)
    assert checkpoint.saved_steps(workdir) == [8, 12]


def test_a_finished_run_has_nothing_left_to_do(finished):
    run, workdir, result = finished
    before = without_clock(rows(workdir))
    again = train(run, workdir)
    assert (again.step, again.tokens, again.stopped) == (result.step, result.tokens, False)
    assert [row for row in without_clock(rows(workdir)) if "loss" in row] == [row for row in before if "loss" in row]


def test_a_signal_saves_and_the_same_command_goes_on(finished, tmp_path):
    run, reference, _ = finished

    def interrupt():
        while not ((tmp_path / "metrics.jsonl").exists() and len(rows(tmp_path)) >= 3):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    stopped = train(run, tmp_path)
    watcher.join()
    assert stopped.stopped and 3 <= stopped.step < 12
    assert checkpoint.latest_step(tmp_path) == stopped.step
    train(run, tmp_path)
    assert without_clock(rows(tmp_path)) == without_clock(rows(reference))


def test_another_layout_goes_on_from_the_same_checkpoint(finished, corpus, tmp_path):
    run, reference, _ = finished
    train(tiny.with_train(run, steps=4), tmp_path)
    sharded = dataclasses.replace(
        run, mesh=dataclasses.replace(run.mesh, axes=(("fsdp", 2), ("expert", 2), ("tensor", 2)))
    )
    train(sharded, tmp_path)
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(range(1, 13))
    assert rows(tmp_path)[-1]["tokens"] == rows(reference)[-1]["tokens"]
    resumed, uninterrupted = ([row["loss"] for row in rows(at) if "loss" in row] for at in (tmp_path, reference))
    np.testing.assert_allclose(resumed[4:], uninterrupted[4:], rtol=1e-4)


def test_interleaved_stages_go_on_as_more_uneven_ones_and_are_evaluated(corpus, tmp_path, monkeypatch):
    """Six layers in six chunks on two stages, then on four stages of one and two: losses are those of one device."""
    monkeypatch.setattr(layout, "MOST_UNROLLED", 0)  # a loop compiles faster
    run = tiny.run_config(
        corpus, model=dataclasses.replace(tiny.MODEL, num_layers=6), steps=4, batch_tokens=8 * tiny.LENGTH
    )
    # A rate that does not depend on the length of the run, which is first made shorter.
    steady = dataclasses.replace(run.optimizer.schedule, shape=schedule.constant)
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, schedule=steady))
    first = MeshConfig({"stage": 2, "data": 4}, virtual_stages=3)
    then = MeshConfig({"stage": 4, "data": 2}, stage_layers=(1, 2, 1, 2))
    alone, staged = tmp_path / "alone", tmp_path / "staged"
    want = train(run, alone)
    train(tiny.with_train(dataclasses.replace(run, mesh=first), steps=2), staged)
    run = dataclasses.replace(run, mesh=then)
    got = train(run, staged)
    steps, wanted = ([row for row in rows(workdir) if "loss" in row] for workdir in (staged, alone))
    np.testing.assert_allclose([row["loss"] for row in steps], [row["loss"] for row in wanted], rtol=1e-4)
    equal_stages = float(pipeline.idle_fraction(num_stages=2, num_microbatches=2, virtual_stages=3))
    for row in steps[:2]:
        assert row["pipeline/idle_fraction"] == pytest.approx(row["pipeline/idle_formula"]) == equal_stages
    model = trained.restore(run, staged, mesh=then).model
    again = evaluate.evaluate_trained(model, dataclasses.replace(run, mesh=then.for_generation()), staged, step=4)
    for held_out in (got.evaluation, again):
        assert held_out.mean_loss == pytest.approx(want.evaluation.mean_loss, rel=1e-4)


def test_utilization_is_the_rate_times_the_flops_of_a_token_over_the_peak_of_all_devices(corpus, tmp_path, monkeypatch):
    known = chips.Chip("known", ("cpu",), peak_flops=1e9, memory_bytes=1e9, bandwidth_bytes_per_second=1e9)
    monkeypatch.setattr(chips, "CHIPS", (known,))  # a row of the table: this machine's own peak is measured
    train(tiny.run_config(corpus, mesh=(("fsdp", 2), ("expert", 2), ("tensor", 2)), steps=4), tmp_path)
    ratios = [row["model_flops_utilization"] / row["tokens_per_second"] for row in rows(tmp_path) if "loss" in row]
    np.testing.assert_allclose(ratios, [flops.train_flops_per_token(tiny.MODEL) / 8e9] * 4, rtol=1e-9)
    for row in rows(tmp_path)[:4]:
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(row["batch_tokens"])


def test_utilization_is_measured_against_one_peak_for_the_whole_run(finished):
    _, workdir, _ = finished
    steps = [row for row in rows(workdir) if "loss" in row]
    ratios = [row["model_flops_utilization"] / row["tokens_per_second"] for row in steps]
    np.testing.assert_allclose(ratios, [ratios[0]] * 12, rtol=1e-9)


def test_another_configuration_is_refused_with_the_difference(finished):
    run, workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes(), (workdir / "config.gin").stat().st_mtime_ns
    changed = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, learning_rate=0.5))
    with pytest.raises(CallerError, match=r"optimizer.learning_rate: 0.01 -> 0.5") as error:
        train(changed, workdir)
    assert "\n" not in str(error.value)
    assert before == ((workdir / "metrics.jsonl").read_bytes(), (workdir / "config.gin").stat().st_mtime_ns)
    assert train(changed, workdir, allow_config_change=True).step == 12


def test_a_work_directory_of_another_model_is_refused_even_with_the_flag(finished):
    run, workdir, _ = finished
    wider = dataclasses.replace(run, model=dataclasses.replace(run.model, model_dim=32))
    for allowed in (False, True):
        with pytest.raises(CallerError) as error:
            train(wider, workdir, allow_config_change=allowed)
        assert "model" in str(error.value) and "\n" not in str(error.value)


def test_two_processes_do_not_train_in_one_work_directory(finished):
    run, workdir, _ = finished
    with (
        metrics.MetricsLog(epath.Path(workdir), keep_to_step=12),
        pytest.raises(CallerError, match="another process"),
    ):
        train(run, workdir)


def test_init_from_takes_the_parameters_and_nothing_else(finished, tmp_path):
    run, workdir, _ = finished
    train(tiny.with_train(run, init_from=str(workdir), steps=1), tmp_path)
    started, ended = rows(tmp_path)[0], [row for row in rows(workdir) if "loss" in row][-1]
    assert started["step"] == 1 and started["tokens"] == 128
    assert started["loss"] == pytest.approx(ended["loss"], abs=0.4) and started["loss"] < rows(workdir)[0]["loss"] - 1


def test_init_from_nowhere_is_refused_before_anything_is_written(corpus, tmp_path):
    run = tiny.run_config(corpus, init_from=str(tmp_path / "nothing"))
    with pytest.raises(CallerError, match="no complete checkpoint"):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def broken_router(logits_UE, inputs, config):
    routing = router.top_k(logits_UE, inputs, config)
    return dataclasses.replace(routing, gates_UK=routing.gates_UK * jnp.nan)


def test_too_many_skipped_steps_end_with_a_checkpoint_of_finite_parameters(corpus, tmp_path):
    moe = dataclasses.replace(tiny.MODEL.moe, router=broken_router)
    model = dataclasses.replace(tiny.MODEL, moe=moe)
    run = tiny.run_config(corpus, model=model, max_skipped_steps=3)
    with pytest.raises(loop.SkipLimitError, match="not finite"):
        train(run, tmp_path)
    # The third is seen when the fourth is on its way: a row is written one step late.
    assert [row["skipped_steps"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert rows(tmp_path)[0]["loss"] is None
    abstract = jax.eval_shape(lambda: state.initial_state(run))
    saved = checkpoint.restore(tmp_path, checkpoint.latest_step(tmp_path), abstract)
    for leaf, first in zip(
        jax.tree.leaves(saved.params), jax.tree.leaves(state.initial_state(run).params), strict=True
    ):
        np.testing.assert_allclose(leaf, first, rtol=1e-5)
    assert int(saved.skipped_in_row) == 0


def test_data_that_ends_ends_the_run(corpus, tmp_path):
    run = tiny.run_config(corpus, steps=1000)
    result = train(run, tmp_path)
    assert result.data_ended and not result.stopped
    progress = checkpoint.restore_progress(tmp_path, result.step)
    last = [row for row in rows(tmp_path) if "loss" in row][-1]
    assert (last["epoch/code"], last["epoch/text"]) == (4.0, 2.0)
    assert progress["tokens"] == result.tokens >= sum(progress["data"]["ledger"].values()) > 0.8 * result.tokens


@pytest.mark.parametrize(
    ("change", "sees_later"),
    [({"capacity_factor": 1.0}, True), ({"capacity_factor": None}, False),
     ({"capacity_factor": 1.0, "experts_per_token": 1, "normalize_gates": False}, False),
     ({"capacity_factor": 1.0, "experts_per_token": 1, "normalize_gates": False, "drop_priority": "gate"}, True)],
)  # fmt: skip
def test_a_run_says_where_dropping_is_not_causal(change, sees_later):
    moe = MoeConfig(**{"num_experts": 4, "experts_per_token": 2, "hidden_dim": 8} | change)
    assert (beginning.not_causal(moe) is not None) == sees_later
