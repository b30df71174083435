"""A matrix as decoding multiplies by it: in a float dtype, or as int8 (fp8) with a scale for every column.

In: float32 parameters. Out: `Matrix`, and `times`, the product of rows with it in float32. Rows are rounded to the
matrix's dtype; to integers with a scale for every row, so that both operands are integers (W8A8): XLA:CPU multiplies
integers twice as fast as bfloat16, but would convert a matrix of integers to floats whole before every product. Where
this machine has a product of its own for them (`int8_product`), a `Matrix` of int8 becomes a `PackedMatrix`.
What a column of the parameters holds lies side by side here: few rows are multiplied up to twice as fast so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int, Shaped, UInt8

from gpt4moe.config.check import require
from gpt4moe.infer import int8_product
from gpt4moe.parallel.island import Axes
from gpt4moe.types import Array

# By name: the dtype that is stored and its largest finite value.
QUANTIZED = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}
TINY = 1e-30
# Rows up to which a `Matrix.product` other than `dot` is used: more share what they read.
FEW_ROWS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix [I, J], or a stack, as its transpose: values_JI; scale_J is what a column was divided by, or None.

    product: how few rows are multiplied, one of `PRODUCTS`; more are always multiplied by `dot`.
    """

    values_JI: Shaped[Array, "*stack J I"]
    scale_J: Float32[Array, "*stack J"] | None = None
    product: str = dataclasses.field(default="dot", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A `Matrix` of int8 in the panels of `gpt4moe.infer.int8_product`."""

    panels_PQB: UInt8[Array, "P Q 64"]
    scale_J: Float32[Array, " J"]
    num_inner: int = dataclasses.field(metadata={"static": True})


def make_matrix(
    w_IJ: Float[Array, "*stack I J"], dtype: jnp.dtype, quantize: str | None, product: str = "dot"
) -> Matrix:
    """Returns `w_IJ` in `dtype`, or by columns in what `quantize` names ("int8", "fp8"), the largest entry at its end.

    Raises `CallerError` for another name.
    """
    w_JI = jnp.swapaxes(w_IJ, -1, -2)
    if quantize is None:
        return Matrix(w_JI.astype(dtype), None, product)
    require(quantize in QUANTIZED, "quantize", quantize, f"must be in {(None, *QUANTIZED)}")
    stored, largest = QUANTIZED[quantize]
    scale_J = jnp.maximum(jnp.max(jnp.abs(w_JI), axis=-1).astype(jnp.float32), TINY) / largest
    return Matrix(_rounded(w_JI.astype(jnp.float32) / scale_J[..., None], stored), scale_J, product)


def joined(matrices: Sequence[Matrix]) -> Matrix:
    """Returns matrices with the same rows side by side."""
    values_JI = jnp.concatenate([matrix.values_JI for matrix in matrices], axis=-2)
    if matrices[0].scale_J is None:
        return Matrix(values_JI, None, matrices[0].product)
    scale_J = jnp.concatenate([matrix.scale_J for matrix in matrices], axis=-1)
    return Matrix(values_JI, scale_J, matrices[0].product)


def pack(matrix: Matrix) -> Matrix | PackedMatrix:
    """Returns a matrix of int8 packed, another as it is."""
    values_JI = matrix.values_JI
    if values_JI.dtype != jnp.int8 or values_JI.ndim > 2 or values_JI.shape[-1] > int8_product.MOST_SUMMED:
        return matrix
    return PackedMatrix(int8_product.packed(values_JI), matrix.scale_J, values_JI.shape[-1])


def unpack(matrix: Matrix | PackedMatrix) -> Matrix:
    """The inverse of `pack`."""
    if isinstance(matrix, Matrix):
        return matrix
    values_JI = int8_product.unpacked(matrix.panels_PQB, len(matrix.scale_J), matrix.num_inner)
    return Matrix(values_JI, matrix.scale_J)


def times(x_UI: Float[Array, "U I"], matrix: Matrix | PackedMatrix, split: Axes = ()) -> Float32[Array, "U J"]:
    """Returns the product of rows with a matrix.

    split: mesh axes along which devices hold parts of I; each gets a part of the sum, which nobody has added up.
    """
    if isinstance(matrix, PackedMatrix):
        return int8_product.multiply(x_UI, matrix.panels_PQB, matrix.scale_J)
    if matrix.product != "dot" and len(x_UI) <= FEW_ROWS:
        stack = jax.tree.map(lambda leaf: leaf[None], matrix)
        return times_own(x_UI, stack, jnp.zeros(len(x_UI), jnp.int32))
    stored = matrix.values_JI.dtype
    if matrix.scale_J is None:
        return _product(x_UI.astype(stored), matrix.values_JI)
    rows_UI, scale_U1 = quantized_rows(x_UI, stored, split)
    return _product(rows_UI, matrix.values_JI).astype(jnp.float32) * scale_U1 * matrix.scale_J


def times_own(x_SI: Float[Array, "S I"], stack: Matrix, matrix_S: Int[Array, " S"]) -> Float32[Array, "S J"]:
    """Returns each row times the matrix of its number in a stack; quantised ones are multiplied as floats."""
    y_SJ = PRODUCTS[stack.product](x_SI, stack.values_JI, matrix_S)
    return y_SJ if stack.scale_J is None else y_SJ * stack.scale_J[matrix_S]


def _by_dot(x_SI: Array, w_EJI: Array, matrix_S: Array) -> Array:
    """A copy of each row's matrix, and a batched product."""
    own_SJI = w_EJI[matrix_S].astype(x_SI.dtype)
    return jnp.einsum("SI,SJI->SJ", x_SI, own_SJI, preferred_element_type=jnp.float32)


def _by_reduction(x_SI: Array, w_EJI: Array, matrix_S: Array) -> Array:
    """Sums of elementwise products, which XLA fuses with the reading of the matrix."""
    sums = []
    for row, x_I in enumerate(x_SI.astype(jnp.float32)):
        own_JI = jax.lax.dynamic_index_in_dim(w_EJI, matrix_S[row], keepdims=False)
        sums.append(jnp.sum(own_JI.astype(jnp.float32) * x_I, axis=-1))
    return jnp.stack(sums)


PRODUCTS = {"dot": _by_dot, "reduction": _by_reduction}


def quantized_rows(
    x_UI: Float[Array, "U I"], dtype: jnp.dtype, split: Axes = ()
) -> tuple[Shaped[Array, "U I"], Float32[Array, "U 1"]]:
    """Returns rows in an integer (fp8) dtype and what each was divided by, that of the whole row where it is split."""
    largest = next(largest for stored, largest in QUANTIZED.values() if stored == dtype)
    x_float = x_UI.astype(jnp.float32)
    largest_U1 = jnp.max(jnp.abs(x_float), axis=-1, keepdims=True)
    if split:
        largest_U1 = jax.lax.pmax(largest_U1, split)
    scale_U1 = jnp.maximum(largest_U1, TINY) / largest
    return _rounded(x_float / scale_U1, dtype), scale_U1


def _rounded(x: Array, dtype: jnp.dtype) -> Array:
    return (jnp.round(x) if jnp.issubdtype(dtype, jnp.integer) else x).astype(dtype)


def _product(x_UI: Array, w_JI: Array) -> Array:
    """In float32, or int32 of integers. A single row is multiplied twice: XLA:CPU has a fast path for float32 alone."""
    exact = jnp.int32 if jnp.issubdtype(w_JI.dtype, jnp.integer) else jnp.float32
    num = len(x_UI)
    if num == 1 and w_JI.dtype != jnp.float32:
        x_UI = jnp.concatenate([x_UI, x_UI])
    summed = ((1,), (1,)), ((), ())
    return jax.lax.dot_general(x_UI, w_JI, summed, preferred_element_type=exact)[:num]
