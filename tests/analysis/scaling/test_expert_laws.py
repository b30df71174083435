"""The laws of granularity and of sparsity against the tables and sequences of their papers."""

import dataclasses

import numpy as np
import pytest

from gpt4moe.analysis.scaling.granular import KRAJEWSKI, KRAJEWSKI_DENSE
from gpt4moe.analysis.scaling.sparse import ABNAR, sparsity

# Krajewski et al. 2024, table 2: active parameters, tokens, granularity, FLOPs, loss.
OPTIMA = [
    (100e6, 4.37e9, 8, 2.95e18, 3.133),
    (1e9, 28.94e9, 16, 1.93e20, 2.491),
    (3e9, 72.90e9, 16, 1.41e21, 2.245),
    (7e9, 137.60e9, 32, 6.46e21, 2.076),
    (70e9, 941.07e9, 32, 4.16e23, 1.694),
    (300e9, 2.96e12, 64, 5.69e24, 1.503),
    (1e12, 7.94e12, 64, 4.97e25, 1.367),
]
TOTAL_OVER_ACTIVE = (8 * 64 + 4) / 12  # 43: all parameters over the active ones at 64 experts


@pytest.mark.parametrize(("active", "tokens", "granularity", "compute", "loss"), OPTIMA)
def test_losses_of_the_table_of_optima(active, tokens, granularity, compute, loss):
    def predict(total: float) -> float:
        return KRAJEWSKI.loss(total_parameters=total, tokens=tokens, granularity=granularity)

    assert 0.0111 < loss - predict(TOTAL_OVER_ACTIVE * active) < 0.0234
    # the active parameters in the place of all of them are far off
    assert 0.25 < predict(active) - loss < 0.77


@pytest.mark.parametrize(("active", "tokens", "granularity", "compute", "loss"), OPTIMA)
def test_optimal_configurations_of_the_table(active, tokens, granularity, compute, loss):
    found = KRAJEWSKI.law.optimum(compute)
    assert found.granularity == granularity
    assert found.active_parameters == pytest.approx(active, rel=0.035)
    assert found.tokens == pytest.approx(tokens, rel=0.025)
    assert found.total_parameters == pytest.approx(TOTAL_OVER_ACTIVE * found.active_parameters, rel=1e-12)
    spent = 6 * found.active_parameters * found.tokens
    assert 0.8 * compute < spent < compute  # the rest is routing


def test_only_routing_ends_the_grain():
    losses = KRAJEWSKI.loss(total_parameters=1e9, tokens=50e9, granularity=2.0 ** np.arange(10))
    assert np.all(np.diff(losses) < 0)
    dense = KRAJEWSKI_DENSE.loss(total_parameters=1e9, tokens=50e9, granularity=np.array([1, 8]))
    assert dense[0] == dense[1]


def test_sparsity_at_fixed_active_and_at_fixed_total_parameters():
    left_out = np.array([0, 0.5, 0.75, 0.875, 0.9375, 0.98])
    fixed_active = ABNAR.loss(total_parameters=1e9 / (1 - left_out), tokens=100e9, sparsity=left_out)
    assert fixed_active == pytest.approx([2.349, 2.275, 2.214, 2.164, 2.122, 2.066], abs=5e-4)
    fixed_total = ABNAR.loss(total_parameters=8e9, tokens=100e9, sparsity=left_out)
    assert fixed_total[[0, -1]] == pytest.approx([2.119, 2.295], abs=5e-4)
    assert np.all(np.diff(fixed_total) > 0)
    # the sign of lambda: with the other one, sparser at fixed active parameters would be worse
    flipped = dataclasses.replace(ABNAR.law, lambda_=0.1666).loss(1e9 / (1 - left_out), 100e9, left_out)
    assert flipped[-1] > flipped[0]


def test_sparsity_of_experts():
    assert sparsity(np.array([1, 8, 64]), np.array([1, 2, 1])) == pytest.approx([0, 0.75, 63 / 64])
    warning = ABNAR.ranges.warning({"sparsity": np.array([0.5, 0.98])})
    assert "sparsity 0.5 .. 0.98 (fitted on 0 .. 0.95)" in warning
