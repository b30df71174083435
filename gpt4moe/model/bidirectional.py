"""Attention without a causal mask, where every query sees every valid key, and its weights where a mask says which."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32

from gpt4moe.model.attention_backends import cudnn_fits
from gpt4moe.model.attention_kernel import MASKED
from gpt4moe.types import Array


def attend_all(
    q_BTNH: Float[Array, "B T N H"],
    k_BSNH: Float[Array, "B S N H"],
    v_BSNH: Float[Array, "B S N H"],
    valid_BS: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Returns y_BTNH, softmax(q k^T / sqrt(H)) v over the valid keys (None: all are) with a float32 softmax.

    cuDNN's fused attention on a GPU where it takes these shapes and no key is masked: it has no mask for rows of odd
    length, such as patches after a class token. Otherwise plain XLA, whose backward pass recomputes the scores.
    """
    if valid_BS is None and jax.default_backend() == "gpu" and cudnn_fits(q_BTNH):
        return jax.nn.dot_product_attention(q_BTNH, k_BSNH, v_BSNH, implementation="cudnn")
    return _attend_in_xla(q_BTNH, k_BSNH, v_BSNH, valid_BS)


def weights_across(
    q_BTNH: Float[Array, "B T N H"], k_BSMH: Float[Array, "B S M H"], visible_BTS: Bool[Array, "B T S"]
) -> Float32[Array, "B T N S"]:
    """Returns the weights by which `attend_across` averages, of all queries at once: to be looked at."""
    q_BTMGH = q_BTNH.reshape(*q_BTNH.shape[:2], k_BSMH.shape[2], -1, q_BTNH.shape[-1])
    k_BSMH = k_BSMH.astype(q_BTNH.dtype)
    scores_BMGTS = jnp.einsum("BTMGH,BSMH->BMGTS", q_BTMGH, k_BSMH, preferred_element_type=jnp.float32)
    scores_BMGTS = jnp.where(visible_BTS[:, None, None], scores_BMGTS * q_BTNH.shape[-1] ** -0.5, MASKED)
    return jnp.moveaxis(jax.nn.softmax(scores_BMGTS, axis=-1), 3, 1).reshape(*q_BTNH.shape[:3], -1)


@jax.checkpoint
def _attend_in_xla(q_BTNH: Array, k_BSNH: Array, v_BSNH: Array, valid_BS: Array | None) -> Array:
    # XLA:CPU has no batched product in bfloat16 and would convert inside the product's loop.
    operand = jnp.float32 if jax.default_backend() == "cpu" else q_BTNH.dtype
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores_BNTS = einsum("BTNH,BSNH->BNTS", q_BTNH.astype(operand), k_BSNH.astype(operand)) * q_BTNH.shape[-1] ** -0.5
    if valid_BS is not None:
        scores_BNTS = jnp.where(valid_BS[:, None, None], scores_BNTS, MASKED)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(operand)
    return einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH.astype(operand)).astype(q_BTNH.dtype)
