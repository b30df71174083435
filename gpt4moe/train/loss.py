"""The training objective of one microbatch, in sums over global counts.

Every term is a sum over this microbatch divided by a count of the whole batch, so that adding up microbatches, or
shards, gives exactly the loss and gradient of the whole batch.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from gpt4moe.model.moe import MoeOut
from gpt4moe.model.product import product, product_nt, product_tn
from gpt4moe.model.transformer import Transformer
from gpt4moe.types import Array, Batch

# Vocabulary entries whose logits exist at once.
VOCAB_CHUNK = 2048


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossNormalizers:
    """Counts of the WHOLE batch, all microbatches and hosts: what the sums of a microbatch are divided by.

    target_weight: sum of the loss weights; tokens: tokens that are not padding; rows: rows with any such token.
    """

    target_weight: Float[Array, ""]
    tokens: Float[Array, ""]
    rows: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossOut:
    """Sums over a microbatch; adding those of all microbatches gives the batch's.

    cross_entropy: weighted nats; source_cross_entropy, source_weight: [num_sources] weighted nats and weights;
    load_balance (per row, summed over rows and layers), router_z (summed over tokens and layers); moe: per layer.
    """

    cross_entropy: Float[Array, ""]
    source_cross_entropy: Float[Array, " num_sources"]
    source_weight: Float[Array, " num_sources"]
    moe: MoeOut


def normalizers(batch: Batch) -> LossNormalizers:
    """Returns the counts of a batch of any leading shape ([B, T] or [microbatches, B, T])."""
    valid = batch.segment_ids > 0
    return LossNormalizers(
        target_weight=jnp.sum(batch.loss_weights, dtype=jnp.float32),
        tokens=jnp.sum(valid, dtype=jnp.float32),
        rows=jnp.sum(jnp.any(valid, axis=-1), dtype=jnp.float32),
    )


def batch_loss(
    model: Transformer, batch: Batch, weights: LossNormalizers, *, num_sources: int, dropless: bool = False
) -> tuple[Float32[Array, ""], LossOut]:
    """Returns this microbatch's share of the objective, to be differentiated, and its sums.

    objective = weighted cross-entropy in nats per unit of target weight
              + load_balance_weight * sum over layers of the mean over rows of E sum_e f_e P_e
              + router_z_weight * sum over layers of the mean over tokens of the squared log-partition.
    """
    x_BTD, out = model(batch.tokens, batch.positions, batch.segment_ids, dropless=dropless)
    nll_BT = cross_entropy(x_BTD, model.unembedding(), batch.targets)
    weighted_BT = nll_BT * batch.loss_weights
    total = jnp.sum(weighted_BT)
    moe = model.config.moe
    objective = (
        total / jnp.maximum(weights.target_weight, 1.0)
        + moe.load_balance_weight * jnp.sum(out.moe.load_balance) / jnp.maximum(weights.rows, 1.0)
        + moe.router_z_weight * jnp.sum(out.moe.router_z) / jnp.maximum(weights.tokens, 1.0)
    )
    by_source = functools.partial(jax.ops.segment_sum, segment_ids=batch.source_ids.ravel(), num_segments=num_sources)
    sums = LossOut(
        cross_entropy=total,
        source_cross_entropy=by_source(weighted_BT.ravel()),
        source_weight=by_source(batch.loss_weights.ravel()),
        moe=out.moe,
    )
    return objective, jax.lax.stop_gradient(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(
    x_BTD: Float[Array, "B T D"],
    weight_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    chunk: int = VOCAB_CHUNK,
) -> Float32[Array, "B T"]:
    """Returns nll_BT float32, -log softmax(x weight^T)[target], with logits of `chunk` vocabulary entries at a time.

    The backward pass computes each chunk of logits again, so that [B, T, V] is never stored.
    """
    return _cross_entropy_forward(x_BTD, weight_VD, targets_BT, chunk)[0]


def _cross_entropy_forward(x_BTD: Array, weight_VD: Array, targets_BT: Array, chunk: int) -> tuple[Array, tuple]:
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
    return log_partition_BT - target_logit_BT, (x_BTD, weight_VD, targets_BT, log_partition_BT)


def _cross_entropy_backward(chunk: int, residuals: tuple, dnll_BT: Array) -> tuple:
    x_BTD, weight_VD, targets_BT, log_partition_BT = residuals
    x_UD = x_BTD.reshape(-1, x_BTD.shape[-1])
    dx_UD = jnp.zeros(x_UD.shape, jnp.float32)
    dweight_chunks = []
    for start in range(0, len(weight_VD), chunk):
        logits_BTV, is_target_BTV = _chunk_logits(x_BTD, weight_VD, targets_BT, start, chunk)
        probabilities_BTV = jnp.exp(logits_BTV - log_partition_BT[..., None])
        dlogits_BTV = ((probabilities_BTV - is_target_BTV) * dnll_BT[..., None]).astype(x_BTD.dtype)
        dlogits_UV = dlogits_BTV.reshape(len(x_UD), -1)
        dx_UD += product(dlogits_UV, weight_VD[start : start + chunk].astype(x_BTD.dtype))
        dweight_chunks.append(product_tn(dlogits_UV, x_UD))
    dweight_VD = jnp.concatenate(dweight_chunks).astype(weight_VD.dtype)
    return dx_UD.astype(x_BTD.dtype).reshape(x_BTD.shape), dweight_VD, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _chunk_logits(x_BTD: Array, weight_VD: Array, targets_BT: Array, start: int, chunk: int) -> tuple[Array, Array]:
    weight_chunk = weight_VD[start : start + chunk].astype(x_BTD.dtype)
    logits_UV = product_nt(x_BTD.reshape(-1, x_BTD.shape[-1]), weight_chunk)
    logits_BTV = logits_UV.reshape(*targets_BT.shape, -1)
    return logits_BTV, targets_BT[..., None] == start + jnp.arange(len(weight_chunk))
