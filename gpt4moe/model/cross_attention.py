"""Gated cross-attention: what tokens read of the images before them (Alayrac et al. 2022, figure 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Float32, Int

from gpt4moe.config.model import ModelConfig
from gpt4moe.config.vision import CrossAttentionConfig
from gpt4moe.model.attention_kernel import attend_across
from gpt4moe.model.bidirectional import weights_across
from gpt4moe.model.layers import (
    FeedForward,
    LayerNorm,
    RMSNorm,
    Slots,
    activation,
    depth_scale,
    filled_parameter,
    matmul,
    normal_parameter,
    normed,
)
from gpt4moe.model.resampler import Resampler
from gpt4moe.model.vision import VisionEncoder
from gpt4moe.types import Array

STACK = "cross_layers"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Media:
    """The images of the rows and which of them each token sees.

    features_BIRD: what the resampler or the encoder made of every image, R features each; valid_BIR: which there are.
    A token sees images first_image_BT .. image_index_BT of its row, none where image_index is -1. keys, values: those
    of every block of cross-attention, [L, B, S, M, H] with S = I * R, kept while decoding; None where they follow from
    the features.
    """

    features_BIRD: Float[Array, "B I R D"]
    valid_BIR: Bool[Array, "B I R"]
    image_index_BT: Int[Array, "B T"]
    first_image_BT: Int[Array, "B T"]
    keys: Float[Array, "L B S M H"] | None = None
    values: Float[Array, "L B S M H"] | None = None

    def seen(self) -> tuple[Int[Array, "B T 2"], Int[Array, "B S"]]:
        """Returns the first and the last image that each token sees, and whose each feature is, -2 of one not there."""
        images, features = self.valid_BIR.shape[1:]
        images_BT2 = jnp.stack([self.first_image_BT, self.image_index_BT], axis=-1)
        image_IR = jnp.broadcast_to(jnp.arange(images)[:, None], (images, features))
        return images_BT2, jnp.where(self.valid_BIR, image_IR, -2).reshape(len(self.valid_BIR), -1)

    def sees_any_BT(self) -> Bool[Array, "B T"]:
        """Returns which tokens see a feature."""
        there_BI = jnp.any(self.valid_BIR, axis=-1)
        image_I = jnp.arange(there_BI.shape[1])
        until, since = self.image_index_BT[..., None], self.first_image_BT[..., None]
        return jnp.any((since <= image_I) & (image_I <= until) & there_BI[:, None], axis=-1)

    def visible_BTS(self) -> Bool[Array, "B T S"]:
        """Returns which features each token sees."""
        images_BT2, image_BS = self.seen()
        since, until = images_BT2[..., :1], images_BT2[..., 1:]
        return (since <= image_BS[:, None]) & (image_BS[:, None] <= until)


def look(
    encoder: VisionEncoder,
    resampler: Resampler | None,
    sees: str,
    images: Array,
    image_valid: Bool[Array, "B I *frames"],
    image_index_BT: Int[Array, "B T"],
    first_image_BT: Int[Array, "B T"],
) -> Media:
    """Returns what every token sees of the images, all as `types.Batch` has them (float pixels are normalised).

    sees: of `CrossAttentionConfig`, the latest image or all of them.
    """
    is_clip = images.ndim == 6
    clips, frames = (images, image_valid) if is_clip else (images[:, :, None], image_valid[:, :, None])
    x_BIFPD = encoder(clips)
    if resampler is not None:
        features_BIRD = resampler(x_BIFPD, frames)
        valid_BIR = jnp.broadcast_to(jnp.any(frames, axis=-1)[..., None], features_BIRD.shape[:3])
    else:
        features_BIRD = x_BIFPD.reshape(*x_BIFPD.shape[:2], -1, x_BIFPD.shape[-1])
        valid_BIR = jnp.repeat(frames, x_BIFPD.shape[3], axis=2)
    return Media(features_BIRD, valid_BIR, image_index_BT, first_image_BT if sees == "all" else image_index_BT)


class GatedCrossAttention(nnx.Module):
    """query [D, N, H], key and value [encoder's dim, M, H], output [N, H, D], a feed-forward, and a gate of each.

    The gates are scalars, or vectors [D].
    """

    def __init__(
        self, layers: Slots | None, config: ModelConfig, rngs: nnx.Rngs, attend_across: Callable = attend_across
    ):
        cross, dim, features = config.vision.cross_attention, config.model_dim, config.vision.encoder.dim
        heads, kv_heads, head_dim = cross.num_heads, cross.kv_heads, cross.head_dim
        out_scale = depth_scale(config.num_layers)

        def norm(width: int, kind: str) -> nnx.Module:
            return (RMSNorm if kind == "rms" else LayerNorm)(layers, width, config.norm_epsilon, stack=STACK)

        def matrix(shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
            return normal_parameter(rngs, layers, shape, axes, std, stack=STACK)

        query_axes, kv_axes = ("embed", "heads", "head_dim"), ("vision_embed", "kv_heads", "head_dim")
        self.attention_norm, self.feed_forward_norm = norm(dim, cross.norm), norm(dim, cross.norm)
        self.query = matrix((dim, heads, head_dim), query_axes, dim**-0.5)
        self.key = matrix((features, kv_heads, head_dim), kv_axes, features**-0.5)
        self.value = matrix((features, kv_heads, head_dim), kv_axes, features**-0.5)
        output_std = (heads * head_dim) ** -0.5 * out_scale
        self.output = matrix((heads, head_dim, dim), ("heads", "head_dim", "embed"), output_std)
        self.query_norm = norm(head_dim, "rms") if cross.qk_norm else None
        self.key_norm = norm(head_dim, "rms") if cross.qk_norm else None
        function = None if cross.activation is None else activation(cross.activation)
        given = {"activation": function, "stack": STACK}
        self.dense = FeedForward(layers, dim, cross.hidden_dim, function is None, out_scale, rngs, **given)
        self.attention_gate, self.feed_forward_gate = (_gate(layers, dim, cross) for _ in range(2))
        self.attend = attend_across
        self.without_image, self.query_chunk = cross.feed_forward_without_image, config.attention.query_chunk

    def __call__(
        self, x_BTD: Float[Array, "B T D"], media: Media, keys_values: tuple[Array, Array] | None = None
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream with what its tokens read; one that sees no image is left as it is.

        `keys_values` are this layer's ([B, S, M, H] each) where they are kept.
        """
        keys, values = self.keys_values(media.features_BIRD) if keys_values is None else keys_values
        images_BT2, image_BS = media.seen()
        q_BTNH = self._queries(x_BTD)
        keys, values = keys.astype(q_BTNH.dtype), values.astype(q_BTNH.dtype)
        read_BTNH = self.attend(q_BTNH, keys, values, images_BT2, image_BS, self.query_chunk)
        sees_BT1 = media.sees_any_BT()[..., None]
        read_BTD = _gated(self.attention_gate, matmul(read_BTNH, self.output[...], 2))
        x_BTD = x_BTD + jnp.where(sees_BT1, read_BTD, 0)
        made_BTD = _gated(self.feed_forward_gate, self.dense(self.feed_forward_norm(x_BTD)))
        return x_BTD + (made_BTD if self.without_image else jnp.where(sees_BT1, made_BTD, 0))

    def keys_values(self, features_BIRD: Float[Array, "B I R D"]) -> tuple[Array, Array]:
        """Returns keys and values [B, S, M, H] of the features of a row's images."""
        features_BSD = features_BIRD.reshape(len(features_BIRD), -1, features_BIRD.shape[-1])
        keys_BSMH = normed(self.key_norm, matmul(features_BSD, self.key[...]))
        return keys_BSMH, matmul(features_BSD, self.value[...])

    def weights(self, x_BTD: Float[Array, "B T D"], media: Media) -> Float32[Array, "B T N S"]:
        """Returns by what weights the heads of every token average the values of features, 0 where it sees none."""
        visible_BTS = media.visible_BTS()
        keys_BSMH, _ = self.keys_values(media.features_BIRD)
        weights_BTNS = weights_across(self._queries(x_BTD), keys_BSMH, visible_BTS)
        return jnp.where(visible_BTS[:, :, None], weights_BTNS, 0.0)

    def _queries(self, x_BTD: Array) -> Array:
        return normed(self.query_norm, matmul(self.attention_norm(x_BTD), self.query[...]))


def _gate(layers: Slots | None, dim: int, cross: CrossAttentionConfig) -> nnx.Param:
    shape, axes = ((dim,), ("norm",)) if cross.gate == "vector" else ((), ())
    return filled_parameter(layers, shape, axes, cross.gate_init, STACK)


def _gated(gate: nnx.Param, y_BTD: Array) -> Array:
    return jnp.tanh(gate[...]).astype(y_BTD.dtype) * y_BTD
