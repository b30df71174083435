"""Samples of what one layer's routing does to a step: distinct experts read, load of the fullest group over the mean.

In: a shape, expert groups, a seed's generator. Out: pairs for `rooflines.decode_step`. Tokens are drawn independently;
a router with favourites is given by the weights of its experts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import require

DRAWS = 32  # layers drawn for each number of tokens
STEPS_PER_OCTAVE = 8  # numbers of tokens that are told apart


class RoutingDraws:
    """Layers whose routing is drawn once for each number of tokens, to the nearest 9 %, and then drawn from."""

    def __init__(self, shape: Shape, groups: int, generator: Any, weights: Sequence[float] | None = None):
        """weights: how much each expert is liked, relative to the others; None for all alike."""
        self._shape, self._groups, self._generator = shape, groups, generator
        experts = shape.num_experts
        if weights is not None:
            require(len(weights) == experts, "expert weights", len(weights), f"must be num_experts ({experts})")
            require(min(weights) > 0, "expert weights", min(weights), "must all be above 0")
        self._log_weights = np.log(np.asarray(weights if weights is not None else np.ones(experts)))
        self._layers = functools.cache(self._draw_layers)

    def sample(self, tokens: int, stages: int, layers: int) -> list[tuple[float, float]]:
        """Returns (distinct experts, imbalance) of a step of `tokens` tokens on each stage: means over its layers."""
        eighths = round(math.log2(tokens) * STEPS_PER_OCTAVE)
        drawn = self._layers(round(2 ** (eighths / STEPS_PER_OCTAVE)))
        means = drawn[self._generator.integers(0, DRAWS, (stages, layers))].sum(axis=1) / layers
        return [(distinct, imbalance) for distinct, imbalance in means.tolist()]

    def _draw_layers(self, tokens: int) -> np.ndarray:
        """[DRAWS, 2]: each token takes the K experts of highest log weight plus Gumbel noise, K without replacement."""
        chosen, experts = self._shape.experts_per_token, self._shape.num_experts
        layers = []
        for _ in range(DRAWS):
            noise = self._generator.gumbel(size=(tokens, experts))
            taken = np.argpartition(-(noise + self._log_weights), chosen - 1, axis=1)[:, :chosen]
            counts = np.bincount(taken.ravel(), minlength=experts)
            loads = counts.reshape(self._groups, -1).sum(axis=1)
            layers.append((np.count_nonzero(counts), loads.max() / loads.mean()))
        return np.asarray(layers)
