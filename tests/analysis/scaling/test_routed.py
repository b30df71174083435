"""The routed law against table 3 of Clark et al. 2022, its cut-offs and the refit to the open table."""

import numpy as np
import pytest

from gpt4moe.analysis.scaling import routed
from gpt4moe.analysis.scaling.routed import CLARK_HASH, CLARK_RL_R, CLARK_S_BASE, REFIT_HASH, REFIT_RL_R, REFIT_S_BASE

PUBLISHED = [CLARK_S_BASE, CLARK_RL_R, CLARK_HASH]
REFIT = [REFIT_S_BASE, REFIT_RL_R, REFIT_HASH]
ROUTERS = ["S-Base", "RL-R", "Hash"]


@pytest.mark.parametrize("published", PUBLISHED + REFIT)
def test_experts_begin_and_saturate(published):
    law = published.law
    assert law.saturated(1) == pytest.approx(law.E_start, rel=1e-14)
    experts = law.saturated(2.0 ** np.arange(30))
    assert np.all(np.diff(experts) > 0)
    assert experts[-1] == pytest.approx(law.E_max, rel=1e-3)


@pytest.mark.parametrize("published", PUBLISHED)
def test_one_expert_is_the_dense_law_of_the_paper(published):
    law = published.law
    slope = law.a + law.c * np.log10(law.E_start)
    assert -slope == pytest.approx(routed.DENSE_EXPONENT, abs=0.003)
    sizes = np.geomspace(15e6, 1.3e9, 5)
    dense = (routed.DENSE_SCALE / sizes) ** routed.DENSE_EXPONENT
    assert law.loss(sizes, 1) == pytest.approx(dense, rel=0.02)


@pytest.mark.parametrize(("size", "experts", "loss"), [(15e6, 1, 3.162), (15e6, 512, 2.62), (1.3e9, 512, 1.999)])
def test_refit_is_near_what_was_measured(size, experts, loss):
    assert REFIT_S_BASE.loss(active_parameters=size, num_experts=experts) == pytest.approx(loss, rel=0.015)


@pytest.mark.parametrize("published", PUBLISHED + REFIT)
def test_dense_equivalent_has_the_same_loss(published):
    law, sizes, experts = published.law, np.array([[15e6], [1e9]]), np.array([1, 8, 64, 512])
    equivalent = law.dense_parameters(sizes, experts)
    assert law.loss(equivalent, 1) == pytest.approx(law.loss(sizes, experts), rel=1e-12)
    assert law.dense_multiplier(sizes, 1) == pytest.approx(np.ones((2, 1)), rel=1e-12)
    assert np.all(law.dense_multiplier(sizes[0], experts) > law.dense_multiplier(sizes[1], experts) - 1e-9)
    # at the cut-off, experts are worth nothing
    assert law.dense_multiplier(law.cutoff, experts) == pytest.approx(np.ones(4), rel=1e-9)


def test_the_papers_example_of_a_dense_equivalent():
    """5M parameters with 128 experts are about 55M dense ones."""
    assert CLARK_S_BASE.law.dense_parameters(5e6, 128) == pytest.approx(55e6, rel=0.06)


def test_three_digits_do_not_give_the_published_cutoffs():
    cutoffs = [published.law.cutoff for published in PUBLISHED]
    assert cutoffs == pytest.approx([1e12, 3.2e10, 2.2e11], rel=0.03)
    off = [cutoff / routed.PUBLISHED_CUTOFF[router] for cutoff, router in zip(cutoffs, ROUTERS, strict=True)]
    assert max(off) > 2.5
    assert min(off) < 0.4


@pytest.mark.parametrize(("published", "router"), [*zip(REFIT, ROUTERS, strict=True)])
def test_refit_cutoffs_lie_within_the_rounding_of_their_coefficients(published, router):
    law, half = published.law, 0.5e-4
    low = 10 ** ((-law.b - half) / (law.c + half))
    high = 10 ** ((-law.b + half) / (law.c - half))
    assert low < routed.REFIT_CUTOFF[router] < high < 1.4 * low
    assert law.cutoff == pytest.approx(routed.REFIT_CUTOFF[router], rel=0.1)
