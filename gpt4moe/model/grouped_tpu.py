"""The grouped product as Pallas kernels for a TPU: behind the contract of `grouped_matmul.Implementation`.

Experts and the number of blocks are prefetched scalars: they choose which tile of which matrix is copied in, and a
block that is not in use copies nothing and multiplies nothing. Blocks go up by expert, so that consecutive blocks of
one expert find its tile where it is (megablox, the TPU kernel of MegaBlocks, Gale et al. 2022, is the model).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Float32

from gpt4moe.model.blocks import Blocks, Shaped
from gpt4moe.model.product import product_over
from gpt4moe.types import Array

LANES = 128
# Columns of a tile, and bytes of one of a matrix: two of them, of rows and of results lie in the fast memory at once.
COLUMNS, MATRIX_TILE_BYTES = 512, 12 * 2**20
# Rows and columns of a tile of a matrix's gradient, which stays while its expert's blocks pass.
GRADIENT_TILE = 1024
FAST_MEMORY_BYTES = 56 * 2**20


def forward(
    x_XCD: Float[Array, "X C D"],
    w_EDF: Float[Array, "E D F"],
    blocks: Blocks,
    tile: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "X C F"]:
    """Returns each block in use times its expert's matrix; `tile`, in tests, bounds both dims of a matrix's tile."""
    return _product(x_XCD, w_EDF, blocks, tile, interpret, transposed=False)


def rows_gradient(
    dy_XCF: Float[Array, "X C F"],
    w_EDF: Float[Array, "E D F"],
    blocks: Blocks,
    tile: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "X C D"]:
    """Returns each block in use times the transpose of its expert's matrix, which is read as it lies."""
    return _product(dy_XCF, w_EDF, blocks, tile, interpret, transposed=True)


def matrices_gradient(
    x_XCD: Float[Array, "X C D"],
    dy_XCF: Float[Array, "X C F"],
    blocks: Blocks,
    num_experts: int,
    tile: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float32[Array, "E D F"]:
    """Returns, for each expert, the sum over its blocks of rows^T dy, in steps: a block, or zeros where it has none."""
    (length, dim), hidden = x_XCD.shape[1:], dy_XCF.shape[-1]
    tile_D, tile_F = (_tile(size, tile or GRADIENT_TILE) for size in (dim, hidden))
    steps = _steps(blocks, num_experts)
    return pl.pallas_call(
        _gradient_kernel,
        jax.ShapeDtypeStruct((num_experts, dim, hidden), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(dim // tile_D, hidden // tile_F, len(steps[0])),
            in_specs=[
                pl.BlockSpec((None, length, tile_D), lambda i, j, step, expert, block, used: (block[step], 0, i)),
                pl.BlockSpec((None, length, tile_F), lambda i, j, step, expert, block, used: (block[step], 0, j)),
            ],
            out_specs=pl.BlockSpec((None, tile_D, tile_F), lambda i, j, step, expert, *_: (expert[step], i, j)),
        ),
        compiler_params=_compiler_params("parallel", "parallel", "arbitrary"),
        cost_estimate=_cost(x_XCD, hidden, dy_XCF, num_experts * dim * hidden * 4),
        interpret=interpret,
        name="grouped_matrices_gradient",
    )(*steps, x_XCD, dy_XCF)


def lacks(x_XCD: Shaped, w_EDF: Shaped) -> str | None:
    """What these operands would need for the kernels to take them, None where they do."""
    if x_XCD.dtype not in (jnp.float32, jnp.bfloat16):
        return "float32 or bfloat16 rows"
    if any(size % LANES for size in w_EDF.shape[1:]):
        return f"model and hidden dims, per shard, in multiples of {LANES}"
    return None


def _product(
    x_XCI: Array,
    w: Array,
    blocks: Blocks,
    tile: int | None,
    interpret: bool | pltpu.InterpretParams,
    *,
    transposed: bool,
) -> Array:
    """Blocks [X, C, I] times matrices [E, I, J], or the transposes of matrices [E, J, I]."""
    num, length, summed = x_XCI.shape
    kept = w.shape[1 if transposed else 2]
    tile_J = _tile(kept, tile or COLUMNS)
    tile_I = _tile(summed, tile or MATRIX_TILE_BYTES // (tile_J * x_XCI.dtype.itemsize))
    parts = summed // tile_I

    def place(block: Array, part: Array, in_use) -> tuple[Array, Array]:
        """What is copied in for this block: for one that is not in use, what is there already."""
        used = block < in_use[0]
        return jnp.where(used, block, jnp.maximum(in_use[0] - 1, 0)), jnp.where(used, part, parts - 1)

    def matrix_index(j: Array, block: Array, part: Array, in_use, expert) -> tuple:
        there, i = place(block, part, in_use)
        return (expert[there], j, i) if transposed else (expert[there], i, j)

    def rows_index(_j: Array, block: Array, part: Array, in_use, _expert) -> tuple:
        there, i = place(block, part, in_use)
        return there, 0, i

    return pl.pallas_call(
        functools.partial(_product_kernel, parts=parts, summed_dim=1 if transposed else 0),
        jax.ShapeDtypeStruct((num, length, kept), x_XCI.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(kept // tile_J, num, parts),
            in_specs=[
                pl.BlockSpec((None, length, tile_I), rows_index),
                pl.BlockSpec((None, *((tile_J, tile_I) if transposed else (tile_I, tile_J))), matrix_index),
            ],
            out_specs=pl.BlockSpec((None, length, tile_J), lambda j, block, part, *_: (block, 0, j)),
            scratch_shapes=[pltpu.VMEM((length, tile_J), jnp.float32)],
        ),
        compiler_params=_compiler_params("parallel", "arbitrary", "arbitrary"),
        cost_estimate=_cost(x_XCI, kept, w, num * length * kept * x_XCI.dtype.itemsize),
        interpret=interpret,
        name="grouped_rows_gradient" if transposed else "grouped_product",
    )(blocks.in_use.reshape(1), blocks.expert_X, x_XCI, w)


def _product_kernel(in_use, _expert, x_CI, w, y_CJ, sum_CJ, *, parts: int, summed_dim: int) -> None:
    block, part = pl.program_id(1), pl.program_id(2)

    @pl.when(part == 0)
    def _() -> None:
        sum_CJ[...] = jnp.zeros_like(sum_CJ)

    @pl.when(block < in_use[0])
    def _() -> None:
        sum_CJ[...] += product_over(x_CI[...], w[...], 1, summed_dim)

    @pl.when(part == parts - 1)
    def _() -> None:
        y_CJ[...] = sum_CJ[...].astype(y_CJ.dtype)


def _gradient_kernel(expert, _block, used, x_CD, dy_CF, dw_DF) -> None:
    step = pl.program_id(2)

    @pl.when((step == 0) | (expert[jnp.maximum(step - 1, 0)] != expert[step]))
    def _() -> None:
        dw_DF[...] = jnp.zeros_like(dw_DF)

    @pl.when(used[step] == 1)
    def _() -> None:
        dw_DF[...] += product_over(x_CD[...], dy_CF[...], 0, 0)


def _steps(blocks: Blocks, num_experts: int) -> tuple[Array, Array, Array]:
    """(expert, block, whether the block counts) of every step: an expert's blocks, at least one step for each expert.

    Steps beyond the last stay where it was.
    """
    blocks_E = blocks.counts_E(num_experts)
    steps_E = jnp.maximum(blocks_E, 1)
    ends_E, first_block_E = jnp.cumsum(steps_E), jnp.cumsum(blocks_E) - blocks_E
    step = jnp.arange(len(blocks.expert_X) + num_experts, dtype=jnp.int32)
    expert = jnp.minimum(jnp.sum(ends_E <= step[:, None], axis=1, dtype=jnp.int32), num_experts - 1)
    place = step - (ends_E - steps_E)[expert]
    block = jnp.minimum(first_block_E[expert] + place, jnp.maximum(blocks.in_use - 1, 0)).astype(jnp.int32)
    return expert, block, (place < blocks_E[expert]).astype(jnp.int32)


def _tile(size: int, most: int) -> int:
    """The largest divisor of `size` up to `most` in whole lanes."""
    lanes = min(LANES, most)
    return max((tile for tile in range(lanes, min(size, most) + 1, lanes) if size % tile == 0), default=size)


def _compiler_params(*order: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=FAST_MEMORY_BYTES)


def _cost(x_XCI: Array, columns: int, other: Array, result_bytes: int) -> pl.CostEstimate:
    """What all blocks cost, in use or not; of the FLOPs `plan.work` counts the share of those in use."""
    read = sum(x.size * x.dtype.itemsize for x in (x_XCI, other))
    return pl.CostEstimate(flops=2 * x_XCI.size * columns, transcendentals=0, bytes_accessed=read + result_bytes)
