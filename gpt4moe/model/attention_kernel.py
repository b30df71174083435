"""Attention arithmetic: softmax(q k^T / sqrt(H)) v under a causal, per-segment mask, float32 softmax.

`attend` is differentiable and stores no score matrix: the backward pass recomputes it, block of queries by block, from
the log-partition (FlashAttention, Dao et al. 2022). The G query heads that share a key/value head are folded into the
rows of one product, which is what makes small heads fast on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from gpt4moe.model.attention_backends import cudnn_attend, cudnn_fits, splash_attend, splash_fits
from gpt4moe.model.product import from_bits, product, product_nt, product_tn, to_bits
from gpt4moe.types import Array

# Queries of one block on a CPU: its block of scores stays in cache.
CPU_BLOCK = 128
# Every block is laid out in the program: this bounds its size.
MOST_CPU_BLOCKS = 16
# A finite stand-in for minus infinity: a query that sees nothing (padding) gets an average, not NaN.
MASKED = -1e30


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BTMH: Float[Array, "B T M H"],
    v_BTMH: Float[Array, "B T M H"],
    segment_ids_BT: Int[Array, "B T"],
    query_chunk: int,
    backend: str | None = None,
) -> Float[Array, "B T N H"]:
    """Returns y_BTNH: each token sees the tokens of its own segment up to itself; N must be a multiple of M.

    `backend` (None: the one in use) chooses the kernel: splash on a "tpu", cuDNN on a "gpu", each where it takes
    these shapes; otherwise blocks of `query_chunk` queries in plain XLA, as on several TPU devices, over which XLA
    cannot partition splash by itself.
    """
    one_device = jax.device_count() == 1
    backend = backend or ("xla" if jax.default_backend() == "tpu" and not one_device else jax.default_backend())
    if backend == "tpu" and splash_fits(q_BTNH):
        return splash_attend(q_BTNH, k_BTMH, v_BTMH, segment_ids_BT)
    if backend == "gpu" and cudnn_fits(q_BTNH):
        return cudnn_attend(q_BTNH, k_BTMH, v_BTMH, segment_ids_BT)
    block = cpu_block(q_BTNH.shape[1], query_chunk) if backend == "cpu" else query_chunk
    return attend_in_blocks(q_BTNH, k_BTMH, v_BTMH, segment_ids_BT, block)


def cpu_block(length: int, query_chunk: int) -> int:
    """Queries of a block on a CPU: few enough for the scores to stay in cache, at most `MOST_CPU_BLOCKS` blocks."""
    return min(query_chunk, max(CPU_BLOCK, -(-length // MOST_CPU_BLOCKS)))


def attend_in_blocks(
    q_BTNH: Float[Array, "B T N H"],
    k_BTMH: Float[Array, "B T M H"],
    v_BTMH: Float[Array, "B T M H"],
    segment_ids_BT: Int[Array, "B T"],
    query_chunk: int,
) -> Float[Array, "B T N H"]:
    """`attend` in plain XLA for any backend, a block of `query_chunk` queries and the keys before its end at a time."""
    kv_heads = k_BTMH.shape[2]
    q_BMTGH = _split_heads(q_BTNH, kv_heads)
    k_BMTH, v_BMTH = k_BTMH.swapaxes(1, 2), v_BTMH.swapaxes(1, 2)
    segments_BMT = jnp.broadcast_to(segment_ids_BT[:, None], k_BMTH.shape[:3])
    return _join_heads(_attend_folded(q_BMTGH, k_BMTH, v_BMTH, segments_BMT, query_chunk))


def attend_cached(
    q_BTNH: Float[Array, "B T N H"],
    keys_BSMH: Float[Array, "B S M H"],
    values_BSMH: Float[Array, "B S M H"],
    positions_BT: Int[Array, "B T"],
    query_chunk: int,
) -> Float[Array, "B T N H"]:
    """Returns y_BTNH: a query at position p sees slots 0..p of its row's cache. Has no fast backward pass."""
    length, kv_heads = q_BTNH.shape[1], keys_BSMH.shape[2]
    dtype = q_BTNH.dtype
    slots_S = jnp.arange(keys_BSMH.shape[1])

    def one_head(q_QGH: Array, k_SH: Array, v_SH: Array, positions_Q: Array) -> Array:
        scores_QGS = _masked_scores(q_QGH, k_SH, slots_S <= positions_Q[:, None])
        return _averages(jax.nn.softmax(scores_QGS, axis=-1).astype(dtype), v_SH).astype(dtype)

    q_BMTGH = _split_heads(q_BTNH, kv_heads)
    keys_BMSH, values_BMSH = (x.astype(dtype).swapaxes(1, 2) for x in (keys_BSMH, values_BSMH))
    positions_BMT = jnp.broadcast_to(positions_BT[:, None], (*keys_BMSH.shape[:2], length))
    chunks = [
        _over_heads(one_head, q_BMTGH[:, :, start:stop], keys_BMSH, values_BMSH, positions_BMT[:, :, start:stop])
        for start, stop in _blocks(length, query_chunk)
    ]
    return _join_heads(jnp.concatenate(chunks, axis=2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_folded(q_BMTGH: Array, k_BMTH: Array, v_BMTH: Array, segments_BMT: Array, query_chunk: int) -> Array:
    return _attend_forward(q_BMTGH, k_BMTH, v_BMTH, segments_BMT, query_chunk)[0]


def _attend_forward(q_BMTGH: Array, k_BMTH: Array, v_BMTH: Array, segments_BMT: Array, query_chunk: int):
    one_head = functools.partial(_forward_one_head, block=query_chunk)
    y_BMTGH, log_partition_BMTG = _over_heads(one_head, q_BMTGH, k_BMTH, v_BMTH, segments_BMT)
    return y_BMTGH, (q_BMTGH, k_BMTH, v_BMTH, segments_BMT, y_BMTGH, log_partition_BMTG)


def _attend_backward(query_chunk: int, residuals: tuple, dy_BMTGH: Array) -> tuple:
    one_head = functools.partial(_backward_one_head, block=query_chunk)
    dq, dk, dv = _over_heads(one_head, *residuals, dy_BMTGH)
    return dq, dk, dv, None


_attend_folded.defvjp(_attend_forward, _attend_backward)


def _forward_one_head(q_TGH: Array, k_TH: Array, v_TH: Array, segments_T: Array, block: int) -> tuple[Array, Array]:
    outputs, log_partitions = [], []
    for start, stop in _blocks(len(k_TH), block):
        visible_QS = _visible(segments_T, start, stop)
        scores_QGS = _masked_scores(q_TGH[start:stop], k_TH[:stop], visible_QS)
        largest_QG = jnp.max(scores_QGS, axis=-1)
        weights_QGS = jnp.exp(scores_QGS - largest_QG[..., None])
        partition_QG = jnp.sum(weights_QGS, axis=-1)
        y_QGH = _averages(weights_QGS.astype(q_TGH.dtype), v_TH[:stop]) / partition_QG[..., None]
        outputs.append(y_QGH.astype(q_TGH.dtype))
        log_partitions.append(largest_QG + jnp.log(partition_QG))
    return jnp.concatenate(outputs), jnp.concatenate(log_partitions)


def _backward_one_head(
    q_TGH: Array,
    k_TH: Array,
    v_TH: Array,
    segments_T: Array,
    y_TGH: Array,
    log_partition_TG: Array,
    dy_TGH: Array,
    block: int,
) -> tuple[Array, Array, Array]:
    dtype, scale = q_TGH.dtype, q_TGH.shape[-1] ** -0.5
    dk_TH, dv_TH = jnp.zeros(k_TH.shape, jnp.float32), jnp.zeros(v_TH.shape, jnp.float32)
    dq_blocks = []
    for start, stop in _blocks(len(k_TH), block):
        q_QGH, dy_QGH = q_TGH[start:stop], dy_TGH[start:stop]
        scores_QGS = _masked_scores(q_QGH, k_TH[:stop], _visible(segments_T, start, stop))
        weights_QGS = jnp.exp(scores_QGS - log_partition_TG[start:stop, :, None])
        dweights_QGS = _similarities(dy_QGH, v_TH[:stop])
        mean_QG = jnp.sum(dy_QGH.astype(jnp.float32) * y_TGH[start:stop].astype(jnp.float32), axis=-1)
        dscores_QGS = (weights_QGS * (dweights_QGS - mean_QG[..., None]) * scale).astype(dtype)
        dq_blocks.append(_averages(dscores_QGS, k_TH[:stop]).astype(dtype))
        dk_TH = dk_TH.at[:stop].add(_totals(dscores_QGS, q_QGH))
        dv_TH = dv_TH.at[:stop].add(_totals(weights_QGS.astype(dtype), dy_QGH))
    return jnp.concatenate(dq_blocks), dk_TH.astype(dtype), dv_TH.astype(dtype)


def _blocks(length: int, block: int) -> list[tuple[int, int]]:
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _visible(segments_T: Array, start: int, stop: int) -> Array:
    """Which of the keys 0..stop each query start..stop sees: [Q, S] bool."""
    causal_QS = jnp.arange(stop) <= jnp.arange(start, stop)[:, None]
    return causal_QS & (segments_T[start:stop, None] == segments_T[:stop])


def _masked_scores(q_QGH: Array, k_SH: Array, visible_QS: Array) -> Array:
    scores_QGS = _similarities(q_QGH, k_SH) * q_QGH.shape[-1] ** -0.5
    return jnp.where(visible_QS[:, None], scores_QGS, MASKED)


def _similarities(a_QGH: Array, b_SH: Array) -> Array:
    """QGH,SH->QGS"""
    a_2d = a_QGH.reshape(-1, a_QGH.shape[-1])
    return product_nt(a_2d, b_SH).reshape(*a_QGH.shape[:2], -1)


def _averages(weights_QGS: Array, v_SH: Array) -> Array:
    """QGS,SH->QGH"""
    return product(weights_QGS.reshape(-1, len(v_SH)), v_SH).reshape(*weights_QGS.shape[:2], -1)


def _totals(weights_QGS: Array, a_QGH: Array) -> Array:
    """QGS,QGH->SH"""
    return product_tn(*(x.reshape(-1, x.shape[-1]) for x in (weights_QGS, a_QGH)))


def _over_heads(one_head: Callable, *operands: Array):
    """Maps a function of one row's key/value head over the leading [B, M] of its operands.

    One after the other on a CPU, so that what is in flight stays in cache and no product is batched.
    """
    shape = operands[0].shape[:2]
    flat = [x.reshape(-1, *x.shape[2:]) for x in operands]
    results = jax.lax.platform_dependent(*flat, cpu=functools.partial(_in_turn, one_head), default=jax.vmap(one_head))
    return jax.tree.map(lambda y: y.reshape(*shape, *y.shape[1:]), results)


def _in_turn(one_head: Callable, *operands: Array):
    bits = jax.lax.map(lambda row: jax.tree.map(to_bits, one_head(*row)), operands)
    return jax.tree.map(from_bits, bits)


def _split_heads(q_BTNH: Array, kv_heads: int) -> Array:
    batch, length, heads, head_dim = q_BTNH.shape
    return q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).swapaxes(1, 2)


def _join_heads(y_BMTGH: Array) -> Array:
    batch, kv_heads, length, groups, head_dim = y_BMTGH.shape
    return y_BMTGH.swapaxes(1, 2).reshape(batch, length, kv_heads * groups, head_dim)
