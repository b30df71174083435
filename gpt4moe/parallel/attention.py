"""Attention over a mesh: each device attends with its own heads and its own part of the sequence.

Behind the contracts of `gpt4moe.model.attention_kernel`. Heads lie over `tensor`. A device that holds part of
the queries of a row (`context`) gathers all its keys and values, which are few where heads share them (Llama 3, 3.3.2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from gpt4moe.config.check import require
from gpt4moe.model.attention_kernel import attend, attend_across, attend_cached, attend_part
from gpt4moe.model.cache import KVCache, write
from gpt4moe.parallel.island import Spread, island
from gpt4moe.types import Array


def sharded_attend(spread: Spread, backend: str) -> Callable:
    """Returns `attend` for a mesh whose devices are of `backend`."""
    return functools.partial(_apply, spread, backend)


def _apply(
    spread: Spread,
    backend: str,
    q_BTNH: Float[Array, "B T N H"],
    k_BTMH: Float[Array, "B T M H"],
    v_BTMH: Float[Array, "B T M H"],
    segment_ids_BT: Int[Array, "B T"],
    query_chunk: int,
) -> Float[Array, "B T N H"]:
    heads, kv_heads = spread.axes_of("heads"), spread.axes_of("kv_heads")
    tokens = PartitionSpec(spread.rows, spread.context)
    query, key_value = PartitionSpec(*tokens, heads), PartitionSpec(*tokens, kv_heads)

    def shard(q: Array, k: Array, v: Array, segments_BT: Array) -> Array:
        k, v = (_of_my_queries(x, spread) for x in (k, v))
        if not spread.context:
            return attend(q, k, v, segments_BT, query_chunk, backend)
        k, v, all_segments_BT = (jax.lax.all_gather(x, spread.context, axis=1, tiled=True) for x in (k, v, segments_BT))
        first = jax.lax.axis_index(spread.context) * q.shape[1]
        return attend_part(q, k, v, segments_BT, all_segments_BT, first, query_chunk)

    return island(shard, spread.mesh, (query, key_value, key_value, tokens), query)(
        q_BTNH, k_BTMH, v_BTMH, segment_ids_BT
    )


def sharded_attend_across(spread: Spread, backend: str) -> Callable:
    """Returns `attend_across` for a mesh: keys of all of a row's images are on the devices that hold the row."""
    return functools.partial(_apply_across, spread, backend)


def _apply_across(
    spread: Spread,
    backend: str,
    q_BTNH: Float[Array, "B T N H"],
    k_BSMH: Float[Array, "B S M H"],
    v_BSMH: Float[Array, "B S M H"],
    numbers_BT2: Int[Array, "B T 2"],
    number_BS: Int[Array, "B S"],
    query_chunk: int,
) -> Float[Array, "B T N H"]:
    heads, kv_heads = spread.axes_of("heads"), spread.axes_of("kv_heads")
    rows, tokens = PartitionSpec(spread.rows), PartitionSpec(spread.rows, spread.context)
    query, key_value = PartitionSpec(*tokens, heads), PartitionSpec(spread.rows, None, kv_heads)

    def shard(q: Array, k: Array, v: Array, numbers_BT2: Array, number_BS: Array) -> Array:
        k, v = (_of_my_queries(x, spread, "CrossAttentionConfig.num_kv_heads") for x in (k, v))
        return attend_across(q, k, v, numbers_BT2, number_BS, query_chunk, backend)

    apply = island(shard, spread.mesh, (query, key_value, key_value, tokens, rows), query)
    return apply(q_BTNH, k_BSMH, v_BSMH, numbers_BT2, number_BS)


def sharded_attend_through(spread: Spread) -> Callable:
    """Returns `attend_through` for a mesh; a row's cache is whole on the devices that hold the row."""
    return functools.partial(_apply_through, spread)


def _apply_through(
    spread: Spread,
    cache: KVCache,
    q_BTNH: Float[Array, "B T N H"],
    k_BTMH: Float[Array, "B T M H"],
    v_BTMH: Float[Array, "B T M H"],
    positions_BT: Int[Array, "B T"],
    valid_BT: Bool[Array, "B T"],
    query_chunk: int,
) -> tuple[Float[Array, "B T N H"], KVCache]:
    heads, kv_heads = spread.axes_of("heads"), spread.axes_of("kv_heads")
    rows, query = PartitionSpec(spread.rows), PartitionSpec(spread.rows, None, heads)
    key_value = PartitionSpec(spread.rows, None, kv_heads)

    def shard(cache: KVCache, q: Array, k: Array, v: Array, positions_BT: Array, valid_BT: Array):
        # All heads are written wherever they are kept, and each device reads those of its queries.
        whole = write(cache, k, v, positions_BT, valid_BT)
        mine = [_of_my_queries(x, spread) for x in (whole.keys, whole.values)]
        return attend_cached(q, *mine, positions_BT, query_chunk), whole

    in_specs = (key_value, query, key_value, key_value, rows, rows)
    apply = island(shard, spread.mesh, in_specs, (query, key_value))
    return apply(cache, q_BTNH, k_BTMH, v_BTMH, positions_BT, valid_BT)


def _of_my_queries(k_BTMH: Array, spread: Spread, setting: str = "num_kv_heads") -> Array:
    """The key or value heads that this device's query heads share, where it holds those of all."""
    kv_heads, axes = k_BTMH.shape[2], spread.axes_of("heads")
    if not axes or spread.axes_of("kv_heads") or kv_heads == 1:
        return k_BTMH
    span = jax.lax.axis_size(axes)
    fits = kv_heads % span == 0 or span % kv_heads == 0
    require(fits, setting, kv_heads, f"must divide or be divisible by the {'*'.join(axes)} axis ({span})")
    held = max(kv_heads // span, 1)
    first = jax.lax.axis_index(axes) * kv_heads // span
    return jax.lax.dynamic_slice_in_dim(k_BTMH, first, held, axis=2)
