"""Carries tokens to their experts and back: which row of which block every choice of the router occupies.

A dispatcher is a function `(x_GUD, routing, config) -> Dispatched`; `combine` brings the experts' output back. Both
dispatchers sort the choices by expert, and all movement is by gathers, forward and backward: a slot knows its token, a
choice knows its slot.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from gpt4moe.config.moe import MoeConfig
from gpt4moe.model.router import Routing
from gpt4moe.types import Array

Queue = Callable[[Float[Array, "U K"]], Int[Array, " U"]]

# Rows of one block of the dropless dispatcher: enough for a matrix product to reach its full rate.
LARGEST_BLOCK = 128
SMALLEST_BLOCK = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where everything lies, for `movements` that do not touch one another (a leading dim P: groups, or one pool).

    choice_of_slot_PS: the choice (token * K + k) in each slot, U * K where the slot is empty;
    slot_of_choice_PUK: the slot of each choice, S where it was dropped or not used; gates_PUK: its weight.
    """

    choice_of_slot_PS: Int[Array, "... S"]
    slot_of_choice_PUK: Int[Array, "... U K"]
    gates_PUK: Float[Array, "... U K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchStats:
    """dropped_G: choices of each group that found no place, int32."""

    dropped_G: Int[Array, " G"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dispatched:
    """Tokens grouped for the experts.

    rows_XCD: blocks of C rows, each block for one expert, zero rows where empty; block_expert_X: the expert of each
    block, None where block x is expert x; num_blocks: blocks in use, counted from the first (None: all).
    """

    rows_XCD: Float[Array, "X C D"]
    block_expert_X: Int[Array, " X"] | None
    num_blocks: Int[Array, ""] | None
    plan: Plan
    stats: DispatchStats


def capacity(x_GUD: Float[Array, "G U D"], routing: Routing, config: MoeConfig) -> Dispatched:
    """Gives every expert room for ceil(U * K / E * capacity_factor) choices of each group and drops the rest.

    Room is per group, so what is dropped depends neither on other rows nor on layout. First choices come before
    second ones; of either, by `drop_priority`, earlier tokens before later ones (`position`: GShard, Lepikhin et al.
    2020, algorithm 1) or those of a larger gate (`gate`: batch-prioritised routing, Riquelme et al. 2021).
    """
    room = config.expert_capacity(x_GUD.shape[1])
    return to_places(x_GUD, routing, config.num_experts, room, QUEUES[config.drop_priority])


def to_places(
    x_GUD: Float[Array, "G U D"], routing: Routing, num_places: int, room: int, queue: Queue | None = None
) -> Dispatched:
    """Gives each of `num_places` that the routing names room for that many choices of each group; drops the rest.

    `queue` gives the order in which a group's tokens are served (None: as they come).
    """
    groups, _, dim = x_GUD.shape
    queue = queue or as_they_come
    plan = jax.vmap(lambda ids, used, gates: _capacity_plan(ids, used, gates, num_places, room, queue(gates)))(
        routing.expert_ids_UK, routing.used_UK, routing.gates_UK
    )
    kept_G = jnp.sum(plan.choice_of_slot_PS < routing.gates_UK[0].size, axis=-1, dtype=jnp.int32)
    rows_GXCD = gather_rows(x_GUD, plan).reshape(groups, num_places, room, dim)
    return Dispatched(
        rows_XCD=rows_GXCD.swapaxes(0, 1).reshape(num_places, groups * room, dim),
        block_expert_X=None,
        num_blocks=None,
        plan=plan,
        stats=DispatchStats(_used_choices(routing) - kept_G),
    )


def as_they_come(gates_UK: Float[Array, "U K"]) -> Int[Array, " U"]:
    """Returns the tokens of a group in the order of their places."""
    return jnp.arange(len(gates_UK))


def largest_gate_first(gates_UK: Float[Array, "U K"]) -> Int[Array, " U"]:
    """Returns the tokens of a group by their largest gate, the earlier of equals first."""
    return jnp.argsort(-jnp.max(jax.lax.stop_gradient(gates_UK), axis=-1), stable=True)


QUEUES = {"position": as_they_come, "gate": largest_gate_first}


def dropless(x_GUD: Float[Array, "G U D"], routing: Routing, config: MoeConfig) -> Dispatched:
    """Gives every choice a place: all groups in one pool, each expert's choices padded to whole blocks.

    As in MegaBlocks (Gale et al. 2022), with static shapes: the number of blocks is the most there can be, and
    `num_blocks` says how many are in use.
    """
    groups, tokens, dim = x_GUD.shape
    ids_UK, used_UK, gates_UK = (
        leaf.reshape(groups * tokens, -1) for leaf in (routing.expert_ids_UK, routing.used_UK, routing.gates_UK)
    )
    block = block_rows(ids_UK.size, config.num_experts)
    plan, block_expert_X, num_blocks = _dropless_plan(ids_UK, used_UK, gates_UK, config.num_experts, block)
    plan = jax.tree.map(lambda leaf: leaf[None], plan)
    return Dispatched(
        rows_XCD=gather_rows(x_GUD.reshape(1, groups * tokens, dim), plan).reshape(-1, block, dim),
        block_expert_X=block_expert_X,
        num_blocks=num_blocks,
        plan=plan,
        stats=DispatchStats(jnp.zeros(groups, jnp.int32)),
    )


def block_rows(num_choices: int, num_experts: int) -> int:
    """Rows of a block: the power of two nearest above an expert's mean share, within bounds that keep products fast."""
    share = max(num_choices // num_experts, 1)
    return min(max(2 ** math.ceil(math.log2(share)), SMALLEST_BLOCK), LARGEST_BLOCK)


def combine(y_XCD: Float[Array, "X C D"], plan: Plan, groups: int) -> Float[Array, "G U D"]:
    """Returns y_GUD: each token's experts' outputs, weighted by its gates and summed; 0 for a token without any."""
    movements, tokens, _ = plan.slot_of_choice_PUK.shape
    dim = y_XCD.shape[-1]
    if movements == 1:
        y_PSD = y_XCD.reshape(1, -1, dim)
    else:
        y_PSD = y_XCD.reshape(y_XCD.shape[0], movements, -1, dim).swapaxes(0, 1).reshape(movements, -1, dim)
    return weighted_sum(y_PSD, plan).reshape(groups, movements * tokens // groups, dim)


@jax.custom_vjp
def gather_rows(x_PUD: Float[Array, "P U D"], plan: Plan) -> Float[Array, "P S D"]:
    """Returns [P, S, D]: the token in each slot, zeros in empty ones. Its backward is a gather too."""
    num_choices = plan.slot_of_choice_PUK.shape[-1]
    return _take(x_PUD, plan.choice_of_slot_PS // num_choices)


def _gather_rows_forward(x_PUD: Array, plan: Plan) -> tuple[Array, Plan]:
    return gather_rows(x_PUD, plan), plan


def _gather_rows_backward(plan: Plan, drows_PSD: Array) -> tuple[Array, Plan]:
    # XLA:CPU is 80 times slower at a sum over a dim of gathered rows than at a sum of gathers.
    dx_PUD = sum(_take(drows_PSD, slot_PU).astype(jnp.float32) for slot_PU in _by_choice(plan.slot_of_choice_PUK))
    return dx_PUD.astype(drows_PSD.dtype), _no_gradient(plan)


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


@jax.custom_vjp
def weighted_sum(y_PSD: Float[Array, "P S D"], plan: Plan) -> Float[Array, "P U D"]:
    """Returns [P, U, D]: sum over k of gate times the row in the choice's slot, accumulated in float32."""
    choices = zip(_by_choice(plan.slot_of_choice_PUK), _by_choice(plan.gates_PUK), strict=True)
    y_PUD = sum(_take(y_PSD, slot_PU).astype(jnp.float32) * gate_PU[..., None] for slot_PU, gate_PU in choices)
    return y_PUD.astype(y_PSD.dtype)


def _weighted_sum_forward(y_PSD: Array, plan: Plan) -> tuple[Array, tuple[Array, Plan]]:
    return weighted_sum(y_PSD, plan), (y_PSD, plan)


def _weighted_sum_backward(residuals: tuple[Array, Plan], dy_PUD: Array) -> tuple[Array, Plan]:
    y_PSD, plan = residuals
    num_choices = plan.slot_of_choice_PUK.shape[-1]
    gates_PS = _take(plan.gates_PUK.reshape(len(y_PSD), -1, 1), plan.choice_of_slot_PS)
    dy_PSD = _take(dy_PUD, plan.choice_of_slot_PS // num_choices).astype(jnp.float32)
    # As one matrix: XLA:CPU is ten times slower at the sum over the last of three dims.
    dgates_S = jnp.sum((dy_PSD * y_PSD.astype(jnp.float32)).reshape(-1, y_PSD.shape[-1]), axis=-1)
    dgates_PUK = _take(dgates_S.reshape(*gates_PS.shape), plan.slot_of_choice_PUK)[..., 0]
    return (dy_PSD * gates_PS).astype(y_PSD.dtype), dataclasses.replace(_no_gradient(plan), gates_PUK=dgates_PUK)


weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def _take(rows_PSD: Array, index: Array) -> Array:
    """Rows by index within each movement, zeros for an index past the end."""
    return jax.vmap(lambda rows, ids: rows.at[ids].get(mode="fill", fill_value=0))(rows_PSD, index)


def _by_choice(values_PUK: Array) -> list[Array]:
    return [values_PUK[..., k] for k in range(values_PUK.shape[-1])]


def _no_gradient(plan: Plan) -> Plan:
    return jax.tree.map(lambda leaf: None, plan)


def _capacity_plan(ids_UK: Array, used_UK: Array, gates_UK: Array, num_experts: int, room: int, queue_U: Array) -> Plan:
    queued, counts_E = sort_by_expert(ids_UK[queue_U], used_UK[queue_U], num_experts)
    num_choices = ids_UK.shape[1]
    order = queue_U[queued // num_choices] * num_choices + queued % num_choices
    starts_E = jnp.cumsum(counts_E) - counts_E
    place_C = jnp.arange(room)
    sorted_index_EC = starts_E[:, None] + place_C
    in_use_EC = place_C < counts_E[:, None]
    choice_EC = jnp.where(in_use_EC, order.at[sorted_index_EC].get(mode="clip"), ids_UK.size)
    return plan_from_slots(choice_EC.reshape(-1), gates_UK)


def _dropless_plan(
    ids_UK: Array, used_UK: Array, gates_UK: Array, num_experts: int, block: int
) -> tuple[Plan, Array, Array]:
    """Plan of one pool, the expert of each block, and how many blocks are in use."""
    num_entries = ids_UK.size
    order, counts_E = sort_by_expert(ids_UK, used_UK, num_experts)
    blocks_E = -(-counts_E // block)
    last_block_E = jnp.cumsum(blocks_E)
    # sum_e ceil(n_e / block) is largest when as many experts as can be hold one choice more than whole blocks.
    most_blocks = (num_entries + min(num_entries, num_experts) * (block - 1)) // block
    block_X = jnp.arange(most_blocks)
    block_expert_X = jnp.minimum(jnp.searchsorted(last_block_E, block_X, side="right"), num_experts - 1)
    place_XC = (block_X - (last_block_E - blocks_E)[block_expert_X])[:, None] * block + jnp.arange(block)
    in_use_XC = (place_XC < counts_E[block_expert_X][:, None]) & (block_X < last_block_E[-1])[:, None]
    starts_E = jnp.cumsum(counts_E) - counts_E
    sorted_index_XC = starts_E[block_expert_X][:, None] + place_XC
    choice_XC = jnp.where(in_use_XC, order.at[sorted_index_XC].get(mode="clip"), num_entries)
    return plan_from_slots(choice_XC.reshape(-1), gates_UK), block_expert_X, last_block_E[-1]


def sort_by_expert(ids_UK: Array, used_UK: Array, num_experts: int) -> tuple[Array, Array]:
    """Choices in the order of expert, then k, then token (unused ones last), and how many each expert has."""
    tokens, num_choices = ids_UK.shape
    queue_S = jnp.where(used_UK, ids_UK, num_experts).T.reshape(-1)
    by_queue = _stable_order(queue_S, num_experts)
    order = by_queue % tokens * num_choices + by_queue // tokens
    counts_E = jnp.sum(queue_S[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return order, counts_E


def _stable_order(keys_S: Array, largest: int) -> Array:
    """Positions by key, then by position: one sort of plain numbers where they have room for both."""
    num = keys_S.size
    if (largest + 1) * num > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(keys_S, stable=True)
    return jnp.sort(keys_S.astype(jnp.int32) * num + jnp.arange(num, dtype=jnp.int32)) % num


def plan_from_slots(choice_of_slot_S: Array, gates_UK: Array) -> Plan:
    """Returns the plan of one movement whose slots hold these choices, U * K where a slot is empty."""
    num_slots = choice_of_slot_S.size
    slots = jnp.arange(num_slots, dtype=jnp.int32)
    empty = jnp.full(gates_UK.size, num_slots, jnp.int32)
    slot_of_choice = empty.at[choice_of_slot_S].set(slots, mode="drop")
    return Plan(choice_of_slot_S, slot_of_choice.reshape(gates_UK.shape), gates_UK)


def _used_choices(routing: Routing) -> Array:
    return jnp.sum(routing.used_UK, axis=(1, 2), dtype=jnp.int32)
