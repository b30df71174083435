"""The grouped product by `jax.lax.ragged_dot`: behind the contract of `grouped_matmul.Implementation`.

One instruction on a TPU v5p; XLA multiplies every row by every expert's matrix elsewhere (libtpu 0.0.52: v5e and v6e).
Blocks go up by expert.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from gpt4moe.types import Array

_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def forward(
    rows_XCD: Float[Array, "X C D"],
    matrices_EDF: Float[Array, "E D F"],
    block_expert_X: Int[Array, " X"],
    num_blocks: Int[Array, ""],
) -> Float[Array, "X C F"]:
    """Returns each block in use times its expert's matrix."""
    sizes_E = _rows_of_experts(rows_XCD, len(matrices_EDF), block_expert_X, num_blocks)
    rows_SD = rows_XCD.reshape(-1, rows_XCD.shape[-1])
    y_SF = jax.lax.ragged_dot(rows_SD, matrices_EDF, sizes_E, preferred_element_type=jnp.float32)
    return y_SF.astype(rows_XCD.dtype).reshape(*rows_XCD.shape[:2], -1)


def rows_gradient(
    dy_XCF: Float[Array, "X C F"],
    matrices_EDF: Float[Array, "E D F"],
    block_expert_X: Int[Array, " X"],
    num_blocks: Int[Array, ""],
) -> Float[Array, "X C D"]:
    """Returns each block in use times the transpose of its expert's matrix."""
    return forward(dy_XCF, matrices_EDF.swapaxes(1, 2), block_expert_X, num_blocks)


def matrices_gradient(
    rows_XCD: Float[Array, "X C D"],
    dy_XCF: Float[Array, "X C F"],
    block_expert_X: Int[Array, " X"],
    num_blocks: Int[Array, ""],
    num_experts: int,
) -> Float32[Array, "E D F"]:
    """Returns, for each expert, the sum over its blocks of rows^T dy."""
    sizes_E = _rows_of_experts(rows_XCD, num_experts, block_expert_X, num_blocks)
    operands = (x.reshape(-1, x.shape[-1]) for x in (rows_XCD, dy_XCF))
    return jax.lax.ragged_dot_general(*operands, sizes_E, _OVER_ROWS, preferred_element_type=jnp.float32)


def _rows_of_experts(rows_XCD: Array, num_experts: int, block_expert_X: Array, num_blocks: Array) -> Array:
    in_use_X = jnp.arange(len(rows_XCD)) < num_blocks
    blocks_E = jnp.sum((block_expert_X == jnp.arange(num_experts)[:, None]) & in_use_X, axis=1, dtype=jnp.int32)
    return blocks_E * rows_XCD.shape[1]
