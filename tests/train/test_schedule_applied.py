"""The schedule reaches the parameters, and the peak of a machine is that of all its chips."""

import pathlib
import types

import jax
import numpy as np

from gpt4moe.train import clock, schedule
from tests.train import tiny
from tests.train.test_step import ROWS, start, take


def test_the_update_is_scaled_by_the_schedule():
    """The warm-up begins at 0, so the first step moves nothing; the second one has the rate of its tokens."""
    batch, run = tiny.random_batch(ROWS), tiny.run_config(pathlib.Path("unused"), batch_tokens=ROWS * tiny.LENGTH)
    at, _ = take([batch], ROWS)
    for got, first in zip(jax.tree.leaves(at.params), jax.tree.leaves(start().params), strict=True):
        np.testing.assert_array_equal(got, first)
    at, metrics = take([batch, batch], ROWS)
    planned = schedule.planned_tokens(run.train)
    want = 1e-2 * schedule.fraction(ROWS * tiny.LENGTH, planned, run.optimizer.schedule)
    np.testing.assert_allclose(metrics[1].learning_rate, want, rtol=1e-6)
    pairs = zip(jax.tree.leaves(at.params), jax.tree.leaves(start().params), strict=True)
    assert 0.5 * want < max(np.abs(got - first).max() for got, first in pairs) < 1.2 * want  # Adam: about the rate


def test_the_peak_is_that_of_all_chips():
    chips = [types.SimpleNamespace(device_kind="NVIDIA H200")] * 8
    np.testing.assert_allclose(clock.peak_flops_per_second(chips, "bfloat16"), 8 * 989.5e12, rtol=1e-6)
