"""Variants of a mixture-of-experts layer at equal cost: finer experts, and the dense layers to compare it with."""

from __future__ import annotations

import dataclasses

from gpt4moe.config.check import require, require_count
from gpt4moe.config.moe import MoeConfig

COMPARISONS = ("moe", "dense_active", "dense_total")


def variant(moe: MoeConfig, granularity: int = 1, compare: str = "moe") -> MoeConfig:
    """Returns `moe` with its experts cut finer, or the dense layer that `compare` asks for in its place.

    `granularity` G: see `granular`. `compare`: "moe" is the layer itself; "dense_active" has as many FLOPs a token,
    "dense_total" as many parameters, both but for the router: see `dense`.
    """
    require(compare in COMPARISONS, "compare", compare, f"must be in {COMPARISONS}", "set COMPARE to one of them")
    finer = granular(moe, granularity)
    if compare == "moe":
        return finer
    return dense(moe, moe.experts_per_token if compare == "dense_active" else moe.num_experts)


def granular(moe: MoeConfig, granularity: int) -> MoeConfig:
    """Returns G times as many experts of a G-th of the width, G times as many of them for a token.

    FLOPs and parameters but the router's stay what they are (Krajewski et al. 2024, section 3.2).
    """
    require_count("granularity", granularity)
    constraint = f"must divide hidden_dim ({moe.hidden_dim})"
    require(moe.hidden_dim % granularity == 0, "granularity", granularity, constraint, "change GRANULARITY")
    return dataclasses.replace(
        moe,
        num_experts=moe.num_experts * granularity,
        experts_per_token=moe.experts_per_token * granularity,
        hidden_dim=moe.hidden_dim // granularity,
    )


def dense(moe: MoeConfig, width: int) -> MoeConfig:
    """Returns one expert `width` times as wide that every token goes through with weight 1: a dense feed-forward.

    What a router is told has no meaning there and goes back to its defaults; a shared expert stays.
    """
    return MoeConfig(
        num_experts=1,
        experts_per_token=1,
        hidden_dim=width * moe.hidden_dim,
        gated=moe.gated,
        shared_hidden_dim=moe.shared_hidden_dim,
        normalize_gates=False,
        load_balance_weight=0.0,
        router_z_weight=0.0,
    )
