"""Matrix products: every form against numpy, in both compute dtypes, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4moe.model.grouped_matmul import block_matmul, expert_matmul
from gpt4moe.model.layers import matmul
from gpt4moe.model.product import product_nt, product_tn, transposed
from tests.model.slow import relative_difference

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def _random(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_transposed_operands(dtype, rows):
    a, b, c = _random(0, rows, 6, dtype=dtype), _random(1, 8, 6, dtype=dtype), _random(2, rows, 9, dtype=dtype)
    nt, tn, turned = jax.jit(lambda a, b, c: (product_nt(a, b), product_tn(a, c), transposed(c)))(a, b, c)
    a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
    assert relative_difference((nt, tn, turned), (a @ b.T, a.T @ c, c.T)) < 1e-5
    assert nt.dtype == tn.dtype == jnp.float32


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matmul_contracts_several_dims_and_differentiates(dtype):
    x, w, dy = _random(0, 2, 3, 4, 5, dtype=dtype), _random(1, 4, 5, 6), _random(2, 2, 3, 6)

    def ours(x, w):
        return jnp.sum(matmul(x, w, 2).astype(jnp.float32) * dy)

    def reference(x, w):
        return jnp.sum(jnp.einsum("abcd,cde->abe", x, w) * dy)

    got, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(x, w)
    wanted, wanted_gradients = jax.value_and_grad(reference, (0, 1))(x.astype(jnp.float32), w)
    assert relative_difference(gradients, wanted_gradients) < TOLERANCE[dtype]
    assert abs(float(got - wanted)) < TOLERANCE[dtype] * 40
    assert gradients[0].dtype == x.dtype and gradients[1].dtype == jnp.float32


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_products_with_the_matrix_of_each_block(dtype):
    """Five blocks for three experts, the last block unused, expert 1 without a block."""
    rows_XCD, w_EDF = _random(0, 5, 4, 6, dtype=dtype), _random(1, 3, 6, 8)
    block_expert_X, num_blocks, dy = jnp.array([0, 0, 2, 2, 2]), jnp.int32(4), _random(2, 5, 4, 8)
    mask = (jnp.arange(5) < 4)[:, None, None]

    def ours(rows_XCD, w_EDF):
        blocks = block_matmul(rows_XCD, w_EDF, block_expert_X, num_blocks)
        return jnp.sum(blocks.astype(jnp.float32) * dy) + jnp.sum(expert_matmul(rows_XCD[:3], w_EDF) * dy[:3])

    def reference(rows_XCD, w_EDF):
        blocks = jnp.einsum("xcd,xdf->xcf", rows_XCD, w_EDF[block_expert_X]) * mask
        return jnp.sum(blocks * dy) + jnp.sum(jnp.einsum("xcd,xdf->xcf", rows_XCD[:3], w_EDF) * dy[:3])

    gradients = jax.jit(jax.grad(ours, (0, 1)))(rows_XCD, w_EDF)
    wanted = jax.grad(reference, (0, 1))(rows_XCD.astype(jnp.float32), w_EDF)
    assert relative_difference(gradients, wanted) < TOLERANCE[dtype]
