"""Which experts a step touches and how uneven their load is: expectations over independent, uniform routing.

Real tokens of one row resemble each other, and routers have favourites: both touch fewer experts than this says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def distinct_experts(
    num_experts: int, experts_per_token: int, tokens: float, marginals: Sequence[float] | None = None
) -> float:
    """Returns the expected number of experts of a layer that at least one of `tokens` tokens chooses.

    E (1 - (1 - K/E)^tokens); with `marginals`, the probability of each expert to be among a token's K, the sum of
    1 - (1 - q)^tokens over them.
    """
    if marginals is not None:
        return sum(1 - (1 - share) ** tokens for share in marginals)
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** tokens)


def expected_max(mean: float, groups: int) -> float:
    """Returns about how much the fullest of `groups` gets where each gets `mean` items on average, by chance.

    mean + sqrt(2 mean ln groups): a Gaussian's tail, good from a few items a group on (Raab and Steger 1998).
    """
    return mean + math.sqrt(2 * mean * math.log(groups)) if groups > 1 else mean


def max_expert_rows(num_experts: int, experts_per_token: int, tokens: float) -> float:
    """Returns about how many rows the fullest expert of a layer gets of a step of `tokens` tokens."""
    return min(tokens, expected_max(tokens * experts_per_token / num_experts, num_experts))


def group_imbalance(num_experts: int, experts_per_token: int, tokens: float, groups: int) -> float:
    """Returns the load of the fullest of `groups` equal groups of experts over the mean load."""
    choices = tokens * experts_per_token
    most = tokens * min(experts_per_token, num_experts // groups)
    return min(most, expected_max(choices / groups, groups)) / (choices / groups) if tokens else 1.0


def group_distinct(distinct: float, num_experts: int, groups: int) -> float:
    """Returns about how many of its experts the busiest of `groups` groups reads, where a layer reads `distinct`."""
    return min(num_experts / groups, expected_max(distinct / groups, groups))
