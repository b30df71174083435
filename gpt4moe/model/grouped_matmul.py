"""Products of blocks of rows with the matrix of each block's expert, accumulated in float32, with their own VJPs.

`plain` says what the product of sorted blocks is. Implementations of it stand in one table; which one a program gets is
decided by the platform it is lowered for and by shapes, or by name. All operands enter in the rows' dtype, forward and
backward; the gradient of the matrices is summed in float32 and comes in their own dtype.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Float, Float32, Int

from gpt4moe.config.check import CallerError, require
from gpt4moe.model import grouped_loop, grouped_ragged, grouped_tpu, grouped_triton
from gpt4moe.model.blocks import Blocks, Shaped
from gpt4moe.model.product import products, products_nt, products_tn
from gpt4moe.types import Array


@jax.custom_vjp
def expert_matmul(rows_ECD: Float[Array, "E C D"], w_EDF: Float[Array, "E D F"]) -> Float[Array, "E C F"]:
    """Returns [E, C, F] in the rows' dtype: block e times matrix e."""
    return products(rows_ECD, w_EDF.astype(rows_ECD.dtype)).astype(rows_ECD.dtype)


def _expert_forward(rows_ECD: Array, w_EDF: Array) -> tuple[Array, tuple[Array, Array]]:
    return expert_matmul(rows_ECD, w_EDF), (rows_ECD, w_EDF)


def _expert_backward(residuals: tuple[Array, Array], dy_ECF: Array) -> tuple[Array, Array]:
    rows_ECD, w_EDF = residuals
    drows_ECD = products_nt(dy_ECF, w_EDF.astype(dy_ECF.dtype)).astype(rows_ECD.dtype)
    return drows_ECD, products_tn(rows_ECD, dy_ECF).astype(w_EDF.dtype)


expert_matmul.defvjp(_expert_forward, _expert_backward)


def plain(x_XCD: Float[Array, "X C D"], w_EDF: Float[Array, "E D F"], blocks: Blocks) -> Float[Array, "X C F"]:
    """Returns each block in use times its expert's matrix, 0 beyond: the definition."""
    y_XCF = products(x_XCD, w_EDF[blocks.expert_X])
    return jnp.where(blocks.used_X()[:, None, None], y_XCF, 0).astype(x_XCD.dtype)


def plain_rows_gradient(
    dy_XCF: Float[Array, "X C F"], w_EDF: Float[Array, "E D F"], blocks: Blocks
) -> Float[Array, "X C D"]:
    """Returns each block in use times the transpose of its expert's matrix, 0 beyond."""
    return plain(dy_XCF, w_EDF.swapaxes(1, 2), blocks)


def plain_matrices_gradient(
    x_XCD: Float[Array, "X C D"], dy_XCF: Float[Array, "X C F"], blocks: Blocks, num_experts: int
) -> Float32[Array, "E D F"]:
    """Returns, for each expert, the sum over its blocks in use of rows^T dy."""
    dw_XDF = jnp.where(blocks.used_X()[:, None, None], products_tn(x_XCD, dy_XCF), 0)
    return jax.ops.segment_sum(dw_XDF, blocks.expert_X, num_experts)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """Three functions that give what `plain` and its two gradients give; blocks may be relied on to go up by expert.

    platforms: where it runs, None for everywhere. lacks(x_XCD, w_EDF): what shapes and dtype it would need, None
    where it takes them. A forward pass from integers is a fourth function here, without gradients.
    """

    forward: Callable[..., Array]
    rows_gradient: Callable[..., Array]
    matrices_gradient: Callable[..., Array]
    platforms: tuple[str, ...] | None = None
    lacks: Callable[[Shaped, Shaped], str | None] = lambda rows_XCD, w_EDF: None


def _of(module: object, **settings: object) -> Implementation:
    return Implementation(module.forward, module.rows_gradient, module.matrices_gradient, **settings)


IMPLEMENTATIONS = {
    "plain": Implementation(plain, plain_rows_gradient, plain_matrices_gradient),
    "loop": _of(grouped_loop),
    "ragged": _of(grouped_ragged),
    "triton": _of(grouped_triton, platforms=("cuda", "rocm"), lacks=grouped_triton.lacks),
    "mosaic": _of(grouped_tpu, platforms=("tpu",), lacks=grouped_tpu.lacks),
}
# What a device's platform is called where programs are lowered.
LOWERED_FOR = {"gpu": ("cuda", "rocm")}
# By platform, the fastest first; the last one takes all shapes. Elsewhere, on a CPU, it is the loop.
FASTEST = {"cuda": ("triton", "loop"), "rocm": ("triton", "loop"), "tpu": ("mosaic", "ragged")}


def fastest(platform: str, rows_XCD: Shaped, w_EDF: Shaped) -> str:
    """Returns the name of the fastest implementation on a platform that takes these shapes and this dtype."""
    names = FASTEST.get(platform, ("loop",))
    return next(name for name in names if IMPLEMENTATIONS[name].lacks(rows_XCD, w_EDF) is None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def block_matmul(
    rows_XCD: Float[Array, "X C D"],
    w_EDF: Float[Array, "E D F"],
    block_expert_X: Int[Array, " X"],
    num_blocks: Int[Array, ""],
    chosen: str | Implementation | None = None,
) -> Float[Array, "X C F"]:
    """Returns [X, C, F] in the rows' dtype: each of the first `num_blocks` blocks times its expert's matrix, 0 beyond.

    Blocks go up by expert. `chosen` is the implementation or its name, None for the fastest on the platform that the
    program is lowered for. Raises `CallerError` where shapes, dtype or platform are not for the one that is named.
    """
    operands = (rows_XCD, w_EDF.astype(rows_XCD.dtype), Blocks(block_expert_X, num_blocks))
    return _call(chosen, rows_XCD, w_EDF, lambda implementation: implementation.forward, operands)


def block_matmul_nt(
    rows_XCF: Float[Array, "X C F"],
    w_EDF: Float[Array, "E D F"],
    block_expert_X: Int[Array, " X"],
    num_blocks: Int[Array, ""],
    chosen: str | Implementation | None = None,
) -> Float[Array, "X C D"]:
    """`block_matmul` with the transposes of the matrices, read as they lie; has no gradient."""
    operands = (rows_XCF, w_EDF.astype(rows_XCF.dtype), Blocks(block_expert_X, num_blocks))
    return _call(chosen, rows_XCF, w_EDF, lambda implementation: implementation.rows_gradient, operands)


def _block_forward(rows_XCD: Array, w_EDF: Array, block_expert_X: Array, num_blocks: Array, chosen: object) -> tuple:
    y_XCF = block_matmul(rows_XCD, w_EDF, block_expert_X, num_blocks, chosen)
    return y_XCF, (rows_XCD, w_EDF, Blocks(block_expert_X, num_blocks))


def _block_backward(chosen: str | Implementation | None, residuals: tuple, dy_XCF: Array) -> tuple:
    rows_XCD, w_EDF, blocks = residuals
    call = functools.partial(_call, chosen, rows_XCD, w_EDF)
    drows_XCD = call(lambda implementation: implementation.rows_gradient, (dy_XCF, w_EDF.astype(dy_XCF.dtype), blocks))
    dw_EDF = call(
        lambda implementation: functools.partial(implementation.matrices_gradient, num_experts=len(w_EDF)),
        (rows_XCD, dy_XCF, blocks),
    )
    return drows_XCD, dw_EDF.astype(w_EDF.dtype), None, None


block_matmul.defvjp(_block_forward, _block_backward)


def _call(chosen: str | Implementation | None, rows_XCD: Array, w_EDF: Array, part: Callable, operands: tuple) -> Array:
    """One function of the chosen implementation, or of each platform's fastest one, left to lowering to choose."""
    if isinstance(chosen, Implementation):
        return part(chosen)(*operands)
    if chosen is None:
        by_platform = {platform: fastest(platform, rows_XCD, w_EDF) for platform in (*FASTEST, "default")}
        return jax.lax.platform_dependent(
            *operands, **{platform: part(IMPLEMENTATIONS[name]) for platform, name in by_platform.items()}
        )
    require(chosen in IMPLEMENTATIONS, "grouped_product", chosen, f"must be in {tuple(IMPLEMENTATIONS)}")
    named = IMPLEMENTATIONS[chosen]
    lacks = named.lacks(rows_XCD, w_EDF)
    shapes = f"rows {rows_XCD.shape} in {rows_XCD.dtype}, matrices {w_EDF.shape}"
    require(lacks is None, "grouped_product", chosen, f"needs {lacks}, here are {shapes}", "leave it out")
    if named.platforms is None:
        return part(named)(*operands)
    refuse = functools.partial(_refuse, chosen, part(named))
    branches = dict.fromkeys(named.platforms, part(named))
    return jax.lax.platform_dependent(*operands, **branches, default=refuse)


def _refuse(name: str, function: Callable, *operands: object) -> Array:
    """Stands for `function` where a program is lowered for a platform without it: raises then, not while tracing."""
    result = jax.eval_shape(function, *operands)
    return _refused.bind(jnp.zeros(result.shape, result.dtype), name=name)


def require_platform(chosen: str | None, platform: str) -> None:
    """Raises `CallerError` where a chosen implementation does not run on a device's platform, before any lowering."""
    platforms = IMPLEMENTATIONS[chosen].platforms if chosen else None
    if platforms is not None and not set(platforms) & {platform, *LOWERED_FOR.get(platform, ())}:
        _raise_refusal(None, name=chosen)


def _raise_refusal(_context: object, *_operands: object, name: str) -> None:
    platforms = " or ".join(IMPLEMENTATIONS[name].platforms)
    raise CallerError(f"grouped_product={name!r} runs on {platforms} only; leave it out for the fastest there is")


_refused = Primitive("grouped_product_refused")
_refused.def_abstract_eval(lambda result, *, name: result)
mlir.register_lowering(_refused, _raise_refusal)
