"""Attention of tokens to the keys and values of their rows' pages: a float32 softmax over every position up to theirs.

Single tokens of many rows and chunks of few rows want different products: of a token there is a row of scores a head,
too little for a product of its own, so that rows are multiplied as one batch; a chunk's are taken in turn.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Float, Int

from gpt4moe.model.attention_kernel import MASKED, attend_cached
from gpt4moe.types import Array

# Tokens of a row up to which rows are multiplied as a batch.
FEW_TOKENS = 8


def attend(
    q_BTNH: Float[Array, "B T N H"],
    keys_BSMH: Float[Array, "B S M H"],
    values_BSMH: Float[Array, "B S M H"],
    positions_BT: Int[Array, "B T"],
    query_chunk: int,
) -> Float[Array, "B T N H"]:
    """Returns y_BTNH: a query at position p sees slots 0..p of its row."""
    if q_BTNH.shape[1] > FEW_TOKENS:
        return attend_cached(q_BTNH, keys_BSMH, values_BSMH, positions_BT, query_chunk)
    rows, length, heads, head_dim = q_BTNH.shape
    kv_heads = keys_BSMH.shape[2]
    # In float32: XLA:CPU has no batched product in bfloat16, and reading pages converts them for nothing.
    q_BTMGH = q_BTNH.astype(jnp.float32).reshape(rows, length, kv_heads, heads // kv_heads, head_dim)
    scores_BMTGS = jnp.einsum("BTMGH,BSMH->BMTGS", q_BTMGH, keys_BSMH.astype(jnp.float32)) * head_dim**-0.5
    visible_BTS = jnp.arange(keys_BSMH.shape[1]) <= positions_BT[..., None]
    scores_BMTGS = jnp.where(visible_BTS[:, None, :, None], scores_BMTGS, MASKED)
    weights_BMTGS = jnp.exp(scores_BMTGS - jnp.max(scores_BMTGS, axis=-1, keepdims=True))
    total_BMTG = jnp.sum(weights_BMTGS, axis=-1)
    sums_BMTGH = jnp.einsum("BMTGS,BSMH->BMTGH", weights_BMTGS, values_BSMH.astype(jnp.float32))
    y_BTMGH = jnp.moveaxis(sums_BMTGH / total_BMTG[..., None], 2, 1)
    return y_BTMGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)
