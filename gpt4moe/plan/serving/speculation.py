"""What speculative decoding gains (Leviathan et al. 2023), with what an expert model's verification really costs.

In: acceptance, draft length and cost, a shape and a batch. Out: speed-ups. A dense model verifies G + 1 tokens at the
price of one while weights are what it waits for; a mixture of experts reads more experts for more tokens, so that at
the very smallest batches speculation can make it slower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import require_count, require_fraction, require_not_negative, require_positive
from gpt4moe.plan.serving.expert_load import distinct_experts
from gpt4moe.plan.serving.rooflines import Server, decode_step, sizes_of

MAX_DRAFT_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Draft:
    """A draft model: tokens it proposes a step, chance that each is accepted, its time over a step of the target."""

    tokens: int = 4
    acceptance: float = 0.7
    cost: float = 0.05

    def __post_init__(self) -> None:
        require_count("draft tokens", self.tokens, least=0)
        require_fraction("acceptance", self.acceptance)
        require_not_negative("draft cost", self.cost)


def expected_tokens(draft: Draft) -> float:
    """Returns the tokens that one verification yields: (1 - a^(G+1)) / (1 - a), G + 1 where all are accepted."""
    return float(sum(draft.acceptance**index for index in range(draft.tokens + 1)))


def speed_up(draft: Draft, verification: float = 1.0) -> float:
    """Returns tokens a second with speculation over without.

    verification: time to verify G + 1 tokens a row over the time of a step of one; 1 is Leviathan's theorem 3.8.
    """
    require_positive("verification", verification)
    return expected_tokens(draft) / (draft.tokens * draft.cost + verification)


def weight_bound_verification(shape: Shape, rows: float, draft_tokens: int) -> float:
    """Returns weights read for G + 1 tokens a row over those for one: 1 for a dense model.

    (N_shared + D(B (G+1)) X) / (N_shared + D(B) X), D the distinct experts and X one expert over all layers.
    """
    require_positive("rows", rows)
    sizes = sizes_of(shape)

    def read(tokens: float) -> float:
        touched = distinct_experts(shape.num_experts, shape.experts_per_token, tokens)
        return sizes.read + shape.num_moe_layers * touched * sizes.expert

    return read(rows * (draft_tokens + 1)) / read(rows)


def roofline_verification(server: Server, rows: float, context: float, draft_tokens: int) -> float:
    """Returns the time of a step of G + 1 tokens a row over that of a step of one, all terms of the roofline."""
    longer = decode_step(server, rows, context, tokens_per_row=draft_tokens + 1)
    return longer.seconds / decode_step(server, rows, context).seconds


def best_draft(draft: Draft, verification: Callable[[int], float]) -> tuple[Draft, float]:
    """Returns the draft of the length that gains most, and its speed-up; of length 0, speed-up 1, where none gains.

    verification: of a draft length, as `weight_bound_verification` and `roofline_verification` give it.
    """
    lengths = range(MAX_DRAFT_TOKENS + 1)
    choices = [dataclasses.replace(draft, tokens=tokens) for tokens in lengths]
    gains = [speed_up(choice, verification(choice.tokens)) for choice in choices]
    best = max(lengths, key=gains.__getitem__)
    return choices[best], gains[best]
