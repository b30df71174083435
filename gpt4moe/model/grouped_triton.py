"""The grouped product as Pallas kernels for a GPU (Triton): behind the contract of `grouped_matmul.Implementation`.

One program of the kernel makes one tile of the result: it reads which expert its block belongs to and goes over the
summed dim in a loop, which for a block that is not in use has no rounds. float32 operands are multiplied in float32.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Float32, Int

from gpt4moe.types import Array

Shaped = Array | jax.ShapeDtypeStruct

# A tensor core multiplies at least this many rows and columns.
LEAST = 16
# Blocks that share the tiles of a matrix's columns in the cache: programs go over them before the next columns.
NEIGHBOURS = 8


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Largest tile of result columns and of the summed dim, both powers of two, and how many tiles are under way."""

    kept: int
    summed: int
    stages: int


# The tiles of `stages` rounds lie in shared memory at once: under 99 KiB, which every GPU since Ampere has.
HALF_TILES, FULL_TILES = Tiles(128, 64, 3), Tiles(64, 32, 3)


def forward(
    rows_XCD: Float[Array, "X C D"],
    matrices_EDF: Float[Array, "E D F"],
    block_expert_X: Int[Array, " X"],
    num_blocks: Int[Array, ""],
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "X C F"]:
    """Returns each block in use times its expert's matrix."""
    return _product(rows_XCD, matrices_EDF, block_expert_X, num_blocks, tiles, interpret, transposed=False)


def rows_gradient(
    dy_XCF: Float[Array, "X C F"],
    matrices_EDF: Float[Array, "E D F"],
    block_expert_X: Int[Array, " X"],
    num_blocks: Int[Array, ""],
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "X C D"]:
    """Returns each block in use times the transpose of its expert's matrix, which is read as it lies."""
    return _product(dy_XCF, matrices_EDF, block_expert_X, num_blocks, tiles, interpret, transposed=True)


def matrices_gradient(
    rows_XCD: Float[Array, "X C D"],
    dy_XCF: Float[Array, "X C F"],
    block_expert_X: Int[Array, " X"],
    num_blocks: Int[Array, ""],
    num_experts: int,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float32[Array, "E D F"]:
    """Returns, for each expert, the sum over its blocks of rows^T dy; its blocks' rows lie side by side."""
    tiles = tiles or _tiles(rows_XCD.dtype)
    length, dim, hidden = *rows_XCD.shape[1:], dy_XCF.shape[-1]
    tile_D, tile_F = _tile(dim, tiles.kept), _tile(hidden, tiles.kept)
    in_use_X = jnp.arange(len(rows_XCD)) < num_blocks
    own_EX = (block_expert_X == jnp.arange(num_experts)[:, None]) & in_use_X
    ends_E = length * jnp.cumsum(jnp.sum(own_EX, axis=1, dtype=jnp.int32))
    chunk = max(min(length, tiles.summed), LEAST)
    kernel = functools.partial(_gradient_kernel, chunk=chunk, masked=length % chunk > 0, tile_D=tile_D, tile_F=tile_F)
    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((num_experts, dim, hidden), jnp.float32),
        grid=(num_experts * (dim // tile_D) * (hidden // tile_F),),
        compiler_params=_compiler_params(tile_D * tile_F, tiles),
        interpret=interpret,
        name="grouped_matrices_gradient",
    )(jnp.append(jnp.int32(0), ends_E), rows_XCD.reshape(-1, dim), dy_XCF.reshape(-1, hidden))


def lacks(rows_XCD: Shaped, w_EDF: Shaped) -> str | None:
    """What these operands would need for the kernels to take them, None where they do."""
    if rows_XCD.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return "float32, bfloat16 or float16 rows"
    if rows_XCD.shape[1] & (rows_XCD.shape[1] - 1):
        return "blocks whose number of rows is a power of two"
    if any(size % LEAST for size in w_EDF.shape[1:]):
        return f"model and hidden dims, per shard, in multiples of {LEAST}"
    return None


def _product(
    rows_XCI: Array, matrices: Array, block_expert_X: Array, num_blocks: Array, tiles: Tiles | None, interpret: bool, *,
    transposed: bool,
) -> Array:  # fmt: skip
    """Blocks [X, C, I] times matrices [E, I, J], or the transposes of matrices [E, J, I]."""
    tiles = tiles or _tiles(rows_XCI.dtype)
    num, length, summed = rows_XCI.shape
    kept = matrices.shape[1 if transposed else 2]
    tile_I, tile_J = _tile(summed, tiles.summed), _tile(kept, tiles.kept)
    kernel = functools.partial(_product_kernel, length=length, tile_I=tile_I, tile_J=tile_J, transposed=transposed)
    y_SJ = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((num * length, kept), rows_XCI.dtype),
        grid=(num * (kept // tile_J),),
        compiler_params=_compiler_params(length * tile_J, tiles),
        interpret=interpret,
        name="grouped_rows_gradient" if transposed else "grouped_product",
    )(num_blocks.reshape(1), block_expert_X, rows_XCI.reshape(-1, summed), matrices)
    return y_SJ.reshape(num, length, kept)


def _product_kernel(
    in_use, expert, rows_SI, matrices, y_SJ, *, length: int, tile_I: int, tile_J: int, transposed: bool
) -> None:
    num = expert.shape[0]
    block, column = _place(pl.program_id(0), num, y_SJ.shape[1] // tile_J)
    matrix = expert[block]
    rows, columns = pl.ds(block * length, max(length, LEAST)), pl.ds(column * tile_J, tile_J)
    # A block of fewer rows than a tensor core takes is read with the rows behind it, which are not written.
    own = None if length >= LEAST else (jnp.arange(LEAST) < length)[:, None]

    def add(part: Array, sum_CJ: Array) -> Array:
        summed = pl.ds(part * tile_I, tile_I)
        rows_CI = plgpu.load(rows_SI.at[rows, summed], mask=own, other=None if own is None else 0.0)
        tile = plgpu.load(matrices.at[matrix, columns, summed] if transposed else matrices.at[matrix, summed, columns])
        return sum_CJ + _dot(rows_CI, tile, 1, 1 if transposed else 0)

    rounds = jnp.where(block < in_use[0], rows_SI.shape[1] // tile_I, 0)
    sum_CJ = jax.lax.fori_loop(0, rounds, add, jnp.zeros((max(length, LEAST), tile_J), jnp.float32))
    plgpu.store(y_SJ.at[rows, columns], sum_CJ.astype(y_SJ.dtype), mask=own)


def _place(program: Array, num_blocks: int, num_columns: int) -> tuple[Array, Array]:
    """(block, tile of columns) of a program: `NEIGHBOURS` blocks take turns at each tile of columns."""
    whole = NEIGHBOURS * num_columns
    first = program // whole * NEIGHBOURS
    neighbours = jnp.minimum(num_blocks - first, NEIGHBOURS)
    return first + program % whole % neighbours, program % whole // neighbours


def _gradient_kernel(bounds, rows_SD, dy_SF, dw_EDF, *, chunk: int, masked: bool, tile_D: int, tile_F: int) -> None:
    parts_D, parts_F = dw_EDF.shape[1] // tile_D, dw_EDF.shape[2] // tile_F
    program = pl.program_id(0)
    expert, part = program // (parts_D * parts_F), program % (parts_D * parts_F)
    own_D, own_F = pl.ds(part // parts_F * tile_D, tile_D), pl.ds(part % parts_F * tile_F, tile_F)
    start, end = bounds[expert], bounds[expert + 1]

    def add(index: Array, sum_DF: Array) -> Array:
        first = start + index * chunk
        rows = pl.ds(first, chunk)
        own = (first + jnp.arange(chunk) < end)[:, None] if masked else None
        load = functools.partial(plgpu.load, mask=own, other=0.0 if masked else None)
        return sum_DF + _dot(load(rows_SD.at[rows, own_D]), load(dy_SF.at[rows, own_F]), 0, 0)

    sum_DF = jax.lax.fori_loop(0, pl.cdiv(end - start, chunk), add, jnp.zeros((tile_D, tile_F), jnp.float32))
    plgpu.store(dw_EDF.at[expert, own_D, own_F], sum_DF)


def _dot(a: Array, b: Array, a_dim: int, b_dim: int) -> Array:
    return jax.lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32)


def _tile(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides `size`."""
    return min(size & -size, most)


def _tiles(dtype: jnp.dtype) -> Tiles:
    return FULL_TILES if dtype == jnp.float32 else HALF_TILES


def _compiler_params(results: int, tiles: Tiles) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=8 if results >= 128 * 128 else 4, num_stages=tiles.stages)
