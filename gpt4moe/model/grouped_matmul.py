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

    A loop over the blocks in use, so that no work is done for experts without tokens; on a TPU its native grouped
    product.
    """
    operands = (rows_XCD, w_EDF.astype(rows_XCD.dtype), block_expert_X, num_blocks)
    return jax.lax.platform_dependent(*operands, tpu=ragged_forward, default=_block_loop)


def _block_loop(rows_XCD: Array, matrices_EDF: Array, block_expert_X: Array, num_blocks: Array) -> Array:
    def multiply(block: Array, y_XCF: Array) -> Array:
        y_CF = product(rows_XCD[block], matrices_EDF[block_expert_X[block]])
        return y_XCF.at[block].set(to_bits(y_CF.astype(rows_XCD.dtype)))

    y_XCF = to_bits(jnp.zeros((*rows_XCD.shape[:2], matrices_EDF.shape[-1]), rows_XCD.dtype))
    return from_bits(jax.lax.fori_loop(0, num_blocks, multiply, y_XCF))


def _block_forward(rows_XCD: Array, w_EDF: Array, block_expert_X: Array, num_blocks: Array):
    y_XCF = block_matmul(rows_XCD, w_EDF, block_expert_X, num_blocks)
    return y_XCF, (rows_XCD, w_EDF, block_expert_X, num_blocks)


def _block_backward(residuals: tuple, dy_XCF: Array) -> tuple:
    rows_XCD, w_EDF, block_expert_X, num_blocks = residuals
    operands = (dy_XCF, rows_XCD, w_EDF.astype(rows_XCD.dtype), block_expert_X, num_blocks)
    drows_XCD, dw_EDF = jax.lax.platform_dependent(*operands, tpu=ragged_backward, default=_block_loop_backward)
    return drows_XCD, dw_EDF.astype(w_EDF.dtype), None, None


def _block_loop_backward(dy_XCF: Array, rows_XCD: Array, matrices_EDF: Array, block_expert_X: Array, num_blocks: Array):
    matrices_EFD = each_transposed(matrices_EDF)

    def multiply(block: Array, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
        drows_XCD, dw_EDF = gradients
        expert, dy_CF = block_expert_X[block], dy_XCF[block]
        drows_CD = product(dy_CF, matrices_EFD[expert]).astype(rows_XCD.dtype)
        dw_EDF = dw_EDF.at[expert].add(product_tn(rows_XCD[block], dy_CF))
        return drows_XCD.at[block].set(to_bits(drows_CD)), dw_EDF

    zeros = to_bits(jnp.zeros_like(rows_XCD)), jnp.zeros(matrices_EDF.shape, jnp.float32)
    drows_XCD, dw_EDF = jax.lax.fori_loop(0, num_blocks, multiply, zeros)
    return from_bits(drows_XCD), dw_EDF


block_matmul.defvjp(_block_forward, _block_backward)


def ragged_forward(
    rows_XCD: Float[Array, "X C D"],
    matrices_EDF: Float[Array, "E D F"],
    block_expert_X: Int[Array, " X"],
    num_blocks: Int[Array, ""],
) -> Float[Array, "X C F"]:
    """`block_matmul` by XLA's grouped product, which only a TPU has as an instruction; blocks go up by expert."""
    sizes_E = _rows_of_experts(rows_XCD, len(matrices_EDF), block_expert_X, num_blocks)
    rows_SD = rows_XCD.reshape(-1, rows_XCD.shape[-1])
    y_SF = jax.lax.ragged_dot(rows_SD, matrices_EDF, sizes_E, preferred_element_type=jnp.float32)
    return y_SF.astype(rows_XCD.dtype).reshape(*rows_XCD.shape[:2], -1)


def ragged_backward(
    dy_XCF: Float[Array, "X C F"],
    rows_XCD: Float[Array, "X C D"],
    matrices_EDF: Float[Array, "E D F"],
    block_expert_X: Int[Array, " X"],
    num_blocks: Int[Array, ""],
) -> tuple[Float[Array, "X C D"], Float[Array, "E D F"]]:
    """Gradients of rows, in their dtype, and of matrices, in float32, by grouped products."""
    drows_XCD = ragged_forward(dy_XCF, matrices_EDF.swapaxes(1, 2), block_expert_X, num_blocks)
    sizes_E = _rows_of_experts(rows_XCD, len(matrices_EDF), block_expert_X, num_blocks)
    over_rows = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    operands = (x.reshape(-1, x.shape[-1]) for x in (rows_XCD, dy_XCF))
    dw_EDF = jax.lax.ragged_dot_general(*operands, sizes_E, over_rows, preferred_element_type=jnp.float32)
    return drows_XCD, dw_EDF


def _rows_of_experts(rows_XCD: Array, num_experts: int, block_expert_X: Array, num_blocks: Array) -> Array:
    in_use_X = jnp.arange(len(rows_XCD)) < num_blocks
    blocks_E = jnp.sum((block_expert_X == jnp.arange(num_experts)[:, None]) & in_use_X, axis=1, dtype=jnp.int32)
    return blocks_E * rows_XCD.shape[1]
