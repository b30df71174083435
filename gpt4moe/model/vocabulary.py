"""Cross-entropy over the vocabulary without ever storing all logits.

In: final hidden states, the unembedding matrix or a slice of its rows, targets. Out: nats a target. What is local to a
slice (`log_partition_and_target`) is apart from what joins slices: a split vocabulary needs no other arithmetic.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from gpt4moe.model.product import product, product_nt, product_tn
from gpt4moe.types import Array

# Vocabulary entries whose logits exist at once.
VOCAB_CHUNK = 2048


def cross_entropy(
    x_BTD: Float[Array, "B T D"],
    weight_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    chunk: int = VOCAB_CHUNK,
) -> Float32[Array, "B T"]:
    """Returns nll_BT float32, -log softmax(x weight^T)[target], with logits of `chunk` vocabulary entries at a time."""
    log_partition_BT, target_logit_BT = log_partition_and_target(x_BTD, weight_VD, targets_BT, chunk)
    return log_partition_BT - target_logit_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def log_partition_and_target(
    x_BTD: Float[Array, "B T D"],
    weight_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    chunk: int = VOCAB_CHUNK,
) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
    """Returns log sum_v exp(logit_v) and the target's logit, 0 for a target outside 0..V-1.

    The backward pass computes each chunk of logits again, so that [B, T, V] is never stored.
    """
    return _forward(x_BTD, weight_VD, targets_BT, chunk)[0]


def _forward(x_BTD: Array, weight_VD: Array, targets_BT: Array, chunk: int) -> tuple[tuple[Array, Array], tuple]:
    largest_BT = jnp.full(targets_BT.shape, -jnp.inf, jnp.float32)
    partition_BT = jnp.zeros(targets_BT.shape, jnp.float32)
    target_logit_BT = jnp.zeros(targets_BT.shape, jnp.float32)
    for start in range(0, len(weight_VD), chunk):
        logits_BTV, is_target_BTV = _chunk_logits(x_BTD, weight_VD, targets_BT, start, chunk)
        larger_BT = jnp.maximum(largest_BT, jnp.max(logits_BTV, axis=-1))
        partition_BT *= jnp.exp(largest_BT - larger_BT)
        partition_BT += jnp.sum(jnp.exp(logits_BTV - larger_BT[..., None]), axis=-1)
        target_logit_BT += jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
        largest_BT = larger_BT
    log_partition_BT = largest_BT + jnp.log(partition_BT)
    return (log_partition_BT, target_logit_BT), (x_BTD, weight_VD, targets_BT, log_partition_BT)


def _backward(chunk: int, residuals: tuple, gradients: tuple[Array, Array]) -> tuple:
    x_BTD, weight_VD, targets_BT, log_partition_BT = residuals
    dlog_partition_BT1, dtarget_BT1 = (gradient[..., None] for gradient in gradients)
    x_UD = x_BTD.reshape(-1, x_BTD.shape[-1])
    dx_UD = jnp.zeros(x_UD.shape, jnp.float32)
    dweight_chunks = []
    for start in range(0, len(weight_VD), chunk):
        logits_BTV, is_target_BTV = _chunk_logits(x_BTD, weight_VD, targets_BT, start, chunk)
        probabilities_BTV = jnp.exp(logits_BTV - log_partition_BT[..., None])
        dlogits_BTV = probabilities_BTV * dlog_partition_BT1 + is_target_BTV * dtarget_BT1
        dlogits_UV = dlogits_BTV.astype(x_BTD.dtype).reshape(len(x_UD), -1)
        dx_UD += product(dlogits_UV, weight_VD[start : start + chunk].astype(x_BTD.dtype))
        dweight_chunks.append(product_tn(dlogits_UV, x_UD))
    dweight_VD = jnp.concatenate(dweight_chunks).astype(weight_VD.dtype)
    return dx_UD.astype(x_BTD.dtype).reshape(x_BTD.shape), dweight_VD, None


log_partition_and_target.defvjp(_forward, _backward)


def _chunk_logits(x_BTD: Array, weight_VD: Array, targets_BT: Array, start: int, chunk: int) -> tuple[Array, Array]:
    weight_chunk = weight_VD[start : start + chunk].astype(x_BTD.dtype)
    logits_UV = product_nt(x_BTD.reshape(-1, x_BTD.shape[-1]), weight_chunk)
    logits_BTV = logits_UV.reshape(*targets_BT.shape, -1)
    return logits_BTV, targets_BT[..., None] == start + jnp.arange(len(weight_chunk))
