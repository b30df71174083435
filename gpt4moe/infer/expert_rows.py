"""Rows through their experts while decoding: one function, with a lowering for each size of batch.

In: rows, each with K choices of experts and their gates. Out: the sum of the experts' outputs weighted by gates, in
float32. What the lowerings differ in is how much of the matrices they read and how many rows they multiply for nothing:

- `visit_chosen`: all rows through every expert that any row goes to. Reads no other expert.
- `visit_all`: all rows through every expert: of many rows some go to each, and a choice whether to costs time.
- `visit_sorted`: rows sorted by expert, in blocks. For prompts, where multiplying is what takes the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from gpt4moe.infer.decode_weights import FeedForwardWeights
from gpt4moe.infer.matrix import times
from gpt4moe.model.dispatch import sort_by_expert
from gpt4moe.model.layers import activate
from gpt4moe.types import Array

Experts = Sequence[FeedForwardWeights]
# Choices an expert from which nearly every expert has one: 0.98 of them at 4 under even loads.
ALL_VISITED = 4
# Rows from which sorting them costs less than multiplying all by every expert.
FEWEST_SORTED = 64
# Rows of a block: large ones first, the rest of an expert's rows in small ones.
LARGE_BLOCK, SMALL_BLOCK = 128, 32


def feed_forward(x_UD: Float[Array, "U D"], weights: FeedForwardWeights, gated: bool) -> Float32[Array, "U D"]:
    """Returns rows after a feed-forward."""
    hidden_UJ = times(x_UD, weights.in_DJ)
    if gated:
        gate_UF, up_UF = jnp.split(hidden_UJ, 2, axis=-1)
        return times(activate(up_UF, gate_UF), weights.down_FD)
    return times(activate(hidden_UJ, None), weights.down_FD)


def serve(
    experts: Experts, x_UD: Float[Array, "U D"], ids_UK: Int[Array, "U K"], gates_UK: Float32[Array, "U K"], gated: bool
) -> Float32[Array, "U D"]:
    """Returns y_UD; a choice of gate 0 is none."""
    rows, choices = ids_UK.shape
    if rows >= FEWEST_SORTED and choices < len(experts):
        return visit_sorted(experts, x_UD, ids_UK, gates_UK, gated)
    visit = visit_all if rows * choices >= ALL_VISITED * len(experts) else visit_chosen
    return visit(experts, x_UD, ids_UK, gates_UK, gated)


def visit_chosen(experts: Experts, x_UD: Array, ids_UK: Array, gates_UK: Array, gated: bool) -> Float32[Array, "U D"]:
    """See the module."""
    gates_UE = _by_expert(ids_UK, gates_UK, len(experts))
    visited_E = jnp.any(gates_UE != 0, axis=0)
    y_UD = jnp.zeros(x_UD.shape, jnp.float32)
    for e, expert in enumerate(experts):

        def visit(y_UD: Array, expert=expert, gate_U1=gates_UE[:, e : e + 1]) -> Array:
            return y_UD + feed_forward(x_UD, expert, gated) * gate_U1

        y_UD = jax.lax.cond(visited_E[e], visit, lambda y_UD: y_UD, y_UD)
    return y_UD


def visit_all(experts: Experts, x_UD: Array, ids_UK: Array, gates_UK: Array, gated: bool) -> Float32[Array, "U D"]:
    """See the module."""
    gates_UE = _by_expert(ids_UK, gates_UK, len(experts))
    return sum(feed_forward(x_UD, expert, gated) * gates_UE[:, e : e + 1] for e, expert in enumerate(experts))


def visit_sorted(experts: Experts, x_UD: Array, ids_UK: Array, gates_UK: Array, gated: bool) -> Float32[Array, "U D"]:
    """See the module. A last block reads into the next expert's rows, whose own blocks then overwrite what it wrote."""
    order_S, counts_E = sort_by_expert(ids_UK, gates_UK != 0, len(experts))
    starts_E = jnp.cumsum(counts_E) - counts_E
    num = order_S.size
    slot_UK = jnp.zeros(num, jnp.int32).at[order_S].set(jnp.arange(num, dtype=jnp.int32), unique_indices=True)
    token_S = jnp.pad(order_S // ids_UK.shape[1], (0, LARGE_BLOCK))
    x_SD = x_UD.at[token_S].get(mode="promise_in_bounds")
    y_SD = jnp.zeros(x_SD.shape, jnp.float32)
    for e, expert in enumerate(experts):
        through = functools.partial(feed_forward, weights=expert, gated=gated)
        y_SD = _in_blocks(through, x_SD, y_SD, starts_E[e], counts_E[e])
    return sum(
        jnp.where(gate_U1 != 0, y_SD.at[slot_U].get(mode="promise_in_bounds"), 0.0) * gate_U1
        for slot_U, gate_U1 in zip(slot_UK.reshape(ids_UK.shape).T, gates_UK.T[..., None], strict=True)
    )


def _in_blocks(through: Callable, x_SD: Array, y_SD: Array, start: Array, count: Array) -> Array:
    """y_SD with the rows start .. start + count of x_SD `through` a function."""

    def block(index: Array, y_SD: Array, first: Array, size: int) -> Array:
        row = first + index * size
        y_CD = through(jax.lax.dynamic_slice_in_dim(x_SD, row, size))
        return jax.lax.dynamic_update_slice_in_dim(y_SD, y_CD, row, axis=0)

    num_large = count // LARGE_BLOCK
    rest = count - num_large * LARGE_BLOCK
    behind = start + num_large * LARGE_BLOCK
    large = functools.partial(block, first=start, size=LARGE_BLOCK)
    small = functools.partial(block, first=behind, size=SMALL_BLOCK)
    y_SD = jax.lax.fori_loop(0, num_large, large, y_SD)
    return jax.lax.fori_loop(0, -(-rest // SMALL_BLOCK), small, y_SD)


def _by_expert(ids_UK: Array, gates_UK: Array, num_experts: int) -> Array:
    """The gate of every row at every expert, 0 where it does not go."""
    chosen_UKE = ids_UK[..., None] == jnp.arange(num_experts)
    return jnp.sum(jnp.where(chosen_UKE, gates_UK[..., None], 0.0), axis=1)
