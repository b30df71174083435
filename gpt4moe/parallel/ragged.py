"""Choices travel to the devices that hold their experts in pieces of the size that there is, not in buckets.

Behind the contract of `gpt4moe.parallel.expert`'s dropless exchange, for backends that have `ragged_all_to_all`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from gpt4moe.model import dispatch
from gpt4moe.model.router import Routing
from gpt4moe.types import Array

# (rows [1, S, D], the held expert of each row [1, S, 1], `held` where there is none) -> rows [1, S, D].
Serve = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Where the pieces lie that this device exchanges with each of Z devices, all int32 [Z].

    Sent: rows `start`..`start`+`size` of its own choices, to `target` in the other's buffer. Received: `arriving` rows.
    """

    start_Z: Array
    size_Z: Array
    target_Z: Array
    arriving_Z: Array


def to_shards_ragged(
    x_1UD: Float[Array, "1 U D"], routing: Routing, held: int, room: int, axis: str, serve: Serve
) -> tuple[Float[Array, "1 U D"], Int[Array, ""]]:
    """Returns y_1UD, every choice served where its expert lies, and how many found no room there.

    `held` experts lie on each device of `axis`; each has room for `room` rows in all. Devices are filled in their
    order along the axis: who sends too much is cut off at the end of the room, so that no piece runs into another.
    """
    ids_UK, used_UK, gates_UK = routing.expert_ids_UK[0], routing.used_UK[0], routing.gates_UK[0]
    sent_Z = jnp.bincount(jnp.where(used_UK, ids_UK // held, -1).ravel() + 1, length=jax.lax.axis_size(axis) + 1)[1:]
    pieces = _pieces(sent_Z.astype(jnp.int32), room, axis)
    plan = _plan(ids_UK // held, used_UK, gates_UK, pieces)
    rows_SD = dispatch.gather_rows(x_1UD, jax.tree.map(lambda leaf: leaf[None], plan))[0]
    expert_S1 = (ids_UK % held).reshape(-1, 1).at[plan.choice_of_slot_PS].get(mode="fill", fill_value=held)
    arrived_SD = _exchange(rows_SD, jnp.zeros((room, x_1UD.shape[-1]), x_1UD.dtype), pieces, axis)
    arrived_S1 = _exchange(expert_S1, jnp.full((room, 1), held, jnp.int32), pieces, axis)
    served_SD = serve(arrived_SD[None], arrived_S1[None])[0]
    back = _reversed(pieces, axis)
    y_SD = _exchange(served_SD, jnp.zeros_like(rows_SD), back, axis)
    y_1UD = dispatch.weighted_sum(y_SD[None], jax.tree.map(lambda leaf: leaf[None], plan))
    return y_1UD, jnp.sum(sent_Z).astype(jnp.int32) - jnp.sum(pieces.size_Z)


def _pieces(sent_Z: Array, room: int, axis: str) -> Pieces:
    me = jax.lax.axis_index(axis)
    sent_YZ = jax.lax.all_gather(sent_Z, axis)  # from device y to device z
    target_YZ = jnp.cumsum(sent_YZ, axis=0) - sent_YZ
    size_YZ = jnp.clip(room - target_YZ, 0, sent_YZ)
    start_Z = jnp.cumsum(sent_Z) - sent_Z
    return Pieces(start_Z, size_YZ[me], jnp.minimum(target_YZ[me], room), size_YZ[:, me])


def _plan(shard_UK: Array, used_UK: Array, gates_UK: Array, pieces: Pieces) -> dispatch.Plan:
    """Choices in the order of the device they go to; those beyond a piece's size have no slot."""
    num_choices = shard_UK.size
    order_S = jnp.argsort(jnp.where(used_UK, shard_UK, len(pieces.size_Z)).ravel(), stable=True)
    shard_S = jnp.minimum(shard_UK.ravel()[order_S], len(pieces.size_Z) - 1)
    place_S = jnp.arange(num_choices) - pieces.start_Z[shard_S]
    sent_S = used_UK.ravel()[order_S] & (place_S < pieces.size_Z[shard_S])
    return dispatch.plan_from_slots(jnp.where(sent_S, order_S, num_choices), gates_UK)


def _reversed(pieces: Pieces, axis: str) -> Pieces:
    """What came goes back to where it was taken from."""
    landed_Z = jax.lax.all_to_all(pieces.target_Z, axis, 0, 0, tiled=True)
    taken_Z = jax.lax.all_to_all(pieces.start_Z, axis, 0, 0, tiled=True)
    return Pieces(landed_Z, pieces.arriving_Z, taken_Z, pieces.size_Z)


def _exchange(rows_SD: Array, into_SD: Array, pieces: Pieces, axis: str) -> Array:
    return jax.lax.ragged_all_to_all(
        rows_SD, into_SD, pieces.start_Z, pieces.size_Z, pieces.target_Z, pieces.arriving_Z, axis_name=axis
    )
