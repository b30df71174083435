"""Cross-entropy over a mesh: each device has the logits of its own part of the vocabulary.

Behind the contract of `gpt4moe.model.vocabulary.cross_entropy`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Float32, Int

from gpt4moe.model.vocabulary import log_partition_and_target
from gpt4moe.parallel.island import Spread, island
from gpt4moe.types import Array


def sharded_cross_entropy(spread: Spread) -> Callable:
    """Returns `cross_entropy` for a mesh."""
    return functools.partial(_apply, spread)


def _apply(
    spread: Spread, x_BTD: Float[Array, "B T D"], weight_VD: Float[Array, "V D"], targets_BT: Int[Array, "B T"]
) -> Float32[Array, "B T"]:
    vocabulary = spread.axes_of("vocab")
    tokens = PartitionSpec(spread.rows, spread.context)

    def shard(x_BTD: Array, weight_VD: Array, targets_BT: Array) -> Array:
        first = jax.lax.axis_index(vocabulary) * len(weight_VD) if vocabulary else 0
        log_partition_BT, target_logit_BT = log_partition_and_target(x_BTD, weight_VD, targets_BT - first)
        if not vocabulary:
            return log_partition_BT - target_logit_BT
        largest_BT = jax.lax.pmax(jax.lax.stop_gradient(log_partition_BT), vocabulary)
        partition_BT = jax.lax.psum(jnp.exp(log_partition_BT - largest_BT), vocabulary)
        return largest_BT + jnp.log(partition_BT) - jax.lax.psum(target_logit_BT, vocabulary)

    def in_turn(x_BTD: Array, weight_VD: Array, targets_BT: Array) -> Array:
        """Row by row: what the backward pass holds in float32 is that of one row."""
        rows = (x_BTD[:, None], targets_BT[:, None])
        return jax.lax.map(lambda row: shard(row[0], weight_VD, row[1]), rows)[:, 0]

    return island(in_turn, spread.mesh, (tokens, PartitionSpec(vocabulary), tokens), tokens)(
        x_BTD, weight_VD, targets_BT
    )
