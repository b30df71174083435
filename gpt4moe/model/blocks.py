"""Blocks of rows, each for one expert: what a grouped product and its kernels take beside rows and matrices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from gpt4moe.types import Array

Shaped = Array | jax.ShapeDtypeStruct


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """expert_X: the expert of each block, ascending; in_use: how many blocks count, from the first."""

    expert_X: Int[Array, " X"]
    in_use: Int[Array, ""]

    def used_X(self) -> Bool[Array, " X"]:
        """Returns which blocks count."""
        return jnp.arange(len(self.expert_X)) < self.in_use

    def counts_E(self, num_experts: int) -> Int[Array, " E"]:
        """Returns how many blocks of each expert count, int32."""
        own_EX = self.expert_X == jnp.arange(num_experts)[:, None]
        return jnp.sum(own_EX & self.used_X(), axis=1, dtype=jnp.int32)
