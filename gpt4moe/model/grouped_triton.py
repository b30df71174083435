"""The grouped product as Pallas kernels for a GPU (Triton): behind the contract of `grouped_matmul.Implementation`.

One program of the kernel makes one tile of the result: it reads which expert its block belongs to and goes over the
summed dim in a loop, which for a block that is not in use has no rounds. float32 operands are multiplied as
`jax_default_matmul_precision` says: by default as XLA's own products are, in TF32.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Float32

from gpt4moe.model.blocks import Blocks, Shaped
from gpt4moe.model.product import product_over
from gpt4moe.types import Array

# A tensor core multiplies at least this many rows and columns.
LEAST = 16
# Blocks that share the tiles of a matrix's columns in the cache: programs go over them before the next columns.
NEIGHBOURS = 8


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Bounds of the tiles, powers of two: columns of a result, rows or columns summed over at once, rows of a gradient.

    stages: how many rounds' tiles are under way.
    """

    columns: int
    summed: int
    gradient_rows: int
    stages: int


# The tiles of all rounds under way lie in shared memory: 96 KiB on a Hopper, 64 KiB on an Ampere.
HALF_TILES, FULL_TILES = Tiles(128, 64, 128, stages=3), Tiles(64, 32, 64, stages=3)


def forward(
    x_XCD: Float[Array, "X C D"],
    w_EDF: Float[Array, "E D F"],
    blocks: Blocks,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "X C F"]:
    """Returns each block in use times its expert's matrix."""
    return _product(x_XCD, w_EDF, blocks, tiles, interpret, transposed=False)


def rows_gradient(
    dy_XCF: Float[Array, "X C F"],
    w_EDF: Float[Array, "E D F"],
    blocks: Blocks,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "X C D"]:
    """Returns each block in use times the transpose of its expert's matrix, which is read as it lies."""
    return _product(dy_XCF, w_EDF, blocks, tiles, interpret, transposed=True)


def matrices_gradient(
    x_XCD: Float[Array, "X C D"],
    dy_XCF: Float[Array, "X C F"],
    blocks: Blocks,
    num_experts: int,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float32[Array, "E D F"]:
    """Returns, for each expert, the sum over its blocks of rows^T dy; its blocks' rows lie side by side."""
    tiles = tiles or _tiles(x_XCD.dtype)
    length, dim, hidden = *x_XCD.shape[1:], dy_XCF.shape[-1]
    tile_D, tile_F = _tile(dim, tiles.gradient_rows), _tile(hidden, tiles.columns)
    ends_E = length * jnp.cumsum(blocks.counts_E(num_experts))
    chunk = max(min(length, tiles.summed), LEAST)
    kernel = functools.partial(_gradient_kernel, chunk=chunk, masked=length % chunk > 0, tile_D=tile_D, tile_F=tile_F)
    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((num_experts, dim, hidden), jnp.float32),
        grid=(num_experts * (dim // tile_D) * (hidden // tile_F),),
        compiler_params=_compiler_params(tile_D * tile_F, tiles),
        interpret=interpret,
        name="grouped_matrices_gradient",
    )(jnp.append(jnp.int32(0), ends_E), x_XCD.reshape(-1, dim), dy_XCF.reshape(-1, hidden))


def lacks(x_XCD: Shaped, w_EDF: Shaped) -> str | None:
    """What these operands would need for the kernels to take them, None where they do."""
    if x_XCD.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return "float32, bfloat16 or float16 rows"
    if x_XCD.shape[1] & (x_XCD.shape[1] - 1):
        return "blocks whose number of rows is a power of two"
    if any(size % LEAST for size in w_EDF.shape[1:]):
        return f"model and hidden dims, per shard, in multiples of {LEAST}"
    return None


def _product(
    x_XCI: Array, w: Array, blocks: Blocks, tiles: Tiles | None, interpret: bool, *, transposed: bool
) -> Array:
    """Blocks [X, C, I] times matrices [E, I, J], or the transposes of matrices [E, J, I]."""
    tiles = tiles or _tiles(x_XCI.dtype)
    num, length, summed = x_XCI.shape
    kept = w.shape[1 if transposed else 2]
    tile_I, tile_J = _tile(summed, tiles.summed), _tile(kept, tiles.columns)
    kernel = functools.partial(_product_kernel, length=length, tile_I=tile_I, tile_J=tile_J, transposed=transposed)
    y_SJ = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((num * length, kept), x_XCI.dtype),
        grid=(num * (kept // tile_J),),
        compiler_params=_compiler_params(length * tile_J, tiles),
        interpret=interpret,
        name="grouped_rows_gradient" if transposed else "grouped_product",
    )(blocks.in_use.reshape(1), blocks.expert_X, x_XCI.reshape(-1, summed), w)
    return y_SJ.reshape(num, length, kept)


def _product_kernel(in_use, expert, x_SI, w, y_SJ, *, length: int, tile_I: int, tile_J: int, transposed: bool) -> None:
    num = expert.shape[0]
    block, column = _place(pl.program_id(0), num, y_SJ.shape[1] // tile_J)
    matrix = expert[block]
    rows, columns = pl.ds(block * length, max(length, LEAST)), pl.ds(column * tile_J, tile_J)
    # A block of fewer rows than a tensor core takes is read with the rows behind it, which are not written.
    own = None if length >= LEAST else (jnp.arange(LEAST) < length)[:, None]

    def add(part: Array, sum_CJ: Array) -> Array:
        summed = pl.ds(part * tile_I, tile_I)
        x_CI = plgpu.load(x_SI.at[rows, summed], mask=own, other=None if own is None else 0.0)
        tile = plgpu.load(w.at[matrix, columns, summed] if transposed else w.at[matrix, summed, columns])
        return sum_CJ + product_over(x_CI, tile, 1, 1 if transposed else 0)

    rounds = (block < in_use[0]).astype(jnp.int32) * (x_SI.shape[1] // tile_I)
    sum_CJ = jax.lax.fori_loop(0, rounds, add, jnp.zeros((max(length, LEAST), tile_J), jnp.float32))
    plgpu.store(y_SJ.at[rows, columns], sum_CJ.astype(y_SJ.dtype), mask=own)


def _place(program: Array, num_blocks: int, num_columns: int) -> tuple[Array, Array]:
    """(block, tile of columns) of a program: `NEIGHBOURS` blocks take turns at each tile of columns."""
    whole = NEIGHBOURS * num_columns
    first = program // whole * NEIGHBOURS
    neighbours = jnp.minimum(num_blocks - first, NEIGHBOURS)
    return first + program % whole % neighbours, program % whole // neighbours


def _gradient_kernel(bounds, x_SD, dy_SF, dw_EDF, *, chunk: int, masked: bool, tile_D: int, tile_F: int) -> None:
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
        return sum_DF + product_over(load(x_SD.at[rows, own_D]), load(dy_SF.at[rows, own_F]), 0, 0)

    sum_DF = jax.lax.fori_loop(0, pl.cdiv(end - start, chunk), add, jnp.zeros((tile_D, tile_F), jnp.float32))
    plgpu.store(dw_EDF.at[expert, own_D, own_F], sum_DF)


def _tile(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides `size`."""
    return min(size & -size, most)


def _tiles(dtype: jnp.dtype) -> Tiles:
    return FULL_TILES if dtype == jnp.float32 else HALF_TILES


def _compiler_params(results: int, tiles: Tiles) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=8 if results >= 128 * 128 else 4, num_stages=tiles.stages)
