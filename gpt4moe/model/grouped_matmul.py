"""Products of blocks of rows with the matrix of each block's expert, accumulated in float32, with their own VJPs.

All operands enter in the rows' dtype, forward and backward; the gradient of the matrices comes in their own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from gpt4moe.model.product import (
    each_transposed,
    from_bits,
    product,
    product_tn,
    products,
    products_nt,
    products_tn,
    to_bits,
)
from gpt4moe.types import Array


@jax.custom_vjp
def expert_matmul(rows_ECD: Float[Array, "E C D"], w_EDF: Float[Array, "E D F"]) -> Float[Array, "E C F"]:
    """Returns [E, C, F] in the rows' dtype: block e times matrix e."""
    return products(rows_ECD, w_EDF.astype(rows_ECD.dtype)).astype(rows_ECD.dtype)


def _expert_forward(rows_ECD: Array, w_EDF: Array) -> tuple[Array, tuple[Array, Array]]:
    return expert_matmul(rows_ECD, w_EDF), (rows_ECD, w_EDF)


def _expert_backward(residuals: tuple[Array, Array], dy_ECF: Array) -> tuple[Array, Array]:
    rows_ECD, w_EDF = residuals
    drows_ECD = products_nt(dy_ECF, w_EDF.astype(dy_ECF.dtype)).astype(rows_ECD.dtype)
    return drows_ECD, products_tn(rows_ECD, dy_ECF).astype(w_EDF.dtype)


expert_matmul.defvjp(_expert_forward, _expert_backward)


@jax.custom_vjp
def block_matmul(
    rows_XCD: Float[Array, "X C D"],
    w_EDF: Float[Array, "E D F"],
    block_expert_X: Int[Array, " X"],
    num_blocks: Int[Array, ""],
) -> Float[Array, "X C F"]:
    """Returns [X, C, F] in the rows' dtype: each of the first `num_blocks` blocks times its expert's matrix, 0 beyond.

    A loop over the blocks in use, so that no work is done for experts without tokens.
    """
    matrices_EDF = w_EDF.astype(rows_XCD.dtype)

    def multiply(block: Array, y_XCF: Array) -> Array:
        y_CF = product(rows_XCD[block], matrices_EDF[block_expert_X[block]])
        return y_XCF.at[block].set(to_bits(y_CF.astype(rows_XCD.dtype)))

    y_XCF = to_bits(jnp.zeros((*rows_XCD.shape[:2], w_EDF.shape[-1]), rows_XCD.dtype))
    return from_bits(jax.lax.fori_loop(0, num_blocks, multiply, y_XCF))


def _block_forward(rows_XCD: Array, w_EDF: Array, block_expert_X: Array, num_blocks: Array):
    y_XCF = block_matmul(rows_XCD, w_EDF, block_expert_X, num_blocks)
    return y_XCF, (rows_XCD, w_EDF, block_expert_X, num_blocks)


def _block_backward(residuals: tuple, dy_XCF: Array) -> tuple:
    rows_XCD, w_EDF, block_expert_X, num_blocks = residuals
    matrices_EFD = each_transposed(w_EDF.astype(rows_XCD.dtype))

    def multiply(block: Array, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
        drows_XCD, dw_EDF = gradients
        expert, dy_CF = block_expert_X[block], dy_XCF[block]
        drows_CD = product(dy_CF, matrices_EFD[expert]).astype(rows_XCD.dtype)
        dw_EDF = dw_EDF.at[expert].add(product_tn(rows_XCD[block], dy_CF))
        return drows_XCD.at[block].set(to_bits(drows_CD)), dw_EDF

    zeros = to_bits(jnp.zeros_like(rows_XCD)), jnp.zeros(w_EDF.shape, jnp.float32)
    drows_XCD, dw_EDF = jax.lax.fori_loop(0, num_blocks, multiply, zeros)
    return from_bits(drows_XCD), dw_EDF.astype(w_EDF.dtype), None, None


block_matmul.defvjp(_block_forward, _block_backward)
