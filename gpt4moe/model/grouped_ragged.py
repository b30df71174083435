"""The grouped product by `jax.lax.ragged_dot`: behind the contract of `grouped_matmul.Implementation`.

One instruction on a TPU v5p; elsewhere (v5e and v6e too, libtpu 0.0.52) XLA multiplies every row by every expert's
matrix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from gpt4moe.model.blocks import Blocks
from gpt4moe.types import Array

_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def forward(x_XCD: Float[Array, "X C D"], w_EDF: Float[Array, "E D F"], blocks: Blocks) -> Float[Array, "X C F"]:
    """Returns each block in use times its expert's matrix."""
    sizes_E = x_XCD.shape[1] * blocks.counts_E(len(w_EDF))
    x_SD = x_XCD.reshape(-1, x_XCD.shape[-1])
    y_SF = jax.lax.ragged_dot(x_SD, w_EDF, sizes_E, preferred_element_type=jnp.float32)
    return y_SF.astype(x_XCD.dtype).reshape(*x_XCD.shape[:2], -1)


def rows_gradient(dy_XCF: Float[Array, "X C F"], w_EDF: Float[Array, "E D F"], blocks: Blocks) -> Float[Array, "X C D"]:
    """Returns each block in use times the transpose of its expert's matrix."""
    return forward(dy_XCF, w_EDF.swapaxes(1, 2), blocks)


def matrices_gradient(
    x_XCD: Float[Array, "X C D"], dy_XCF: Float[Array, "X C F"], blocks: Blocks, num_experts: int
) -> Float32[Array, "E D F"]:
    """Returns, for each expert, the sum over its blocks of rows^T dy."""
    sizes_E = x_XCD.shape[1] * blocks.counts_E(num_experts)
    operands = (x.reshape(-1, x.shape[-1]) for x in (x_XCD, dy_XCF))
    return jax.lax.ragged_dot_general(*operands, sizes_E, _OVER_ROWS, preferred_element_type=jnp.float32)
