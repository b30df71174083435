"""The image encoder: pixels in, a feature for each patch and leading token out (ViT, Dosovitskiy et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, UInt8

from gpt4moe.config.check import require
from gpt4moe.config.vision import EncoderConfig
from gpt4moe.model.bidirectional import attend_all
from gpt4moe.model.layers import (
    LayerNorm,
    Linear,
    Slots,
    activation,
    depth_scale,
    normal_parameter,
    rematerialised,
)
from gpt4moe.model.layout import is_unrolled, unchanged
from gpt4moe.model.rope import Rotation, rotate, rotation
from gpt4moe.types import Array

# Encoder layers lie whole on every pipeline stage: a dim of their own, not the decoder's "layers".
STACK = "vision_layers"


class VisionEncoder(nnx.Module):
    """Patches, leading tokens, `blocks` stacked over layers.

    patch [patch height * width * 3, D], the pixels of a patch by rows, columns, colours; positions [P, D], by rows;
    leading [class token and registers, D], which hold their own positions. D is the encoder's width, not the decoder's.
    Matrices have deviation fan_in^-1/2, those that write to the residual stream 1/sqrt(2L) of it; leading tokens
    D^-1/2, positions 1, as patches have: where a sign stands is heard as loud as what it is from the first step on.
    """

    def __init__(
        self, config: EncoderConfig, compute_dtype: str, remat: str, rngs: nnx.Rngs, by_row: Callable = unchanged
    ):
        dim, epsilon = config.dim, config.norm_epsilon
        self.patch = Linear(
            None, (config.patch_values, dim), ("patch", "vision_embed"), rngs, has_bias=config.patch_bias
        )
        patches = config.grid[0] * config.grid[1]
        self.positions = learned_table(patches, dim, rngs) if config.positions == "learned" else None
        self.leading = learned_table(config.num_leading, dim, rngs, dim**-0.5) if config.num_leading else None
        self.frames = _frame_table(config) if config.max_frames > 1 else None
        self.norm_before = LayerNorm(None, dim, epsilon) if config.norm_before else None
        self.blocks = EncoderBlock(tuple(range(config.num_layers)), config, rngs)
        self.norm_after = LayerNorm(None, dim, epsilon) if config.norm_after else None
        self.config, self.compute_dtype, self.remat, self.by_row = config, compute_dtype, remat, by_row

    def __call__(
        self, images: UInt8[Array, "*lead height width 3"] | Float[Array, "*lead height width 3"]
    ) -> Float[Array, "*lead P D"]:
        """Returns the features of every image in the compute dtype, leading tokens before patches by rows.

        Bytes are normalised here; floats are taken as normalised already. The last of the leading dims is the frames of
        a clip (or tiles of a page) where `max_frames` is above 1, and only there. Raises `ValueError` for images of
        another size than the configuration's: see `resampled_positions` for a change of it.
        """
        config, lead = self.config, images.shape[:-3]
        size, expected = images.shape[-3:-1], (config.height, config.width)
        require(size == expected, "images' height and width", size, f"must be {expected}, those of EncoderConfig")
        images_I = images.reshape(-1, *images.shape[-3:])
        patches = _patches(_normalised(images_I, config).astype(self.compute_dtype), *config.patch)
        x_IPD = self.by_row(self.patch(patches))
        if self.positions is not None:
            x_IPD = x_IPD + self.positions[...].astype(x_IPD.dtype)
        if self.leading is not None:
            leading_PD = self.leading[...].astype(x_IPD.dtype)
            x_IPD = jnp.concatenate([jnp.broadcast_to(leading_PD, (len(x_IPD), *leading_PD.shape)), x_IPD], axis=1)
        if self.norm_before is not None:
            x_IPD = self.norm_before(x_IPD)
        x_IPD = self._run_blocks(x_IPD)
        if self.norm_after is not None:
            x_IPD = self.norm_after(x_IPD)
        x_IPD = x_IPD.reshape(*lead, *x_IPD.shape[1:])
        if self.frames is not None:
            constraint = f"must be at most EncoderConfig.max_frames ({config.max_frames})"
            require(lead[-1] <= config.max_frames, "frames of an image", lead[-1], constraint)
            x_IPD = x_IPD + self.frames[...][: lead[-1], None].astype(x_IPD.dtype)
        return x_IPD

    def _run_blocks(self, x_IPD: Array) -> Array:
        graph, parameters = nnx.split(self.blocks)
        turn = patch_rotation(self.config) if self.positions is None else None
        few = is_unrolled(self.config.num_layers)

        def layer(x_IPD: Array, parameters: nnx.State) -> Array:
            return self.by_row(nnx.merge(graph, parameters)(x_IPD, turn))

        step = rematerialised(layer, self.remat, in_loop=not few)
        return jax.lax.scan(lambda x, layers: (step(x, layers), None), x_IPD, parameters, unroll=few)[0]


class EncoderBlock(nnx.Module):
    """Attention over all of an image, then a feed-forward, each after a LayerNorm and added to the stream; biases."""

    def __init__(self, layers: Slots, config: EncoderConfig, rngs: nnx.Rngs):
        dim, heads, hidden, epsilon = config.dim, config.num_heads, config.hidden_dim, config.norm_epsilon
        out_scale = depth_scale(config.num_layers)
        shape, axes = (dim, heads, dim // heads), ("vision_embed", "heads", "head_dim")
        self.attention_norm = LayerNorm(layers, dim, epsilon, stack=STACK)
        self.query = Linear(layers, shape, axes, rngs, stack=STACK)
        self.key = Linear(layers, shape, axes, rngs, stack=STACK)
        self.value = Linear(layers, shape, axes, rngs, stack=STACK)
        turned, turned_axes = (*shape[1:], dim), (*axes[1:], "vision_embed")
        self.output = Linear(layers, turned, turned_axes, rngs, num_contracted=2, out_scale=out_scale, stack=STACK)
        self.feed_forward_norm = LayerNorm(layers, dim, epsilon, stack=STACK)
        self.up = Linear(layers, (dim, hidden), ("vision_embed", "mlp"), rngs, stack=STACK)
        self.down = Linear(layers, (hidden, dim), ("mlp", "vision_embed"), rngs, out_scale=out_scale, stack=STACK)
        self.activate = activation(config.activation)

    def __call__(self, x_IPD: Float[Array, "I P D"], turn: Rotation | None) -> Float[Array, "I P D"]:
        """Returns the stream after the layer; queries and keys are turned by `turn` where positions are rotary."""
        normed = self.attention_norm(x_IPD)
        q_IPNH, k_IPNH, v_IPNH = self.query(normed), self.key(normed), self.value(normed)
        if turn is not None:
            q_IPNH, k_IPNH = rotate(q_IPNH, turn), rotate(k_IPNH, turn)
        x_IPD = x_IPD + self.output(attend_all(q_IPNH, k_IPNH, v_IPNH))
        return x_IPD + self.down(self.activate(self.up(self.feed_forward_norm(x_IPD))))


def patch_rotation(config: EncoderConfig) -> Rotation:
    """Returns the angles of each patch's row in the first quarter of a head's dims, of its column in the second.

    Leading tokens are not turned.
    """
    rows, columns = config.grid
    of_rows, of_columns = jnp.divmod(jnp.arange(rows * columns)[None], columns)
    half = config.dim // config.num_heads // 2
    turns = [rotation(positions, half, config.rope_theta) for positions in (of_rows, of_columns)]
    leading = ((0, 0), (config.num_leading, 0), (0, 0))
    cos = jnp.pad(jnp.concatenate([turn.cos for turn in turns], -1), leading, constant_values=1.0)
    return Rotation(cos, jnp.pad(jnp.concatenate([turn.sin for turn in turns], -1), leading))


def resampled_positions(
    table_PD: Float[Array, "P D"], old_grid: tuple[int, int], new_grid: tuple[int, int], method: str = "cubic"
) -> Float[Array, "Q D"]:
    """Returns a table of learned positions for another grid (rows, columns), to go on training at a new resolution.

    `method` is of `jax.image.resize`: "linear" or "cubic" (Keys' kernel, a = -1/2; PyTorch's bicubic has a = -3/4). The
    edges of the two images lie on each other, as in PyTorch; big_vision lays the centres of corner patches there.
    Raises `ValueError` where the table is not one of `old_grid`.
    """
    rows, columns = old_grid
    constraint = f"must be the rows * columns of old_grid ({rows} * {columns})"
    require(len(table_PD) == rows * columns, "rows of the position table", len(table_PD), constraint)
    grid = jnp.asarray(table_PD).reshape(rows, columns, -1)
    return jax.image.resize(grid, (*new_grid, grid.shape[-1]), method).reshape(-1, grid.shape[-1])


def learned_table(rows: int, dim: int, rngs: nnx.Rngs, std: float = 1.0) -> nnx.Param:
    """Returns fresh vectors [rows, dim], as wide as the encoder, that are the same for every image."""
    return normal_parameter(rngs, None, (rows, dim), ("position", "vision_embed"), std)


def _frame_table(config: EncoderConfig) -> nnx.Param:
    """Vectors of frames to begin from: sines and cosines, of deviation 1, as the features to which they are added.

    So that from any frame to the next is one turn, which is learned once and not for each of them: of the lines of a
    page the twentieth is found as the third was.
    """
    turn = rotation(jnp.arange(config.max_frames)[None], config.dim, config.rope_theta)
    waves_FD = jnp.concatenate([turn.cos[0], turn.sin[0]], axis=-1)[:, : config.dim] * 2**0.5
    return nnx.Param(waves_FD, logical_axes=("position", "vision_embed"))


def _normalised(images_I: Array, config: EncoderConfig) -> Array:
    if images_I.dtype != jnp.uint8:
        return images_I
    mean, std = jnp.array(config.pixel_mean, jnp.float32), jnp.array(config.pixel_std, jnp.float32)
    return (images_I.astype(jnp.float32) / 255 - mean) / std


def _patches(images_I: Array, high: int, wide: int) -> Array:
    """[I, height, width, 3] as [I, P, high * wide * 3]."""
    count, height, width, colours = images_I.shape
    split = images_I.reshape(count, height // high, high, width // wide, wide, colours)
    return split.swapaxes(2, 3).reshape(count, -1, high * wide * colours)
