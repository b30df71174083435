"""The files a run writes about itself."""

import dataclasses
import itertools
import json
import math
import time
import types

import jax
import numpy as np
import pytest
from etils import epath

from gpt4moe.model.moe import MoeOut
from gpt4moe.train import clock, metrics
from gpt4moe.train.loss import LossNormalizers, LossOut
from gpt4moe.train.recorder import StepFacts, step_row
from gpt4moe.train.step import StepMetrics


def lines(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_readable_at_once_and_events_lie_beside_them(tmp_path):
    with metrics.MetricsLog(epath.Path(tmp_path), keep_to_step=0) as log:
        log.write({"step": 1, "loss": 2.5, "moe/load": [[0.5, 0.5]]})
        assert lines(tmp_path) == [{"step": 1, "loss": 2.5, "moe/load": [[0.5, 0.5]]}]
    assert list((tmp_path / "events").glob("events.out.tfevents*"))


def test_rows_beyond_the_restored_step_and_a_half_line_are_dropped(tmp_path):
    rows = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 4, "lo')
    with metrics.MetricsLog(epath.Path(tmp_path), keep_to_step=2) as log:
        assert [row["step"] for row in lines(tmp_path)] == [1, 2, 2]
        log.write({"step": 3})
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 2, 3]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with metrics.MetricsLog(epath.Path(tmp_path), keep_to_step=0) as log:
        log.write({"step": 1, "loss": math.nan, "moe/load": [[math.inf, 1.0]]})
    assert lines(tmp_path) == [{"step": 1, "loss": None, "moe/load": [[None, 1.0]]}]


def test_environment_is_json_and_names_versions_and_devices():
    document = json.loads(json.dumps(metrics.environment()))
    assert {"jax", "flax", "orbax-checkpoint"} <= document["packages"].keys()
    assert document["devices"] == ["cpu"] * 8


def test_a_row_by_hand():
    """Two layers, two experts, one source of two in the batch: 10 targets of weight 1 in 5 rows, 12 real tokens."""
    moe = MoeOut(
        load_E=np.array([[18, 6], [12, 12]]),
        dropped=np.array([6, 0]),
        load_balance=np.array([10.0, 5.0]),
        probability_E=np.array([[7.0, 5.0], [6.0, 6.0]]),
        router_z=np.array([24.0, 48.0]),
        router_entropy=np.array([6.0, 12.0]),
        largest_logit=np.array([18.0, 3.0]),
    )
    sums = LossOut(np.float32(30), np.array([30.0, 0.0]), np.array([10.0, 0.0]), np.array([2.0, 1.0]), moe)
    counts = LossNormalizers(np.float32(10), np.float32(12), np.float32(5))
    values = StepMetrics(sums, counts, np.float32(0.5), np.eye(2), np.float32(0.25), np.int32(1), np.int32(0))
    facts, names = StepFacts(7, 700, 100, {"code": 0.5, "text": 0.0}), ["code", "text"]
    spelled = dataclasses.replace(values, sums=dataclasses.replace(sums, spelling=np.float32(25)))
    row = step_row(values, facts, names)
    assert step_row(spelled, facts, names) == row | {"spelling_loss": 2.5}
    assert row == {
        "step": 7,
        "tokens": 700,
        "epoch/code": 0.5,
        "epoch/text": 0.0,
        "loss": 3.0,
        "loss/code": 3.0,
        "load_balance_loss": 1.5,
        "router_z_loss": 3.0,
        "grad_norm": 0.5,
        "learning_rate": 0.25,
        "batch_tokens": 100,
        "skipped_steps": 1,
        "moe/load": [[0.75, 0.25], [0.5, 0.5]],
        "moe/load_max_over_mean": [1.5, 1.0],
        "moe/load_entropy": row["moe/load_entropy"],
        "moe/dropped_fraction": [0.25, 0.0],
        "moe/router_entropy": [0.5, 1.0],
        "moe/router_largest_logit": [1.5, 0.25],
        "moe/expert_grad_norm": [[1.0, 0.0], [0.0, 1.0]],
    }
    np.testing.assert_allclose(row["moe/load_entropy"], [0.8112781, 1.0], rtol=1e-6)


def test_goodput_counts_only_steps():
    watch = clock.StepClock()
    watch.resume()
    assert 0 <= watch.goodput() <= 1
    seconds = sum(watch.lap() for _ in range(3))
    assert 0 < watch.goodput() <= 1 and seconds > 0
    before = watch.goodput()
    watch.resume()
    assert watch.goodput() <= before


def test_drawing_is_waiting_only_where_the_device_has_nothing_left_to_do(monkeypatch):
    """A look at the clock takes a second, so that a draw takes one of the three of a lap."""
    watch = clock.StepClock()
    monkeypatch.setattr(time, "monotonic", itertools.count().__next__)
    watch.resume()
    for is_idle, fraction in ((True, 1 / 3), (False, 0.0), (True, 1 / 3)):
        with watch.drawing(lambda is_idle=is_idle: is_idle):
            pass
        watch.lap()
        assert watch.data_wait_fraction == pytest.approx(fraction)
    with watch.drawing(lambda: True):
        pass
    watch.resume()
    watch.lap()
    assert watch.data_wait_fraction == 0.0


def test_the_peak_of_cpus_is_one_rate_for_every_machine(monkeypatch):
    """A product takes one second here: eight emulated devices are one machine, a second process is another."""
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    one_machine, elsewhere = 2 * clock.GEMM_SIZE**3, types.SimpleNamespace(device_kind="cpu", process_index=1)
    assert clock.peak_flops_per_second(jax.devices(), "float32") == one_machine
    assert clock.peak_flops_per_second([*jax.devices(), elsewhere], "float32") == 2 * one_machine
