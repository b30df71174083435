"""The image encoder: a vision transformer, images in, one feature a patch out (Dosovitskiy et al. 2021)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from gpt4moe.config.vision import EncoderConfig
from gpt4moe.model.layers import (
    LayerNorm,
    activation,
    constant_parameter,
    depth_scale,
    matmul,
    normal_parameter,
    rematerialised,
)
from gpt4moe.model.layout import is_unrolled
from gpt4moe.model.rope import Rotation, rotate
from gpt4moe.types import Array

# Not over the stages of a pipeline: every stage needs what the encoder makes.
STACK = "vision_layers"
TOKEN_STD = 0.02


class VisionEncoder(nnx.Module):
    """patch [patch * patch * 3, D], positions [P, D] where learned, `blocks` stacked over layers; D is its own width."""

    def __init__(self, config: EncoderConfig, compute_dtype: str, remat: str, rngs: nnx.Rngs):
        dim, pixels, leading = config.dim, config.patch_size**2 * 3, config.num_leading
        self.patch = normal_parameter(rngs, None, (pixels, dim), ("patch", "vision_embed"), pixels**-0.5)
        self.patch_bias = constant_parameter(None, (dim,), ("norm",), 0.0) if config.patch_bias else None
        tokens_axes = ("position", "vision_embed")
        self.leading = normal_parameter(rngs, None, (leading, dim), tokens_axes, TOKEN_STD) if leading else None
        count = config.num_features - config.num_registers
        learned = config.positions == "learned"
        self.positions = normal_parameter(rngs, None, (count, dim), tokens_axes, TOKEN_STD) if learned else None
        self.norm_before = LayerNorm(None, dim, config.norm_epsilon) if config.norm_before else None
        self.blocks = EncoderBlock(tuple(range(config.num_layers)), config, rngs)
        self.norm_after = LayerNorm(None, dim, config.norm_epsilon) if config.norm_after else None
        self.config, self.compute_dtype, self.remat = config, compute_dtype, remat

    def __call__(self, images: Array) -> Float[Array, "*images P D"]:
        """Returns the features [..., P, D] of images [..., height, width, 3], those of leading tokens first.

        uint8 images are normalised here; float ones are taken as they are.
        """
        outer = images.shape[:-3]
        x_IPD = self._embed(self._pixels(images.reshape(-1, *images.shape[-3:])))
        if self.norm_before is not None:
            x_IPD = self.norm_before(x_IPD)
        graph, parameters = nnx.split(self.blocks)
        unroll, turn = is_unrolled(self.config.num_layers), self._turn()

        def layer(x_IPD: Array, parameters: nnx.State) -> tuple[Array, None]:
            return nnx.merge(graph, parameters)(x_IPD, turn), None

        layer = rematerialised(layer, self.remat, in_loop=not unroll)
        x_IPD, _ = jax.lax.scan(layer, x_IPD, parameters, unroll=unroll)
        if self.norm_after is not None:
            x_IPD = self.norm_after(x_IPD)
        return x_IPD.reshape(*outer, *x_IPD.shape[1:])

    def _pixels(self, images: Array) -> Array:
        if images.dtype != jnp.uint8:
            return images.astype(self.compute_dtype)
        mean, std = (jnp.array(of, jnp.float32) for of in (self.config.pixel_mean, self.config.pixel_std))
        return ((images.astype(jnp.float32) / 255 - mean) / std).astype(self.compute_dtype)

    def _embed(self, pixels: Array) -> Array:
        """Patches as tokens, row by row of the image, with positions, after the leading tokens."""
        (rows, columns), size, count = self.config.grid, self.config.patch_size, len(pixels)
        cut = pixels.reshape(count, rows, size, columns, size, 3).swapaxes(2, 3)
        x_IPD = matmul(cut.reshape(count, rows * columns, -1), self.patch[...])
        if self.patch_bias is not None:
            x_IPD = x_IPD + self.patch_bias[...].astype(x_IPD.dtype)
        if self.leading is not None:
            leading = jnp.broadcast_to(self.leading[...].astype(x_IPD.dtype), (count, *self.leading[...].shape))
            x_IPD = jnp.concatenate([leading, x_IPD], axis=1)
        if self.positions is not None:
            # Registers, which stand first, have no place.
            positions = jnp.pad(self.positions[...], ((self.config.num_registers, 0), (0, 0)))
            x_IPD = x_IPD + positions.astype(x_IPD.dtype)
        return x_IPD

    def _turn(self) -> Rotation | None:
        """Angles by the row of a patch for one half of a head's pairs of dims, by its column for the other."""
        config = self.config
        if config.positions == "learned":
            return None
        quarter = config.dim // config.num_heads // 4
        frequency = config.rope_theta ** (-jnp.arange(quarter, dtype=jnp.float32) / quarter)
        rows, columns = (axis.ravel() for axis in jnp.mgrid[: config.grid[0], : config.grid[1]])
        angle = jnp.concatenate([place[:, None] * frequency for place in (rows, columns)], axis=-1)
        angle = jnp.pad(angle, ((config.num_leading, 0), (0, 0)))[None]
        return Rotation(jnp.cos(angle), jnp.sin(angle))


class EncoderBlock(nnx.Module):
    """Pre-norm attention of all tokens among all, and a feed-forward; biases everywhere."""

    def __init__(self, layers: tuple[int, ...], config: EncoderConfig, rngs: nnx.Rngs):
        dim, heads, hidden = config.dim, config.num_heads, config.hidden_dim
        head_dim, out_scale = dim // heads, depth_scale(config.num_layers)

        def matrix(shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
            return normal_parameter(rngs, layers, shape, axes, std, stack=STACK)

        def bias(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            return constant_parameter(layers, shape, axes, 0.0, stack=STACK)

        head_axes = ("heads", "head_dim")
        self.attention_norm = LayerNorm(layers, dim, config.norm_epsilon, stack=STACK)
        self.query, self.key, self.value = (
            matrix((dim, heads, head_dim), ("vision_embed", *head_axes), dim**-0.5) for _ in range(3)
        )
        self.query_bias, self.key_bias, self.value_bias = (bias((heads, head_dim), head_axes) for _ in range(3))
        self.output = matrix((heads, head_dim, dim), (*head_axes, "vision_embed"), dim**-0.5 * out_scale)
        self.output_bias = bias((dim,), ("norm",))
        self.feed_forward_norm = LayerNorm(layers, dim, config.norm_epsilon, stack=STACK)
        self.up, self.up_bias = matrix((dim, hidden), ("vision_embed", "mlp"), dim**-0.5), bias((hidden,), ("mlp",))
        self.down = matrix((hidden, dim), ("mlp", "vision_embed"), hidden**-0.5 * out_scale)
        self.down_bias = bias((dim,), ("norm",))
        self.activation = activation(config.activation)

    def __call__(self, x_IPD: Float[Array, "I P D"], turn: Rotation | None) -> Float[Array, "I P D"]:
        normed = self.attention_norm(x_IPD)
        q, k, v = (
            _affine(normed, weight, bias)
            for weight, bias in (
                (self.query, self.query_bias),
                (self.key, self.key_bias),
                (self.value, self.value_bias),
            )
        )
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        x_IPD = x_IPD + _affine(attend_to_all(q, k, v), self.output, self.output_bias, 2)
        hidden = self.activation(_affine(self.feed_forward_norm(x_IPD), self.up, self.up_bias))
        return x_IPD + _affine(hidden, self.down, self.down_bias)


def attend_to_all(
    q_IQNH: Float[Array, "*images Q N H"],
    k_ISNH: Float[Array, "*images S N H"],
    v_ISNH: Float[Array, "*images S N H"],
    visible_IS: Array | None = None,
) -> Float[Array, "*images Q N H"]:
    """Returns softmax(q k^T / sqrt(H)) v over all keys, or those `visible_IS`, in float32 inside."""
    scores = jnp.einsum("...QNH,...SNH->...NQS", q_IQNH, k_ISNH, preferred_element_type=jnp.float32)
    scores = scores * q_IQNH.shape[-1] ** -0.5
    if visible_IS is not None:
        # Finite: of an image of which nothing is there the average means nothing, but is a number.
        scores = jnp.where(visible_IS[..., None, None, :], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(q_IQNH.dtype)
    y_IQNH = jnp.einsum("...NQS,...SNH->...QNH", weights, v_ISNH, preferred_element_type=jnp.float32)
    return y_IQNH.astype(q_IQNH.dtype)


@functools.partial(jax.jit, static_argnames=("old", "new", "leading"))
def resampled_positions(
    positions_PD: Float[Array, "P D"], old: tuple[int, int], new: tuple[int, int], leading: int = 0
) -> Float[Array, "P2 D"]:
    """Returns a learned table of positions for another grid of patches, between the old ones by cubic interpolation.

    For fine-tuning at a higher resolution; the first `leading` entries, the class token's, stay.
    """
    table = positions_PD[leading:].reshape(*old, -1)
    resized = jax.image.resize(table, (*new, table.shape[-1]), "cubic", antialias=False)
    return jnp.concatenate([positions_PD[:leading], resized.reshape(-1, table.shape[-1])])


def _affine(x: Array, weight: nnx.Param, bias: nnx.Param, num_contracted: int = 1) -> Array:
    return matmul(x, weight[...], num_contracted) + bias[...].astype(x.dtype)
