"""Rows, each times a matrix of its own out of a stack, as a Pallas kernel for a GPU (Triton).

For a token or two, where reading the matrices is what takes the time: one program makes a few columns of one row and
reads their part of the row's own matrix, found by number, so that no other matrix is read and none is copied.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float32, Int, Shaped

from gpt4moe.types import Array


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Bounds of a tile, powers of two: columns of the result, entries of a column read at once; warps of a program."""

    columns: int = 16
    summed: int = 512
    warps: int = 4


def multiply(
    x_SI: Shaped[Array, "S I"],
    w_EJI: Shaped[Array, "E J I"],
    matrix_S: Int[Array, " S"],
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float32[Array, "S J"]:
    """Returns row s times the transpose of matrix `matrix_S[s]`, summed in float32; matrices of any dtype."""
    tiles = tiles or Tiles()
    num, columns = len(x_SI), w_EJI.shape[1]
    tile_J, tile_I = _tile(columns, tiles.columns), _tile(x_SI.shape[1], tiles.summed)
    kernel = functools.partial(_kernel, tile_J=tile_J, tile_I=tile_I)
    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((num, columns), jnp.float32),
        grid=(num * (columns // tile_J),),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=2),
        interpret=interpret,
        name="rows_times_own_matrix",
    )(matrix_S, x_SI, w_EJI)


def _kernel(matrix_S, x_SI, w_EJI, y_SJ, *, tile_J: int, tile_I: int) -> None:
    tiles_of_row = y_SJ.shape[1] // tile_J
    row, tile = pl.program_id(0) // tiles_of_row, pl.program_id(0) % tiles_of_row
    matrix, columns = matrix_S[row], pl.ds(tile * tile_J, tile_J)

    def add(part: Array, sum_JI: Array) -> Array:
        summed = pl.ds(part * tile_I, tile_I)
        x_I = plgpu.load(x_SI.at[row, summed]).astype(jnp.float32)
        return sum_JI + plgpu.load(w_EJI.at[matrix, columns, summed]).astype(jnp.float32) * x_I[None]

    # Summed over its columns once, at the end: threads need not wait for each other in between.
    sum_JI = jax.lax.fori_loop(0, x_SI.shape[1] // tile_I, add, jnp.zeros((tile_J, tile_I), jnp.float32))
    plgpu.store(y_SJ.at[row, columns], jnp.sum(sum_JI, axis=1))


def _tile(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides `size`."""
    return min(size & -size, most)
