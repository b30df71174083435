"""What the formulas of the audit draw on: premises and a shape in, the counts that follow from them out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

from gpt4moe.accounting import flops, parameters
from gpt4moe.accounting.shape import Shape
from gpt4moe.plan.article.claims import Claim
from gpt4moe.plan.article.premises import Premises
from gpt4moe.plan.serving.layout import token_cache_bytes


@dataclasses.dataclass(frozen=True)
class Case:
    """A model under premises, and its counts from `accounting`."""

    premises: Premises
    shape: Shape

    @functools.cached_property
    def total_parameters(self) -> int:
        """All parameters."""
        return parameters.count(self.shape).total

    @functools.cached_property
    def active_parameters(self) -> int:
        """Parameters that one token touches, embedding, router and norms among them."""
        return parameters.count_active(self.shape)

    @functools.cached_property
    def experts_and_attention(self) -> int:
        """Parameters that one token touches as the article counts them: feed-forward and attention alone."""
        counted = parameters.count(self.shape)
        feed_forward = parameters.experts_active(self.shape) + counted.shared_experts + counted.dense
        return feed_forward + counted.attention

    @property
    def training_flops(self) -> float:
        """Model FLOPs of the training run, without the attention core."""
        return flops.train_flops_per_token(self.shape) * self.premises.training_tokens

    @property
    def cache_bytes_per_token(self) -> float:
        """Keys and values of a token over all layers, 16 bits each."""
        return token_cache_bytes(self.shape)


@dataclasses.dataclass(frozen=True)
class Facts:
    """The case to audit, the one that the article itself assumes, and the claims."""

    case: Case
    article: Case
    claims: Mapping[int, Claim]

    @property
    def premises(self) -> Premises:
        """Of the case."""
        return self.case.premises

    @property
    def shape(self) -> Shape:
        """Of the case."""
        return self.case.shape

    def carried(self, claim: int, quantity: Callable[[Case], float]) -> float:
        """The rounded number of a claim, moved in the proportion in which `quantity` has moved from the article's case.

        The article reckons on with its rounded results; a check of what it made of them has to do the same.
        """
        return self.claims[claim].number * quantity(self.case) / quantity(self.article)

    @property
    def total(self) -> float:
        """The article's count of parameters, carried along."""
        return self.carried(11, lambda case: case.total_parameters)

    @property
    def active(self) -> float:
        """The article's count of active parameters, carried along."""
        return self.carried(19, lambda case: case.experts_and_attention)

    @property
    def training_flops(self) -> float:
        """The article's FLOPs of the training run, carried along."""
        return self.carried(37, lambda case: case.training_flops)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a formula gives for its claim, in the claim's unit unless its formula says another.

    against: what to judge it by, None for the claim's number. elsewhere: what the article's other claims make of the
    same quantity, None where they say nothing. beyond_peak: for a price, the throughput it needs as written in the
    article over what the chips' peak allows.
    """

    computed: float | None
    note: str = ""
    against: float | None = None
    elsewhere: float | None = None
    beyond_peak: float | None = None
