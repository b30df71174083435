"""Rotary position embedding (Su et al. 2021), rotating the two halves of a head against each other."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from gpt4moe.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Cosine and sine of every position's angles: [B, T, H/2] float32 each."""

    cos: Float32[Array, "B T H//2"]
    sin: Float32[Array, "B T H//2"]


def rotation(positions_BT: Int[Array, "B T"], head_dim: int, theta: float) -> Rotation:
    """Returns the angles position * theta^(-2i/H), i = 0..H/2-1, of every token."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions_BT[..., None].astype(jnp.float32) * frequency
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x_BTNH: Float[Array, "B T N H"], turn: Rotation) -> Float[Array, "B T N H"]:
    """Returns x with dims i and i + H/2 of each head turned by the token's i-th angle; float32 inside."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = turn.cos[:, :, None], turn.sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BTNH.dtype)
