"""Products of blocks of rows with the matrix of each block's expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gpt4moe.types import Array


@jax.custom_vjp
def expert_matmul(rows_ECD: Array, w_EDF: Array) -> Array:
    """Returns [E, C, F] in the rows' dtype: block e times matrix e, float32 accumulation, gradients in kind."""
    return _products(rows_ECD, w_EDF.astype(rows_ECD.dtype)).astype(rows_ECD.dtype)


def _expert_forward(rows_ECD: Array, w_EDF: Array) -> tuple[Array, tuple[Array, Array]]:
    return expert_matmul(rows_ECD, w_EDF), (rows_ECD, w_EDF)


def _expert_backward(residuals: tuple[Array, Array], dy_ECF: Array) -> tuple[Array, Array]:
    rows_ECD, w_EDF = residuals
    drows_ECD = _products(dy_ECF, w_EDF.astype(rows_ECD.dtype).swapaxes(1, 2)).astype(rows_ECD.dtype)
    return drows_ECD, _products(rows_ECD.swapaxes(1, 2), dy_ECF).astype(w_EDF.dtype)


expert_matmul.defvjp(_expert_forward, _expert_backward)


def _products(a_EIJ: Array, b_EJK: Array) -> Array:
    """Batched product in float32: one by one on a CPU, which has no fast (or, in bfloat16, any) batched product."""
    return jax.lax.platform_dependent(a_EIJ, b_EJK, cpu=_one_by_one, default=_batched)


def _one_by_one(a_EIJ: Array, b_EJK: Array) -> Array:
    return jnp.stack([_product(a, b) for a, b in zip(a_EIJ, b_EJK, strict=True)])


def _batched(a_EIJ: Array, b_EJK: Array) -> Array:
    return jnp.einsum("eij,ejk->eik", a_EIJ, b_EJK, preferred_element_type=jnp.float32)


def _product(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def block_matmul(rows_XCD: Array, w_EDF: Array, block_expert_X: Array, num_blocks: Array) -> Array:
    """Returns [X, C, F] in the rows' dtype: each of the first `num_blocks` blocks times its expert's matrix, 0 beyond.

    A loop over the blocks in use, so that no work is done for experts without tokens.
    """
    return _over_blocks(rows_XCD, w_EDF.astype(rows_XCD.dtype), block_expert_X, num_blocks)


def _block_forward(rows_XCD: Array, w_EDF: Array, block_expert_X: Array, num_blocks: Array):
    y_XCF = block_matmul(rows_XCD, w_EDF, block_expert_X, num_blocks)
    return y_XCF, (rows_XCD, w_EDF, block_expert_X, num_blocks)


def _block_backward(residuals: tuple, dy_XCF: Array) -> tuple:
    rows_XCD, w_EDF, block_expert_X, num_blocks = residuals
    w_transposed_EFD = w_EDF.astype(rows_XCD.dtype).swapaxes(1, 2)
    drows_XCD = _over_blocks(dy_XCF, w_transposed_EFD, block_expert_X, num_blocks)

    def accumulate(block: Array, dw_EDF: Array) -> Array:
        expert = block_expert_X[block]
        return dw_EDF.at[expert].add(_product(rows_XCD[block].T, dy_XCF[block]))

    dw_EDF = jax.lax.fori_loop(0, num_blocks, accumulate, jnp.zeros(w_EDF.shape, jnp.float32))
    return drows_XCD, dw_EDF.astype(w_EDF.dtype), None, None


block_matmul.defvjp(_block_forward, _block_backward)


def _over_blocks(rows_XCD: Array, w_EDF: Array, block_expert_X: Array, num_blocks: Array) -> Array:
    def multiply(block: Array, y_XCF: Array) -> Array:
        product = _product(rows_XCD[block], w_EDF[block_expert_X[block]])
        return y_XCF.at[block].set(product.astype(y_XCF.dtype))

    shape = (*rows_XCD.shape[:2], w_EDF.shape[-1])
    return jax.lax.fori_loop(0, num_blocks, multiply, jnp.zeros(shape, rows_XCD.dtype))
