"""Lengths of requests, and what batching loses to them: the gain of continuous over static batching, paged caches.

In: a distribution of lengths in tokens, rows of a batch. Out: ratios. A static batch decodes until its longest row has
ended, a continuous one fills a row that has ended with the next request (Orca, Yu et al. 2022).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from gpt4moe.config.check import require, require_count, require_not_negative, require_positive

KINDS = ("fixed", "uniform", "exponential", "lognormal")


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A distribution of lengths: fixed, uniform from 0 to twice the mean, exponential, log-normal, or given ones.

    mean: in tokens. sigma: of a log-normal's logarithm; 1 has a long tail, as chats have. sample: lengths seen, each as
    likely as the next; the others are then not asked.
    """

    kind: str = "exponential"
    mean: float = 256.0
    sigma: float = 1.0
    sample: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "lengths", self.kind, f"must be in {KINDS}")
        require_positive("mean length", self.mean)
        require_not_negative("sigma", self.sigma)
        for length in self.sample:
            require_count("a length of the sample", length)

    @property
    def mean_tokens(self) -> float:
        """The mean length in tokens."""
        return statistics.fmean(self.sample) if self.sample else self.mean

    def draw(self, generator: Any, count: int) -> Any:
        """Returns `count` lengths of at least one token, an array, from a numpy random generator."""
        import numpy as np

        if self.sample:
            return generator.choice(np.asarray(self.sample), count)
        if self.kind == "fixed":
            drawn = np.full(count, self.mean)
        elif self.kind == "uniform":
            drawn = generator.uniform(0, 2 * self.mean, count)
        elif self.kind == "exponential":
            drawn = generator.exponential(self.mean, count)
        else:
            drawn = generator.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, count)
        return np.maximum(1, np.rint(drawn)).astype(int)

    def expected_longest(self, rows: int) -> float:
        """Returns the expected longest of `rows` independent lengths, in tokens."""
        require_count("rows", rows)
        if self.sample:
            return _longest_of_sample(sorted(self.sample), rows)
        if self.kind == "fixed":
            return self.mean
        if self.kind == "uniform":
            return 2 * self.mean * rows / (rows + 1)
        if self.kind == "exponential":
            return self.mean * sum(1 / number for number in range(1, rows + 1))
        return self.mean * math.exp(-(self.sigma**2) / 2) * _longest_lognormal(self.sigma, rows)


def continuous_batching_gain(lengths: Lengths, rows: int) -> float:
    """Returns how many times the tokens a second continuous batching has of static batching: E[longest] / E[length].

    Where the queue is never empty, steps take equally long, and prompts cost nothing.
    """
    return lengths.expected_longest(rows) / lengths.mean_tokens


def paged_cache_gain(max_length: float, mean_length: float) -> float:
    """Returns how many times the rows a paged cache holds of one that reserves the longest row for each."""
    require_positive("mean_length", mean_length)
    fits = mean_length <= max_length
    require(fits, "mean_length", mean_length, f"must be at most max_length ({max_length})")
    return max_length / mean_length


def _longest_of_sample(ordered: Sequence[int], rows: int) -> float:
    """Of `rows` draws with replacement the i-th smallest is the longest with chance (i/n)^rows - ((i-1)/n)^rows."""
    count = len(ordered)
    shares = ((index / count) ** rows for index in range(count + 1))
    below, total = next(shares), 0.0
    for length, share in zip(ordered, shares, strict=True):
        total += length * (share - below)
        below = share
    return total


def _longest_lognormal(sigma: float, rows: int) -> float:
    """Expected largest of exp(sigma z) over `rows` normal z, by the trapezoid rule over z."""
    normal, step = statistics.NormalDist(), 0.01
    grid = (step * index for index in range(-1000, int((10 + 2 * sigma) / step)))
    density = (math.exp(sigma * z) * rows * normal.cdf(z) ** (rows - 1) * normal.pdf(z) for z in grid)
    return step * sum(density)
