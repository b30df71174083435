"""Published numbers of every law, and what holds of each by its own logic."""

import numpy as np
import pytest

from gpt4moe.analysis.scaling import laws

REFERENCE_FLOPS = 2.16e25  # 6 * 277e9 * 13e12


@pytest.mark.parametrize(
    ("law", "parameters", "tokens", "loss"),
    [(laws.HOFFMANN, 211e9, 17.1e12, 1.822), (laws.EPOCH, 463e9, 7.8e12, 1.901), (laws.C4, 429e9, 8.4e12, 1.953)],
    ids=["Hoffmann", "Epoch", "C4"],
)
def test_the_reference_and_its_optimum(law, parameters, tokens, loss):
    best = law.optimum(REFERENCE_FLOPS)
    np.testing.assert_allclose(best, (parameters, tokens), rtol=6e-3)
    assert law.loss(277e9, 13e12) == pytest.approx(loss, abs=6e-4)
    assert 0 <= law.loss(277e9, 13e12) - law.loss(*best) < 2.5e-3


@pytest.mark.parametrize("law", [laws.HOFFMANN, laws.EPOCH, laws.C4], ids=["Hoffmann", "Epoch", "C4"])
def test_no_other_split_of_the_flops_is_better(law):
    parameters, tokens = law.optimum(1e21)
    assert 6 * parameters * tokens == pytest.approx(1e21)
    factors = np.geomspace(0.3, 3, 41)
    assert (law.loss(parameters * factors, tokens / factors) >= law.loss(parameters, tokens) - 1e-12).all()


def test_the_constants_of_the_replication_divide_compute_evenly():
    assert laws.EPOCH.beta / (laws.EPOCH.alpha + laws.EPOCH.beta) == pytest.approx(0.513, abs=5e-4)


def test_repeated_data_to_the_last_published_digit():
    law = laws.MUENNIGHOFF
    assert law.loss(6.34e9, 242e9, 25e9) == pytest.approx(2.2256440889984477, abs=1e-13)
    assert law.loss(8.67e9, 178e9, 25e9) == pytest.approx(2.2269634075087867, abs=1e-13)
    parameters, tokens = law.optimum(1e22, 25e9)
    assert tokens == pytest.approx(2.3734e11, rel=1e-3)  # the optimum is flat
    assert (parameters, tokens / 25e9) == pytest.approx((7.02e9, 9.49), rel=1e-3)


@pytest.mark.parametrize(
    ("epochs", "share"), [(2, 0.984), (3, 0.958), (4, 0.931), (8, 0.828), (16, 0.661), (64, 0.252)]
)
def test_what_epochs_are_worth(epochs, share):
    assert laws.worth(epochs, laws.MUENNIGHOFF.tokens_half) / epochs == pytest.approx(share, abs=5e-4)


def test_without_repetition_it_is_chinchillas_law():
    assert laws.MUENNIGHOFF.loss(1e9, 25e9, 25e9) == pytest.approx(laws.C4.loss(1e9, 25e9))
    assert laws.MUENNIGHOFF.loss(1e9, 25e9, 99e9) == pytest.approx(laws.C4.loss(1e9, 25e9))


@pytest.mark.parametrize(
    ("table", "name", "cutoff"),
    [("CLARK_PUBLISHED", "s_base", 1e12), ("CLARK_PUBLISHED", "rl_r", 3.2e10), ("CLARK_PUBLISHED", "hash", 2.2e11),
     ("CLARK_REFIT", "s_base", 6.8e11), ("CLARK_REFIT", "rl_r", 8.8e10), ("CLARK_REFIT", "hash", 8.1e10)],
)  # fmt: skip
def test_where_more_experts_stop_helping(table, name, cutoff):
    """Rounded constants do not give the published cut-offs (937B, 85B, 83B); the refit's three digits nearly do."""
    law = getattr(laws, table)[name]
    assert law.cutoff == pytest.approx(cutoff, rel=0.1)
    experts = np.array([1, 8, 64, 512])
    assert (np.diff(law.loss(law.cutoff / 100, experts)) < 0).all()
    np.testing.assert_allclose(law.loss(law.cutoff, experts), law.loss(law.cutoff, 1), rtol=1e-12)
    assert (np.diff(law.loss(law.cutoff * 100, experts)) > 0).all()


@pytest.mark.parametrize("law", laws.CLARK_REFIT.values(), ids=laws.CLARK_REFIT)
def test_a_routed_models_loss_is_that_of_its_dense_equivalent(law):
    parameters, experts = 1e9, np.array([1.0, 4.0, 64.0])
    dense = law.dense_equivalent(parameters, experts)
    np.testing.assert_allclose(law.loss(dense, 1), law.loss(parameters, experts), rtol=1e-12)
    assert dense[0] == pytest.approx(parameters) and (np.diff(dense) > 0).all()
    assert law.saturated(1) == pytest.approx(law.least) and law.saturated(1e12) == pytest.approx(law.most, rel=1e-6)


def test_finer_experts_approach_a_bound():
    losses = laws.KRAJEWSKI.loss(1e9, 66e9, np.array([1.0, 2, 4, 8, 16]))
    assert (np.diff(losses) < 0).all() and (np.diff(losses, 2) > 0).all()
    by_hand = 0.47 + (2.1 / 4**0.58 + 18.1) / 1e9**0.115 + 30.8 / 66e9**0.147
    assert losses[2] == pytest.approx(by_hand)
    assert laws.KRAJEWSKI_DENSE.loss(1e9, 66e9) == pytest.approx(0.47 + 16.3 / 1e9**0.126 + 26.7 / 66e9**0.127)


def test_sparsity_helps_at_equal_active_and_hurts_at_equal_total_parameters():
    sparsity = np.array([0, 0.5, 0.75, 0.875, 0.9375, 0.98])
    same_active = laws.ABNAR.loss(1e9 / (1 - sparsity), 100e9, sparsity)
    np.testing.assert_allclose(same_active, [2.349, 2.275, 2.214, 2.164, 2.122, 2.066], atol=1e-3)
    same_total = laws.ABNAR.loss(8e9, 100e9, sparsity)
    np.testing.assert_allclose(same_total[[0, -1]], [2.119, 2.295], atol=1e-3)
    assert (np.diff(same_total) > 0).all()
