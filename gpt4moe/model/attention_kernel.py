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
# So few are a token or what is proposed behind it, in decoding: then the keys and values of a row are what takes time.
FEW_QUERIES = 4
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
    these shapes; otherwise blocks of `query_chunk` queries in plain XLA. All work on what one device holds.
    """
    backend = backend or jax.default_backend()
    if backend == "tpu" and splash_fits(q_BTNH):
        return splash_attend(q_BTNH, k_BTMH, v_BTMH, segment_ids_BT)
    if backend == "gpu" and cudnn_fits(q_BTNH):
        return cudnn_attend(q_BTNH, k_BTMH, v_BTMH, segment_ids_BT)
    block = queries_of_block(q_BTNH.shape[1], query_chunk, backend)
    return attend_in_blocks(q_BTNH, k_BTMH, v_BTMH, segment_ids_BT, block)


def queries_of_block(length: int, query_chunk: int, backend: str) -> int:
    """`query_chunk`, or on a CPU fewer, whose scores stay in cache, in `MOST_CPU_BLOCKS` blocks at most."""
    return query_chunk if backend != "cpu" else min(query_chunk, max(CPU_BLOCK, -(-length // MOST_CPU_BLOCKS)))


def attend_in_blocks(
    q_BTNH: Float[Array, "B T N H"],
    k_BTMH: Float[Array, "B T M H"],
    v_BTMH: Float[Array, "B T M H"],
    segment_ids_BT: Int[Array, "B T"],
    query_chunk: int,
) -> Float[Array, "B T N H"]:
    """`attend` in plain XLA for any backend, a block of `query_chunk` queries and the keys before its end at a time."""
    return _folded(q_BTNH, k_BTMH, v_BTMH, segment_ids_BT, segment_ids_BT, None, query_chunk)


def attend_part(
    q_BTNH: Float[Array, "B T N H"],
    k_BSMH: Float[Array, "B S M H"],
    v_BSMH: Float[Array, "B S M H"],
    query_segments_BT: Int[Array, "B T"],
    key_segments_BS: Int[Array, "B S"],
    first: Int[Array, ""],
    query_chunk: int,
) -> Float[Array, "B T N H"]:
    """`attend_in_blocks` for the queries `first`..`first`+T-1 of rows of S tokens, whose keys are all here.

    Which keys a block of queries sees is known only as the program runs, so that every block goes over all keys.
    """
    return _folded(q_BTNH, k_BSMH, v_BSMH, query_segments_BT, key_segments_BS, first, query_chunk)


def attend_across(
    q_BTNH: Float[Array, "B T N H"],
    k_BSMH: Float[Array, "B S M H"],
    v_BSMH: Float[Array, "B S M H"],
    numbers_BT2: Int[Array, "B T 2"],
    number_BS: Int[Array, "B S"],
    query_chunk: int,
    backend: str | None = None,
) -> Float[Array, "B T N H"]:
    """Returns y_BTNH: each query sees the keys whose number is from the first to the second of its own two.

    One that sees none gets an average of no meaning. `backend` as in `attend`.
    """
    backend = backend or jax.default_backend()
    if backend == "cpu" and q_BTNH.shape[1] <= FEW_QUERIES:
        return jax.lax.map(lambda row: _attend_few(*row), (q_BTNH, k_BSMH, v_BSMH, numbers_BT2, number_BS))
    block = queries_of_block(q_BTNH.shape[1], query_chunk, backend)
    behind_all = jnp.int32(k_BSMH.shape[1])  # nothing is later than a query
    return _folded(q_BTNH, k_BSMH, v_BSMH, numbers_BT2, number_BS, behind_all, block)


def _folded(q_BTNH: Array, k_BSMH: Array, v_BSMH: Array, of_queries_BT: Array, of_keys_BS: Array, first, chunk: int):
    kv_heads = k_BSMH.shape[2]
    q_BMTGH = _split_heads(q_BTNH, kv_heads)
    k_BMSH, v_BMSH = k_BSMH.swapaxes(1, 2), v_BSMH.swapaxes(1, 2)
    segments = [
        jnp.broadcast_to(ids[:, None], (len(ids), kv_heads, *ids.shape[1:])) for ids in (of_queries_BT, of_keys_BS)
    ]
    return _join_heads(_attend_folded(q_BMTGH, k_BMSH, v_BMSH, *segments, first, chunk))


def _attend_few(q_TNH: Array, k_SMH: Array, v_SMH: Array, numbers_T2: Array, number_S: Array) -> Array:
    """`attend_across` of one row, keys and values as they lie: to bring heads forward would cost more than the rest.

    All heads are one product, in which a query is nought beside the keys of heads that are not its own.
    """
    (length, heads, head_dim), (keys, kv_heads) = q_TNH.shape, k_SMH.shape[:2]
    own_M1M1 = jnp.eye(kv_heads, dtype=q_TNH.dtype)[:, None, :, None]
    q_TMG1H = q_TNH.reshape(length, kv_heads, -1, 1, head_dim)
    apart_QF = (q_TMG1H * own_M1M1).reshape(length * heads, -1)
    scores_SQ = product(k_SMH.reshape(keys, -1), apart_QF.T) * head_dim**-0.5
    visible_TS = _within(numbers_T2[:, None], number_S)
    scores_QS = jnp.where(jnp.repeat(visible_TS, heads, axis=0), scores_SQ.T, MASKED)
    weights_QS = jax.nn.softmax(scores_QS, axis=-1).astype(q_TNH.dtype)
    mixed_QF = product(weights_QS, v_SMH.reshape(keys, -1))
    y_TMGMH = mixed_QF.reshape(length, kv_heads, -1, kv_heads, head_dim) * own_M1M1
    return jnp.sum(y_TMGMH, axis=3).reshape(q_TNH.shape).astype(q_TNH.dtype)


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
        for start, stop, _ in _blocks(length, length, None, query_chunk)
    ]
    return _join_heads(jnp.concatenate(chunks, axis=2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend_folded(
    q_BMTGH: Array, k_BMSH: Array, v_BMSH: Array, of_queries_BMT, of_keys_BMS, first, chunk: int
) -> Array:
    return _attend_forward(q_BMTGH, k_BMSH, v_BMSH, of_queries_BMT, of_keys_BMS, first, chunk)[0]


def _attend_forward(q_BMTGH: Array, k_BMSH: Array, v_BMSH: Array, of_queries_BMT, of_keys_BMS, first, chunk: int):
    one_head = functools.partial(_forward_one_head, first=first, block=chunk)
    operands = (q_BMTGH, k_BMSH, v_BMSH, of_queries_BMT, of_keys_BMS)
    y_BMTGH, log_partition_BMTG = _over_heads(one_head, *operands)
    return y_BMTGH, (operands, first, y_BMTGH, log_partition_BMTG)


def _attend_backward(chunk: int, residuals: tuple, dy_BMTGH: Array) -> tuple:
    operands, first, *results = residuals
    one_head = functools.partial(_backward_one_head, first=first, block=chunk)
    dq, dk, dv = _over_heads(one_head, *operands, *results, dy_BMTGH)
    return dq, dk, dv, None, None, None


_attend_folded.defvjp(_attend_forward, _attend_backward)


def _forward_one_head(
    q_TGH: Array, k_SH: Array, v_SH: Array, of_queries_T: Array, of_keys_S: Array, *, first: Array | None, block: int
) -> tuple[Array, Array]:
    outputs, log_partitions = [], []
    for start, stop, seen in _blocks(len(q_TGH), len(k_SH), first, block):
        visible_QS = _visible(of_queries_T[start:stop], of_keys_S[:seen], start, first)
        scores_QGS = _masked_scores(q_TGH[start:stop], k_SH[:seen], visible_QS)
        largest_QG = jnp.max(scores_QGS, axis=-1)
        weights_QGS = jnp.exp(scores_QGS - largest_QG[..., None])
        partition_QG = jnp.sum(weights_QGS, axis=-1)
        y_QGH = _averages(weights_QGS.astype(q_TGH.dtype), v_SH[:seen]) / partition_QG[..., None]
        outputs.append(y_QGH.astype(q_TGH.dtype))
        log_partitions.append(largest_QG + jnp.log(partition_QG))
    return jnp.concatenate(outputs), jnp.concatenate(log_partitions)


def _backward_one_head(
    q_TGH: Array,
    k_SH: Array,
    v_SH: Array,
    of_queries_T: Array,
    of_keys_S: Array,
    y_TGH: Array,
    log_partition_TG: Array,
    dy_TGH: Array,
    *,
    first: Array | None,
    block: int,
) -> tuple[Array, Array, Array]:
    dtype, scale = q_TGH.dtype, q_TGH.shape[-1] ** -0.5
    dk_SH, dv_SH = jnp.zeros(k_SH.shape, jnp.float32), jnp.zeros(v_SH.shape, jnp.float32)
    dq_blocks = []
    for start, stop, seen in _blocks(len(q_TGH), len(k_SH), first, block):
        q_QGH, dy_QGH = q_TGH[start:stop], dy_TGH[start:stop]
        visible_QS = _visible(of_queries_T[start:stop], of_keys_S[:seen], start, first)
        weights_QGS = jnp.exp(_masked_scores(q_QGH, k_SH[:seen], visible_QS) - log_partition_TG[start:stop, :, None])
        dweights_QGS = _similarities(dy_QGH, v_SH[:seen])
        mean_QG = jnp.sum(dy_QGH.astype(jnp.float32) * y_TGH[start:stop].astype(jnp.float32), axis=-1)
        dscores_QGS = (weights_QGS * (dweights_QGS - mean_QG[..., None]) * scale).astype(dtype)
        dq_blocks.append(_averages(dscores_QGS, k_SH[:seen]).astype(dtype))
        dk_SH = dk_SH.at[:seen].add(_totals(dscores_QGS, q_QGH))
        dv_SH = dv_SH.at[:seen].add(_totals(weights_QGS.astype(dtype), dy_QGH))
    return jnp.concatenate(dq_blocks), dk_SH.astype(dtype), dv_SH.astype(dtype)


def _blocks(queries: int, keys: int, first: Array | None, block: int) -> list[tuple[int, int, int]]:
    """(start, stop, keys that may be seen) of each block of queries; `first` None: queries begin where keys do."""
    bounds = [(start, min(start + block, queries)) for start in range(0, queries, block)]
    return [(start, stop, stop if first is None else keys) for start, stop in bounds]


def _visible(of_queries_Q: Array, of_keys_S: Array, start: int, first: Array | None) -> Array:
    """Which keys 0..S each of the block's queries sees, [Q, S] bool; its first is number `first` + `start`.

    Those that say the same, or something from the first to the second of what a query says.
    """
    place_Q = jnp.arange(len(of_queries_Q)) + start + (0 if first is None else first)
    says_Q1 = of_queries_Q[:, None]
    meant_QS = says_Q1 == of_keys_S if of_queries_Q.ndim == 1 else _within(says_Q1, of_keys_S)
    return (jnp.arange(len(of_keys_S)) <= place_Q[:, None]) & meant_QS


def _within(numbers_Q12: Array, number_S: Array) -> Array:
    return (numbers_Q12[..., 0] <= number_S) & (number_S <= numbers_Q12[..., 1])


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
