"""A matrix as decoding multiplies by it: in a float dtype, or as int8 (fp8) with a scale for every column.

In: float32 parameters. Out: `Matrix`, and `times`, the product of rows with it in float32. Rows are rounded to the
matrix's dtype; to integers with a scale for every row, so that both operands are integers (W8A8): XLA:CPU multiplies
integers twice as fast as bfloat16, but would convert a matrix of integers to floats whole before every product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Shaped

from gpt4moe.config.check import require
from gpt4moe.types import Array

# By name: the dtype that is stored and its largest finite value.
QUANTIZED = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}
TINY = 1e-30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matrix:
    """values [*stack, I, J]; scale [*stack, J] float32 is what a column was divided by, None where it was not."""

    values: Shaped[Array, "*stack I J"]
    scale_J: Float32[Array, "*stack J"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the values."""
        return self.values.shape

    def at(self, index: int | Array) -> Matrix:
        """Returns one matrix of a stack."""
        return jax.tree.map(lambda leaf: leaf[index], self)


def make_matrix(w: Float[Array, "*stack I J"], dtype: jnp.dtype, quantize: str | None) -> Matrix:
    """Returns `w` in `dtype`, or by columns in what `quantize` names ("int8", "fp8"), the largest entry at its end.

    Raises `CallerError` for another name.
    """
    if quantize is None:
        return Matrix(w.astype(dtype))
    require(quantize in QUANTIZED, "quantize", quantize, f"must be in {(None, *QUANTIZED)}")
    stored, largest = QUANTIZED[quantize]
    w_float = w.astype(jnp.float32)
    scale_J = jnp.maximum(jnp.max(jnp.abs(w_float), axis=-2), TINY) / largest
    return Matrix(_rounded(w_float / scale_J[..., None, :], stored), scale_J)


def joined(matrices: Sequence[Matrix]) -> Matrix:
    """Returns matrices with the same rows side by side."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *matrices)


def times(x_UI: Float[Array, "U I"], matrix: Matrix) -> Float32[Array, "U J"]:
    """Returns the product of rows with a matrix."""
    values = matrix.values
    if values.dtype == jnp.float32:
        return jnp.dot(x_UI.astype(jnp.float32), values)
    if matrix.scale_J is None:
        return _product(x_UI.astype(values.dtype), values)
    rows_UI, scale_U1 = quantized_rows(x_UI, values.dtype)
    return _product(rows_UI, values).astype(jnp.float32) * scale_U1 * matrix.scale_J


def quantized_rows(x_UI: Float[Array, "U I"], dtype: jnp.dtype) -> tuple[Shaped[Array, "U I"], Float32[Array, "U 1"]]:
    """Returns rows in an integer (fp8) dtype and what each was divided by."""
    largest = next(largest for stored, largest in QUANTIZED.values() if stored == dtype)
    x_float = x_UI.astype(jnp.float32)
    scale_U1 = jnp.maximum(jnp.max(jnp.abs(x_float), axis=-1, keepdims=True), TINY) / largest
    return _rounded(x_float / scale_U1, dtype), scale_U1


def _rounded(x: Array, dtype: jnp.dtype) -> Array:
    return (jnp.round(x) if jnp.issubdtype(dtype, jnp.integer) else x).astype(dtype)


def _product(x_UI: Array, w_IJ: Array) -> Array:
    """In float32, or int32 of integers. A single row is multiplied twice: XLA:CPU has no fast path for one."""
    exact = jnp.int32 if jnp.issubdtype(w_IJ.dtype, jnp.integer) else jnp.float32
    num = len(x_UI)
    if num == 1:
        x_UI = jnp.concatenate([x_UI, x_UI])
    return jnp.dot(x_UI, w_IJ, preferred_element_type=exact)[:num]
