"""Keys and values of past tokens, kept for decoding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from gpt4moe.config.model import ModelConfig
from gpt4moe.model.attention_kernel import attend_cached
from gpt4moe.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (rotated) and values, [L, B, S, M, H] each; slot s of a row holds the token at position s.

    There is no length: a query at position p attends to slots 0..p, so whoever writes positions in order needs no
    other record, and a slot written again is simply replaced. `leading` has a cache (L 1) for each layer before the
    stack: apart, so that no step copies them to take them from a stack and put them back.
    """

    keys: Float[Array, "... B S M H"]
    values: Float[Array, "... B S M H"]
    leading: tuple[KVCache, ...] = ()


def init_cache(
    config: ModelConfig,
    batch_rows: int,
    max_length: int,
    dtype: jnp.dtype | None = None,
    num_layers: int | None = None,
) -> KVCache:
    """Returns an empty cache for `max_length` tokens of `batch_rows` rows.

    `dtype` None is the compute dtype; `num_layers` of the stack, None those of the model: a layout may have empty slots
    besides.
    """

    def of(layers: int) -> KVCache:
        shape = (layers, batch_rows, max_length, config.attention.num_kv_heads, config.head_dim)
        zeros = jnp.zeros(shape, dtype or config.compute_dtype)
        return KVCache(zeros, zeros)

    leading = tuple(of(1) for _ in range(config.leading_dense_layers))
    return dataclasses.replace(of(num_layers or config.num_layers - len(leading)), leading=leading)


def attend_through(
    cache: KVCache,
    q_BTNH: Float[Array, "B T N H"],
    k_BTMH: Float[Array, "B T M H"],
    v_BTMH: Float[Array, "B T M H"],
    positions_BT: Int[Array, "B T"],
    valid_BT: Bool[Array, "B T"],
    query_chunk: int,
) -> tuple[Float[Array, "B T N H"], KVCache]:
    """Returns y_BTNH and one layer's cache with the tokens' keys and values written, which they then attend to."""
    cache = write(cache, k_BTMH, v_BTMH, positions_BT, valid_BT)
    return attend_cached(q_BTNH, cache.keys, cache.values, positions_BT, query_chunk), cache


def write(
    cache: KVCache,
    keys_BTMH: Float[Array, "B T M H"],
    values_BTMH: Float[Array, "B T M H"],
    positions_BT: Int[Array, "B T"],
    valid_BT: Bool[Array, "B T"],
) -> KVCache:
    """Returns one layer's cache ([B, S, M, H]) with the valid tokens stored at their positions; the rest is dropped.

    A scatter, not a slice update: rows stand at different positions, and XLA updates a donated cache in place.
    """
    num_rows, num_slots = cache.keys.shape[:2]
    slots_BT = jnp.where(valid_BT, positions_BT, num_slots)  # out of range: the scatter leaves it out
    rows = jnp.arange(num_rows)[:, None]
    keys = cache.keys.at[rows, slots_BT].set(keys_BTMH.astype(cache.keys.dtype), mode="drop")
    values = cache.values.at[rows, slots_BT].set(values_BTMH.astype(cache.values.dtype), mode="drop")
    return KVCache(keys, values)
