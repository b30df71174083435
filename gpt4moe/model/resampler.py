"""The Perceiver resampler: features of an image's patches and frames in, a few latents out (Alayrac et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float

from gpt4moe.config.check import require
from gpt4moe.config.vision import ResamplerConfig
from gpt4moe.model.bidirectional import attend_all
from gpt4moe.model.layers import LayerNorm, Linear, Slots, activation, depth_scale
from gpt4moe.model.layout import is_unrolled, unchanged
from gpt4moe.model.vision import STACK, learned_table
from gpt4moe.types import Array


class Resampler(nnx.Module):
    """latents [R, D], which read the features in every one of the stacked `blocks`; D is the width of the features.

    frame_embedding [frames, D] and image_embedding [images, D] where the configuration has them. Latents and embeddings
    begin at unit deviation (OpenFlamingo), matrices at fan_in^-1/2, those that write to the latents 1/sqrt(2L) of it.
    """

    def __init__(
        self, config: ResamplerConfig, dim: int, compute_dtype: str, rngs: nnx.Rngs, by_row: Callable = unchanged
    ):
        self.latents = learned_table(config.num_latents, dim, rngs)
        self.frame_embedding = learned_table(config.max_frames, dim, rngs) if config.max_frames else None
        self.image_embedding = learned_table(config.max_images, dim, rngs) if config.max_images else None
        self.blocks = ResamplerBlock(tuple(range(config.num_layers)), config, dim, rngs)
        self.norm = LayerNorm(None, dim, config.norm_epsilon)
        self.config, self.compute_dtype, self.by_row = config, compute_dtype, by_row

    def __call__(
        self, x_BIFPD: Float[Array, "B I frames P D"], frame_valid_BIF: Bool[Array, "B I frames"] | None = None
    ) -> Float[Array, "B I R D"]:
        """Returns the latents of every image in the compute dtype; frames that are not valid are not read.

        Raises `ValueError` for more frames, or images of a row, than there are embeddings.
        """
        rows, images, frames, patches, dim = x_BIFPD.shape
        x_BIFPD = x_BIFPD.astype(self.compute_dtype)
        if self.frame_embedding is not None:
            x_BIFPD = x_BIFPD + _first(self.frame_embedding, frames, "max_frames")[:, None].astype(x_BIFPD.dtype)
        if self.image_embedding is not None:
            of_images = _first(self.image_embedding, images, "max_images")[:, None, None]
            x_BIFPD = x_BIFPD + of_images.astype(x_BIFPD.dtype)
        x_IPD = x_BIFPD.reshape(rows * images, frames * patches, dim)
        valid_IS = None
        if frame_valid_BIF is not None:
            valid_IS = jnp.repeat(frame_valid_BIF.reshape(rows * images, frames), patches, axis=1)
            # latents read each other too, so that an image without a valid frame still has keys
            valid_IS = jnp.pad(valid_IS, ((0, 0), (0, self.config.num_latents)), constant_values=True)
        latents_RD = self.latents[...].astype(x_IPD.dtype)
        latents_IRD = self.by_row(jnp.broadcast_to(latents_RD, (len(x_IPD), *latents_RD.shape)))
        latents_IRD = self.norm(self._run_blocks(latents_IRD, x_IPD, valid_IS))
        return latents_IRD.reshape(rows, images, *latents_IRD.shape[1:])

    def _run_blocks(self, latents_IRD: Array, x_IPD: Array, valid_IS: Array | None) -> Array:
        graph, parameters = nnx.split(self.blocks)

        def step(latents_IRD: Array, layer: nnx.State) -> tuple[Array, None]:
            return self.by_row(nnx.merge(graph, layer)(latents_IRD, x_IPD, valid_IS)), None

        return jax.lax.scan(step, latents_IRD, parameters, unroll=is_unrolled(self.config.num_layers))[0]


class ResamplerBlock(nnx.Module):
    """Latents attend to the features and to themselves, then a feed-forward; each is added to the latents.

    Features and latents are normalised apart and share keys' and values' matrices; LayerNorms have biases, matrices
    none.
    """

    def __init__(self, layers: Slots, config: ResamplerConfig, dim: int, rngs: nnx.Rngs):
        epsilon, hidden = config.norm_epsilon, config.hidden_dim
        head_dim = config.head_dim or dim // config.num_heads
        shape, axes = (dim, config.num_heads, head_dim), ("vision_embed", "heads", "head_dim")
        plain = {"has_bias": False, "stack": STACK}
        writes = {"out_scale": depth_scale(config.num_layers), **plain}
        self.features_norm = LayerNorm(layers, dim, epsilon, stack=STACK)
        self.latents_norm = LayerNorm(layers, dim, epsilon, stack=STACK)
        self.query = Linear(layers, shape, axes, rngs, **plain)
        self.key = Linear(layers, shape, axes, rngs, **plain)
        self.value = Linear(layers, shape, axes, rngs, **plain)
        self.query_norm = LayerNorm(layers, head_dim, epsilon, stack=STACK) if config.qk_norm else None
        self.key_norm = LayerNorm(layers, head_dim, epsilon, stack=STACK) if config.qk_norm else None
        self.output = Linear(layers, (*shape[1:], dim), (*axes[1:], "vision_embed"), rngs, num_contracted=2, **writes)
        self.feed_forward_norm = LayerNorm(layers, dim, epsilon, stack=STACK)
        self.up = Linear(layers, (dim, hidden), ("vision_embed", "mlp"), rngs, **plain)
        self.down = Linear(layers, (hidden, dim), ("mlp", "vision_embed"), rngs, **writes)
        self.activate = activation(config.activation)

    def __call__(
        self, latents_IRD: Float[Array, "I R D"], x_IPD: Float[Array, "I P D"], valid_IS: Array | None
    ) -> Float[Array, "I R D"]:
        """Returns the latents after the layer; `valid_IS` covers the P features and the R latents after them."""
        normed_IRD = self.latents_norm(latents_IRD)
        read_ISD = jnp.concatenate([self.features_norm(x_IPD), normed_IRD], axis=1)
        q_IRNH, k_ISNH, v_ISNH = self.query(normed_IRD), self.key(read_ISD), self.value(read_ISD)
        if self.query_norm is not None:
            q_IRNH, k_ISNH = self.query_norm(q_IRNH), self.key_norm(k_ISNH)
        latents_IRD = latents_IRD + self.output(attend_all(q_IRNH, k_ISNH, v_ISNH, valid_IS))
        return latents_IRD + self.down(self.activate(self.up(self.feed_forward_norm(latents_IRD))))


def _first(embedding: nnx.Param, count: int, setting: str) -> Array:
    table = embedding[...]
    require(count <= len(table), f"ResamplerConfig.{setting}", len(table), f"must be at least the batch's {count}")
    return table[:count]
