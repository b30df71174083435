"""Rows through their experts while decoding: one function, with a lowering for each size of batch.

In: rows, each with K choices of experts and their gates. Out: the sum of the experts' outputs weighted by gates, in
float32. What the lowerings differ in is how much of the matrices they read and how many rows they multiply for nothing:

- `visit_one`: a single row through each of its experts.
- `visit_chosen`: all rows through every expert that any row goes to. Reads no other expert.
- `visit_all`: all rows through every expert: of many rows some go to each, and a choice whether to costs time.
- `visit_sorted`: rows sorted by expert, in blocks. For prompts, where multiplying is what takes the time.
- `visit_own`, `visit_blocks`: the like of experts in a stack, for the kernels of accelerators: a row times the matrix
  of its number, and blocks of sorted rows (`gpt4moe.model.grouped_matmul`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from gpt4moe.config.moe import MoeConfig
from gpt4moe.infer.decode_weights import FeedForwardWeights
from gpt4moe.infer.matrix import Matrix, times, times_own
from gpt4moe.infer.shards import ALONE, Shards
from gpt4moe.model import dispatch
from gpt4moe.model.grouped_matmul import block_matmul_nt
from gpt4moe.model.layers import activate
from gpt4moe.model.router import Routing
from gpt4moe.parallel.island import Axes
from gpt4moe.types import Array

Experts = Sequence[FeedForwardWeights]
# Choices an expert from which nearly every expert has one: 0.98 of them at 4 under even loads.
ALL_VISITED = 4
# Rows from which sorting them costs less than multiplying all by every expert.
FEWEST_SORTED = 64
# Rows of a block: large ones first, the rest of an expert's rows in small ones.
LARGE_BLOCK, SMALL_BLOCK = 128, 32


def feed_forward(
    x_UD: Float[Array, "U D"], weights: FeedForwardWeights, gated: bool, split: Axes = ()
) -> Float32[Array, "U D"]:
    """Returns rows after a feed-forward, or this device's part of the sum where its hidden dims lie along `split`."""
    return times(_activated(times(x_UD, weights.in_DJ), gated), weights.down_FD, split)


def _activated(hidden_UJ: Float[Array, "*rows J"], gated: bool) -> Float[Array, "*rows F"]:
    if not gated:
        return activate(hidden_UJ, None)
    gate_UF, up_UF = jnp.split(hidden_UJ, 2, axis=-1)
    return activate(up_UF, gate_UF)


def serve(
    experts: Experts | FeedForwardWeights,
    x_BTD: Float[Array, "B T D"],
    routing: Routing,
    config: MoeConfig,
    shards: Shards = ALONE,
) -> Float32[Array, "U D"]:
    """Returns y_UD, U = B T, or this device's part of it; `experts` are one of each or all in a stack."""
    routing, num = shards.here(routing, config)
    rows = x_BTD.shape[0] * x_BTD.shape[1]
    x_UD, gated = x_BTD.reshape(rows, -1), config.gated
    ids_UK, gates_UK = (leaf.reshape(rows, -1) for leaf in (routing.expert_ids_UK, routing.gates_UK))
    if isinstance(experts, FeedForwardWeights):
        if ids_UK.size <= num:
            return visit_own(experts, x_UD, ids_UK, gates_UK, gated)
        if experts.in_DJ.scale_J is None:
            of_held = {"num_experts": num, "experts_per_token": 1, "num_groups": 1, "groups_per_token": 1}
            return visit_blocks(experts, x_BTD, routing, dataclasses.replace(config, normalize_gates=False, **of_held))
        experts = [jax.tree.map(lambda leaf, e=e: leaf[e], experts) for e in range(num)]
    if rows >= FEWEST_SORTED and ids_UK.shape[1] < config.num_experts:
        visit = visit_sorted
    elif rows == 1 and num == config.num_experts:
        visit = visit_one
    else:
        visit = visit_all if ids_UK.size >= ALL_VISITED * config.num_experts else visit_chosen
    return visit(experts, x_UD, ids_UK, gates_UK, gated, shards.heads)


def visit_own(
    experts: FeedForwardWeights, x_UD: Array, ids_UK: Array, gates_UK: Array, gated: bool
) -> Float32[Array, "U D"]:
    """See the module."""
    x_SD = jnp.repeat(x_UD, ids_UK.shape[1], axis=0)
    own_S = ids_UK.reshape(-1)
    hidden_SF = _activated(times_own(x_SD, experts.in_DJ, own_S), gated).astype(x_UD.dtype)
    y_SD = times_own(hidden_SF, experts.down_FD, own_S)
    return jnp.sum(y_SD.reshape(*ids_UK.shape, -1) * gates_UK[..., None], axis=1)


def visit_blocks(
    experts: FeedForwardWeights, x_BTD: Array, routing: Routing, config: MoeConfig
) -> Float32[Array, "U D"]:
    """See the module."""
    dispatched = dispatch.dropless(x_BTD, routing, config)

    def multiply(rows_XCI: Array, stack: Matrix) -> Array:
        blocks = dispatched.block_expert_X, dispatched.num_blocks
        return block_matmul_nt(rows_XCI, stack.values_JI, *blocks, config.grouped_product)

    hidden_XCF = _activated(multiply(dispatched.rows_XCD, experts.in_DJ), config.gated)
    y_XCD = multiply(hidden_XCF, experts.down_FD)
    y_BTD = dispatch.combine(y_XCD, dispatched.plan, len(x_BTD))
    return y_BTD.reshape(-1, x_BTD.shape[-1]).astype(jnp.float32)


def visit_one(
    experts: Experts, x_UD: Array, ids_UK: Array, gates_UK: Array, gated: bool, split: Axes = ()
) -> Float32[Array, "U D"]:
    """See the module."""
    branches = [functools.partial(feed_forward, weights=expert, gated=gated, split=split) for expert in experts]
    return sum(jax.lax.switch(id_, branches, x_UD) * gate for id_, gate in zip(ids_UK[0], gates_UK[0], strict=True))


def visit_chosen(
    experts: Experts, x_UD: Array, ids_UK: Array, gates_UK: Array, gated: bool, split: Axes = ()
) -> Float32[Array, "U D"]:
    """See the module."""
    gates_UE = _by_expert(ids_UK, gates_UK, len(experts))
    visited_E = jnp.any(gates_UE != 0, axis=0)
    y_UD = jnp.zeros(x_UD.shape, jnp.float32)
    for e, expert in enumerate(experts):

        def visit(y_UD: Array, expert=expert, gate_U1=gates_UE[:, e : e + 1]) -> Array:
            return y_UD + feed_forward(x_UD, expert, gated, split) * gate_U1

        y_UD = jax.lax.cond(visited_E[e], visit, lambda y_UD: y_UD, y_UD)
    return y_UD


def visit_all(
    experts: Experts, x_UD: Array, ids_UK: Array, gates_UK: Array, gated: bool, split: Axes = ()
) -> Float32[Array, "U D"]:
    """See the module."""
    gates_UE = _by_expert(ids_UK, gates_UK, len(experts))
    return sum(feed_forward(x_UD, expert, gated, split) * gates_UE[:, e : e + 1] for e, expert in enumerate(experts))


def visit_sorted(
    experts: Experts, x_UD: Array, ids_UK: Array, gates_UK: Array, gated: bool, split: Axes = ()
) -> Float32[Array, "U D"]:
    """See the module. A last block reads into the next expert's rows, whose own blocks then overwrite what it wrote."""
    order_S, counts_E = dispatch.sort_by_expert(ids_UK, gates_UK != 0, len(experts))
    starts_E = jnp.cumsum(counts_E) - counts_E
    num = order_S.size
    slot_UK = jnp.zeros(num, jnp.int32).at[order_S].set(jnp.arange(num, dtype=jnp.int32), unique_indices=True)
    token_S = jnp.pad(order_S // ids_UK.shape[1], (0, LARGE_BLOCK))
    x_SD = x_UD.at[token_S].get(mode="promise_in_bounds")
    y_SD = jnp.zeros(x_SD.shape, jnp.float32)
    for e, expert in enumerate(experts):
        through = functools.partial(feed_forward, weights=expert, gated=gated, split=split)
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
