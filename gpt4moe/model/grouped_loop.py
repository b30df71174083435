"""The grouped product as a loop over the blocks in use: behind the contract of `grouped_matmul.Implementation`.

For a CPU, whose matrix library is at its full rate on one block, and for whatever has no kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from gpt4moe.model.product import each_transposed, from_bits, product, product_tn, to_bits
from gpt4moe.types import Array


def forward(
    rows_XCD: Float[Array, "X C D"],
    matrices_EDF: Float[Array, "E D F"],
    block_expert_X: Int[Array, " X"],
    num_blocks: Int[Array, ""],
) -> Float[Array, "X C F"]:
    """Returns each block in use times its expert's matrix."""

    def multiply(block: Array, y_XCF: Array) -> Array:
        y_CF = product(rows_XCD[block], matrices_EDF[block_expert_X[block]])
        return y_XCF.at[block].set(to_bits(y_CF.astype(rows_XCD.dtype)))

    y_XCF = to_bits(jnp.zeros((*rows_XCD.shape[:2], matrices_EDF.shape[-1]), rows_XCD.dtype))
    return from_bits(jax.lax.fori_loop(0, num_blocks, multiply, y_XCF))


def rows_gradient(
    dy_XCF: Float[Array, "X C F"],
    matrices_EDF: Float[Array, "E D F"],
    block_expert_X: Int[Array, " X"],
    num_blocks: Int[Array, ""],
) -> Float[Array, "X C D"]:
    """Returns each block in use times the transpose of its expert's matrix."""
    return forward(dy_XCF, each_transposed(matrices_EDF), block_expert_X, num_blocks)


def matrices_gradient(
    rows_XCD: Float[Array, "X C D"],
    dy_XCF: Float[Array, "X C F"],
    block_expert_X: Int[Array, " X"],
    num_blocks: Int[Array, ""],
    num_experts: int,
) -> Float32[Array, "E D F"]:
    """Returns, for each expert, the sum over its blocks of rows^T dy."""

    def add(block: Array, dw_EDF: Array) -> Array:
        return dw_EDF.at[block_expert_X[block]].add(product_tn(rows_XCD[block], dy_XCF[block]))

    zeros_EDF = jnp.zeros((num_experts, rows_XCD.shape[-1], dy_XCF.shape[-1]), jnp.float32)
    return jax.lax.fori_loop(0, num_blocks, add, zeros_EDF)
