"""Matrices as decoding multiplies by them: quantised ones within what rounding allows, exact where it rounds none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.infer.matrix import QUANTIZED, joined, make_matrix, times, times_own


def _drawn(rows, inner=32, columns=6):
    """Rows and a matrix whose columns differ a hundredfold in size."""
    x_UI = jax.random.normal(jax.random.key(0), (rows, inner))
    return x_UI, jax.random.normal(jax.random.key(1), (inner, columns)) * 10.0 ** jnp.linspace(-1, 1, columns)


def test_integers_of_full_range_are_multiplied_exactly():
    """Largest entries of 127 make all scales 1: a product by hand, 3 * 127 - 127 * 2 = 127."""
    x_UI, w_IJ = jnp.array([[3.0, -127.0]]), jnp.array([[127.0, 0.0], [2.0, 127.0]])
    np.testing.assert_allclose(times(x_UI, make_matrix(w_IJ, jnp.float32, "int8")), [[127.0, -16129.0]], rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("quantize", QUANTIZED)
def test_a_quantised_product_is_off_by_rounding_only(quantize, rows):
    """Each column by its own scale: half a step of the row and of the column times what they are multiplied by."""
    x_UI, w_IJ = _drawn(rows)
    got = times(x_UI, make_matrix(w_IJ, jnp.float32, quantize))
    step = 1 / 127 if quantize == "int8" else 1 / 8  # of the largest entry; of every entry: three bits of mantissa
    largest_U1, largest_J = jnp.abs(x_UI).max(1, keepdims=True), jnp.abs(w_IJ).max(0)
    allowed_UJ = step / 2 * (largest_U1 * jnp.abs(w_IJ).sum(0) + jnp.abs(x_UI).sum(1, keepdims=True) * largest_J * 1.1)
    error_UJ = np.abs(got - x_UI @ w_IJ)
    assert (error_UJ <= allowed_UJ).all() and error_UJ.max() > 0
    assert np.linalg.norm(error_UJ / largest_J) / np.linalg.norm(x_UI @ w_IJ / largest_J) < (0.02, 0.06)[step > 0.1]


@pytest.mark.parametrize("quantize", [None, *QUANTIZED])
def test_parts_side_by_side_and_matrices_of_a_stack_are_multiplied_as_each_alone(quantize):
    x_UI, w_IJ = _drawn(2)
    whole = times(x_UI, make_matrix(w_IJ, jnp.float32, quantize))
    parts = joined([make_matrix(part, jnp.float32, quantize) for part in (w_IJ[:, :4], w_IJ[:, 4:])])
    np.testing.assert_array_equal(times(x_UI, parts), whole)
    for product in ("dot", "reduction"):
        stack = make_matrix(jnp.stack([w_IJ, -w_IJ]), jnp.float32, quantize, product)
        own = times_own(x_UI, stack, jnp.array([1, 0]))
        kept = make_matrix(w_IJ, jnp.float32, quantize)
        as_float = kept.values_JI.T.astype(jnp.float32) * (1.0 if kept.scale_J is None else kept.scale_J)
        np.testing.assert_allclose(own, (x_UI @ as_float) * jnp.array([[-1.0], [1.0]]), rtol=2e-5, atol=1e-4)


def test_an_unknown_format_is_one_line():
    with pytest.raises(CallerError, match="quantize='int3' must be in"):
        make_matrix(jnp.ones((2, 2)), jnp.float32, "int3")
