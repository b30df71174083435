"""Dense laws against published and reproduced digits: Hoffmann, Epoch's replication, Muennighoff."""

import numpy as np
import pytest

from gpt4moe.analysis.scaling.chinchilla import C4, EPOCH, HOFFMANN, MUENNIGHOFF, Chinchilla

REFERENCE_COMPUTE = 2.16e25


@pytest.mark.parametrize(
    ("published", "parameters", "tokens", "reference_loss"),
    [(HOFFMANN, 211e9, 17.1e12, 1.822), (EPOCH, 463e9, 7.8e12, 1.901), (C4, 428e9, 8.4e12, 1.952)],
    ids=["hoffmann", "epoch", "c4"],
)
def test_optimum_at_the_compute_of_the_reference(published, parameters, tokens, reference_loss):
    optimum = published.law.optimum(REFERENCE_COMPUTE)
    assert optimum.active_parameters == pytest.approx(parameters, abs=0.5e9)
    assert optimum.tokens == pytest.approx(tokens, abs=0.05e12)
    # 277B active on 13T tokens, what the reference did, is next to the optimum of every law
    done = published.loss(active_parameters=277e9, tokens=13e12)
    assert done == pytest.approx(reference_loss, abs=0.0006)
    assert 0 < done - optimum.loss < 0.002


def test_optimum_is_least_along_its_compute():
    law, compute = EPOCH.law, 1e21
    optimum = law.optimum(compute)
    parameters = optimum.active_parameters * np.geomspace(0.1, 10, 201)
    losses = law.loss(parameters, compute / 6 / parameters)
    assert np.argmin(losses) == 100
    assert losses.min() == pytest.approx(optimum.loss, rel=1e-12)
    assert law.best_parameters(optimum.tokens) == pytest.approx(optimum.active_parameters, rel=1e-9)


def test_epochs_constants_share_compute_as_published():
    law = EPOCH.law
    assert law.beta / (law.alpha + law.beta) == pytest.approx(0.513, abs=5e-4)
    assert np.log([law.A, law.B, law.E]) == pytest.approx([6.178, 7.643, 0.597], abs=5e-4)


def test_rounded_constants_would_move_the_optimum():
    rounded = Chinchilla(A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28).optimum(REFERENCE_COMPUTE)
    exact = HOFFMANN.law.optimum(REFERENCE_COMPUTE)
    assert rounded.active_parameters / exact.active_parameters == pytest.approx(0.78, abs=0.01)


@pytest.mark.parametrize(
    ("parameters", "tokens", "loss"), [(6.34e9, 242e9, 2.2256440889984477), (8.67e9, 178e9, 2.2269634075087867)]
)
def test_repeated_tokens_to_the_last_digit(parameters, tokens, loss):
    predicted = MUENNIGHOFF.loss(active_parameters=parameters, tokens=tokens, unique_tokens=25e9)
    assert predicted == pytest.approx(loss, rel=1e-15)


def test_optimum_over_limited_tokens():
    optimum = MUENNIGHOFF.law.optimum(1e22, unique_tokens=25e9)
    assert optimum.tokens == pytest.approx(2.3734e11, rel=1e-3)
    assert optimum.tokens / 25e9 == pytest.approx(9.49, abs=0.005)
    assert optimum.active_parameters == pytest.approx(7.02e9, rel=1e-3)
    at_fixture = MUENNIGHOFF.loss(active_parameters=1e22 / 6 / 2.3734e11, tokens=2.3734e11, unique_tokens=25e9)
    assert optimum.loss <= at_fixture


def test_what_epochs_are_worth():
    epochs = np.array([1, 2, 4])
    assert MUENNIGHOFF.law.epochs_worth(epochs) == pytest.approx([1, 1.968, 3.726], abs=5e-4)
    epochs = np.array([2, 3, 4, 8, 16, 64])
    share = MUENNIGHOFF.law.epochs_worth(epochs) / epochs
    assert 100 * share == pytest.approx([98.4, 95.8, 93.1, 82.8, 66.1, 25.2], abs=0.051)
    assert MUENNIGHOFF.law.effective_tokens(4e9, 1e9) == pytest.approx(3.726e9, rel=1e-3)


def test_one_epoch_of_a_model_that_is_not_too_large_is_chinchillas_law():
    law, tokens = MUENNIGHOFF.law, 20e9
    small = 0.9 * law.fresh.best_parameters(tokens)
    # tokens beyond those that are shown do not help
    for unique_tokens in (tokens, 3 * tokens):
        assert law.loss(small, tokens, unique_tokens) == pytest.approx(C4.law.loss(small, tokens), rel=1e-14)
    large = 2 * law.fresh.best_parameters(tokens)
    assert law.loss(large, tokens, tokens) > C4.law.loss(large, tokens)
