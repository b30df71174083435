"""Learning-rate schedules, the batch ramp and the length of a run, against hand-computed values and a slow loop."""

import math
import random

import jax
import numpy as np
import pytest

from gpt4moe.config.optimizer import ScheduleConfig
from gpt4moe.config.train import TrainConfig
from gpt4moe.train import schedule


def fraction(tokens, config, total=1000):
    return float(jax.jit(lambda t: schedule.fraction(t, total, config))(np.float32(tokens)))


@pytest.mark.parametrize("shape", [schedule.cosine, schedule.wsd, schedule.constant])
def test_warm_up_is_linear_and_then_the_shape_starts_at_one(shape):
    config = ScheduleConfig(warmup_tokens=100, final_fraction=0.1, shape=shape)
    warm = [fraction(tokens, config) for tokens in (0, 25, 50, 100)]
    np.testing.assert_allclose(warm, [0, 0.25, 0.5, 1], atol=1e-6)


def test_cosine_by_hand():
    config = ScheduleConfig(warmup_tokens=200, final_fraction=0.1)
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - 200) / 800)) for t in (200, 400, 600, 1000)] + [0.1]
    actual = [fraction(tokens, config) for tokens in (200, 400, 600, 1000, 5000)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert actual[2] == pytest.approx(0.55)  # half way between 1 and 0.1


def test_wsd_is_flat_and_decays_over_its_last_fifth():
    config = ScheduleConfig(final_fraction=0.0, decay_fraction=0.2, shape=schedule.wsd)
    np.testing.assert_allclose([fraction(t, config) for t in (0, 500, 800, 900, 1000)], [1, 1, 1, 0.5, 0], atol=1e-6)


def test_a_users_own_shape_is_behind_the_warm_up():
    config = ScheduleConfig(warmup_tokens=10, shape=lambda tokens, total, config: 1 - tokens / total)
    np.testing.assert_allclose([fraction(t, config) for t in (5, 500)], [0.5 * 0.995, 0.5], rtol=1e-6)


def test_the_ramp_by_hand():
    ramp = ((0, 10), (25, 20), (100, 40))
    sizes = [schedule.batch_tokens_at(ramp, tokens) for tokens in (0, 24, 25, 99, 100, 10**9)]
    assert sizes == [10, 10, 20, 20, 40, 40]


def test_planned_tokens_equal_a_walk_through_the_run():
    draw = random.Random(0)
    for _ in range(200):
        starts = [0, *sorted(draw.sample(range(1, 400), draw.randrange(3)))]
        sizes = sorted(draw.randrange(1, 40) for _ in starts)
        steps, budget = draw.randrange(1, 60), draw.randrange(1, 600)
        config = TrainConfig(steps, budget, tuple(zip(starts, sizes, strict=True)), seed=0, checkpoint_every=1)
        tokens = step = 0
        while step < steps and tokens < budget:
            tokens += schedule.batch_tokens_at(config.ramp, tokens)
            step += 1
        assert schedule.planned_tokens(config) == tokens, config


@pytest.mark.parametrize("shape", [schedule.cosine, schedule.wsd])
def test_a_run_of_trillions_of_tokens_is_scheduled(shape):
    config = ScheduleConfig(warmup_tokens=3_000_000_000, final_fraction=0.0, decay_fraction=0.5, shape=shape)
    half_warm = fraction(1_500_000_000, config, total=13_000_000_000_000)
    ended = fraction(13_000_000_000_000, config, total=13_000_000_000_000)
    np.testing.assert_allclose([half_warm, ended], [0.5, 0.0], atol=1e-6)
