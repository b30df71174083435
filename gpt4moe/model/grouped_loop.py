"""The grouped product as a loop over the blocks in use: behind the contract of `grouped_matmul.Implementation`.

For a CPU, whose matrix library is at its full rate on one block, and for whatever has no kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from gpt4moe.model.blocks import Blocks
from gpt4moe.model.product import each_transposed, from_bits, product, product_tn, to_bits
from gpt4moe.types import Array


def forward(x_XCD: Float[Array, "X C D"], w_EDF: Float[Array, "E D F"], blocks: Blocks) -> Float[Array, "X C F"]:
    """Returns each block in use times its expert's matrix."""

    def multiply(block: Array, y_XCF: Array) -> Array:
        y_CF = product(x_XCD[block], w_EDF[blocks.expert_X[block]])
        return y_XCF.at[block].set(to_bits(y_CF.astype(x_XCD.dtype)))

    y_XCF = to_bits(jnp.zeros((*x_XCD.shape[:2], w_EDF.shape[-1]), x_XCD.dtype))
    return from_bits(jax.lax.fori_loop(0, blocks.in_use, multiply, y_XCF))


def rows_gradient(dy_XCF: Float[Array, "X C F"], w_EDF: Float[Array, "E D F"], blocks: Blocks) -> Float[Array, "X C D"]:
    """Returns each block in use times the transpose of its expert's matrix."""
    return forward(dy_XCF, each_transposed(w_EDF), blocks)


def matrices_gradient(
    x_XCD: Float[Array, "X C D"], dy_XCF: Float[Array, "X C F"], blocks: Blocks, num_experts: int
) -> Float32[Array, "E D F"]:
    """Returns, for each expert, the sum over its blocks of rows^T dy."""

    def add(block: Array, dw_EDF: Array) -> Array:
        return dw_EDF.at[blocks.expert_X[block]].add(product_tn(x_XCD[block], dy_XCF[block]))

    zeros_EDF = jnp.zeros((num_experts, x_XCD.shape[-1], dy_XCF.shape[-1]), jnp.float32)
    return jax.lax.fori_loop(0, blocks.in_use, add, zeros_EDF)
