"""The training objective of one microbatch, in sums over global counts.

Every term is a sum over this microbatch divided by a count of the whole batch, so that adding up microbatches, or
shards, gives exactly the loss and gradient of the whole batch.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int, Key

from gpt4moe.model.cross_attention import Media
from gpt4moe.model.moe import MoeOut
from gpt4moe.model.transformer import Transformer
from gpt4moe.train import balance
from gpt4moe.train.spelling import spelling_nats
from gpt4moe.types import Array, Batch


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
    load_balance: [L], the batch's loss by layer as `train.balance` has it, no sum but a share; moe: sums per layer.
    idle_slots: as in `TransformerOut`. spelling: nats of `train.spelling`; None where nothing is spelled.
    """

    cross_entropy: Float[Array, ""]
    source_cross_entropy: Float[Array, " num_sources"]
    source_weight: Float[Array, " num_sources"]
    load_balance: Float[Array, " L"]
    moe: MoeOut
    idle_slots: Int[Array, 2] | None = None
    spelling: Float[Array, ""] | None = None


def normalizers(batch: Batch) -> LossNormalizers:
    """Returns the counts of a batch of any leading shape ([B, T] or [microbatches, B, T])."""
    valid = batch.segment_ids > 0
    return LossNormalizers(
        target_weight=jnp.sum(batch.loss_weights, dtype=jnp.float32),
        tokens=jnp.sum(valid, dtype=jnp.float32),
        rows=jnp.sum(jnp.any(valid, axis=-1), dtype=jnp.float32),
    )


def look(model: Transformer, batch: Batch) -> Media | None:
    """Returns the images of a batch as `model` sees them; None where the batch has none."""
    if batch.images is None:
        return None
    return model.look(batch.images, batch.image_valid, batch.image_index, batch.first_image)


def batch_loss(
    model: Transformer,
    batch: Batch,
    weights: LossNormalizers,
    *,
    num_sources: int,
    key: Key[Array, ""] | None = None,
    load_so_far_LE: Int[Array, "L E"] | None = None,
    with_choices: bool = False,
) -> tuple[Float32[Array, ""], LossOut]:
    """Returns this microbatch's share of the objective, to be differentiated, and its sums.

    objective = weighted cross-entropy in nats per unit of target weight
              + load_balance_weight * sum over layers of E sum_e f_e P_e, taken over what `load_balance_scope` says
              + router_z_weight * sum over layers of the mean over tokens of the squared log-partition.
              + spelling's weight * nats of what the features of images spell, per unit of target weight.
    `key` is for routers that draw at random; `load_so_far_LE` has the assignments of the batch's earlier microbatches;
    `with_choices` reports those of every token in `moe`.
    """
    keys_B2 = None if key is None else jax.random.key_data(jax.random.split(key, len(batch.tokens)))
    given = {"keys_B2": keys_B2, "replay_ids_BTLK": batch.replay_ids, "with_choices": with_choices}
    media = look(model, batch)
    x_BTD, out = model(batch.tokens, batch.positions, batch.segment_ids, media=media, **given)
    nll_BT = model.layout.cross_entropy(x_BTD, model.unembedding(), batch.targets)
    weighted_BT = nll_BT * batch.loss_weights
    total = jnp.sum(weighted_BT)
    moe = model.config.moe
    balance_L = balance.load_balance(out.moe, moe, weights.rows, weights.tokens, load_so_far_LE)
    objective = (
        total / jnp.maximum(weights.target_weight, 1.0)
        + moe.load_balance_weight * jnp.sum(balance_L)
        + moe.router_z_weight * jnp.sum(out.moe.router_z) / jnp.maximum(weights.tokens, 1.0)
    )
    spelled = _spelling(model, media, batch)
    if spelled is not None:
        objective += model.config.vision.spelling.weight * spelled / jnp.maximum(weights.target_weight, 1.0)
    by_source = functools.partial(jax.ops.segment_sum, segment_ids=batch.source_ids.ravel(), num_segments=num_sources)
    sums = LossOut(
        cross_entropy=total,
        source_cross_entropy=by_source(weighted_BT.ravel()),
        source_weight=by_source(batch.loss_weights.ravel()),
        load_balance=balance_L,
        moe=out.moe,
        idle_slots=out.idle_slots,
        spelling=spelled,
    )
    return objective, jax.lax.stop_gradient(sums)


def _spelling(model: Transformer, media: Media | None, batch: Batch) -> Float32[Array, ""] | None:
    if model.config.vision is None or model.config.vision.spelling is None:
        return None
    if media is None:
        return jnp.float32(0)
    return spelling_nats(model.spelling(media.features_BIRD), media.valid_BIR, batch)
