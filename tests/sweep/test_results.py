"""What a sweep's results count in the log of a run."""

import numpy as np
import pytest

from gpt4moe.sweep.results import count_spikes


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
