"""The Perceiver resampler: the many features of an image, clip or page in, few latents out (Alayrac et al. 2022, A.1.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float

from gpt4moe.config.vision import ResamplerConfig
from gpt4moe.model.layers import LayerNorm, activation, depth_scale, matmul, normal_parameter
from gpt4moe.model.vision import STACK, TOKEN_STD, attend_to_all
from gpt4moe.types import Array


class Resampler(nnx.Module):
    """latents [R, D]; embeddings of frames and of images where the configuration has them; `blocks` over layers."""

    def __init__(self, config: ResamplerConfig, dim: int, compute_dtype: str, rngs: nnx.Rngs):
        def table(count: int) -> nnx.Param | None:
            return (
                normal_parameter(rngs, None, (count, dim), ("position", "vision_embed"), TOKEN_STD) if count else None
            )

        # At unit deviation, as features after a norm are: latents that are all alike would read the same.
        self.latents = normal_parameter(rngs, None, (config.num_latents, dim), ("position", "vision_embed"), 1.0)
        self.frames, self.images = table(config.max_frames), table(config.max_images)
        self.blocks = ResamplerBlock(tuple(range(config.num_layers)), config, dim, rngs)
        self.norm = LayerNorm(None, dim, config.norm_epsilon)
        self.compute_dtype = compute_dtype

    def __call__(
        self, x_BIFPD: Float[Array, "B I F P D"], valid_BIF: Bool[Array, "B I F"] | None = None
    ) -> Float[Array, "B I R D"]:
        """Returns R latents of every image, which read the features of its valid frames; without order among these
        but for what the encoder and the embeddings of frames tell."""
        rows, images, frames, patches, dim = x_BIFPD.shape
        x_BIFPD = x_BIFPD.astype(self.compute_dtype)
        if self.frames is not None:
            x_BIFPD = x_BIFPD + self.frames[...][:frames, None].astype(x_BIFPD.dtype)
        if self.images is not None:
            x_BIFPD = x_BIFPD + self.images[...][:images, None, None].astype(x_BIFPD.dtype)
        x_BISD = x_BIFPD.reshape(rows, images, frames * patches, dim)
        latents = self.latents[...].astype(x_BISD.dtype)
        latents_BIRD = jnp.broadcast_to(latents, (rows, images, *latents.shape))
        visible = None
        if valid_BIF is not None:
            always = jnp.ones((rows, images, len(latents)), bool)
            visible = jnp.concatenate([jnp.repeat(valid_BIF, patches, axis=2), always], axis=-1)
        graph, parameters = nnx.split(self.blocks)

        def layer(latents_BIRD: Array, parameters: nnx.State) -> tuple[Array, None]:
            return nnx.merge(graph, parameters)(latents_BIRD, x_BISD, visible), None

        latents_BIRD, _ = jax.lax.scan(layer, latents_BIRD, parameters, unroll=True)
        return self.norm(latents_BIRD)


class ResamplerBlock(nnx.Module):
    """Latents read features and themselves, then a feed-forward; no biases but in norms."""

    def __init__(self, layers: tuple[int, ...], config: ResamplerConfig, dim: int, rngs: nnx.Rngs):
        heads, out_scale = config.num_heads, depth_scale(config.num_layers)
        head_dim = config.head_dim or dim // heads

        def matrix(shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
            return normal_parameter(rngs, layers, shape, axes, std, stack=STACK)

        def norm(width: int) -> LayerNorm:
            return LayerNorm(layers, width, config.norm_epsilon, stack=STACK)

        self.feature_norm, self.latent_norm, self.feed_forward_norm = norm(dim), norm(dim), norm(dim)
        axes = ("vision_embed", "heads", "head_dim")
        self.query, self.key, self.value = (matrix((dim, heads, head_dim), axes, dim**-0.5) for _ in range(3))
        output_std = (heads * head_dim) ** -0.5 * out_scale
        self.output = matrix((heads, head_dim, dim), ("heads", "head_dim", "vision_embed"), output_std)
        self.query_norm, self.key_norm = (norm(head_dim), norm(head_dim)) if config.qk_norm else (None, None)
        self.up = matrix((dim, config.hidden_dim), ("vision_embed", "mlp"), dim**-0.5)
        self.down = matrix((config.hidden_dim, dim), ("mlp", "vision_embed"), config.hidden_dim**-0.5 * out_scale)
        self.activation = activation(config.activation)

    def __call__(
        self, latents_BIRD: Float[Array, "B I R D"], x_BISD: Float[Array, "B I S D"], visible: Array | None
    ) -> Float[Array, "B I R D"]:
        """Returns the latents after the layer; `visible` [B, I, S + R] says which features there are."""
        queries = self.latent_norm(latents_BIRD)
        keys = jnp.concatenate([self.feature_norm(x_BISD), queries], axis=2)
        q, k, v = matmul(queries, self.query[...]), matmul(keys, self.key[...]), matmul(keys, self.value[...])
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        latents_BIRD = latents_BIRD + matmul(attend_to_all(q, k, v, visible), self.output[...], 2)
        hidden = self.activation(matmul(self.feed_forward_norm(latents_BIRD), self.up[...]))
        return latents_BIRD + matmul(hidden, self.down[...])
