"""Gains of speculative decoding: the audit's numbers, the geometric sum against drawn acceptances."""

import numpy as np
import pytest

from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.accounting.shape import shape_of
from gpt4moe.config.check import CallerError
from gpt4moe.configure import build_model
from gpt4moe.plan.serving.layout import ServeLayout
from gpt4moe.plan.serving.rooflines import Server
from gpt4moe.plan.serving.speculation import (
    Draft,
    best_draft,
    expected_tokens,
    roofline_verification,
    speed_up,
    weight_bound_verification,
)

REFERENCE = shape_of(build_model(["gin_configs/model/gpt4_1p8t.gin"]))
DRAFT = Draft(tokens=4, acceptance=0.7, cost=0.05)


@pytest.mark.parametrize(("batch", "gain"), [(1, 0.79), (4, 1.17), (8, 1.64), (16, 2.09), (32, 2.28)])
def test_gains_of_the_audit(batch, gain):
    found = speed_up(DRAFT, weight_bound_verification(REFERENCE, batch, DRAFT.tokens))
    assert found == pytest.approx(gain, abs=0.006)


def test_a_dense_model_verifies_for_nothing_while_it_waits_for_weights():
    assert speed_up(DRAFT) == pytest.approx(2.31, abs=0.005)
    assert weight_bound_verification(shape_named("llama2_70b"), 1, 4) == 1
    server = Server(shape_named("llama2_70b"), chip_named("h100"), ServeLayout(8))
    assert roofline_verification(server, 1, 2048, 4) < 1.1
    assert roofline_verification(server, 2000, 128, 4) > 3


def test_expected_tokens_of_drawn_acceptances():
    accepted = np.random.default_rng(0).random((200_000, 4)) < 0.7
    tokens = 1 + np.cumprod(accepted, axis=1).sum(axis=1)
    assert expected_tokens(DRAFT) == pytest.approx(tokens.mean(), rel=0.005)
    assert expected_tokens(Draft(4, 1.0)) == 5
    assert expected_tokens(Draft(4, 0.0)) == 1


def test_the_best_length_is_that_of_a_search():
    def verification(tokens: int) -> float:
        return weight_bound_verification(REFERENCE, 8, tokens)

    best, gain = best_draft(DRAFT, verification)
    gains = {tokens: speed_up(Draft(tokens, 0.7, 0.05), verification(tokens)) for tokens in range(17)}
    assert gain == max(gains.values()) == gains[best.tokens]
    none, one = best_draft(DRAFT, lambda tokens: weight_bound_verification(REFERENCE, 1, tokens))
    assert (none.tokens, one) == (0, 1.0)  # at batch 1 no draft helps


@pytest.mark.parametrize(
    ("field", "value"), [("acceptance", 1.2), ("acceptance", -0.1), ("cost", -1.0), ("tokens", -1)]
)
def test_drafts_that_cannot_be(field, value):
    with pytest.raises(CallerError, match=field):
        Draft(**{field: value})
