"""Expert parallelism: tokens travel to the devices that hold their experts by an explicit all-to-all, and back.

Behind the contract of `gpt4moe.model.experts.apply_experts`. Rows of the batch lie over the batch axes, which may
include the axes that experts lie on: attention sees those as more data parallelism. Hidden dims of an expert may be
split further (`mlp`), which leaves partial sums to add up. Devices that hold the same tokens and would do the same
(along `tensor` where `mlp` is not on it) share out the places.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from gpt4moe.config.moe import MoeConfig
from gpt4moe.model import dispatch
from gpt4moe.model.experts import ExpertWeights, apply_experts, feed_forward
from gpt4moe.model.router import RouterLosses, RouterStats, Routing
from gpt4moe.parallel.island import Axes, Spread, island
from gpt4moe.parallel.ragged import to_shards_ragged
from gpt4moe.parallel.sharding import partition_spec
from gpt4moe.types import Array

WEIGHT_DIMS = {
    "gate_EDF": ("experts", "embed", "mlp"),
    "up_EDF": ("experts", "embed", "mlp"),
    "down_EFD": ("experts", "mlp", "embed"),
}


@dataclasses.dataclass(frozen=True)
class Fold:
    """How the experts of a layer fold over a mesh.

    experts, hidden: axes of E and F. sequence: axes of T as tokens arrive. bucket_factor: see `_to_shards`.
    ragged: dropless choices travel in pieces of the size there is. platform: what the devices are.
    """

    spread: Spread
    experts: Axes
    hidden: Axes
    sequence: Axes
    bucket_factor: float | None
    ragged: bool
    platform: str | None

    @property
    def travelling(self) -> Axes:
        """Hidden axes whose devices each send a part of what they all hold, where anything is sent at all."""
        return self.hidden if self.experts else ()

    @property
    def replicas(self) -> Axes:
        """Axes along which the same tokens would be served twice."""
        return tuple(axis for axis in ("tensor",) if self.spread.mesh.shape[axis] > 1 and axis not in self.hidden)


def sharded_experts(
    spread: Spread, bucket_factor: float | None, exchange: str, platform: str | None = None
) -> Callable:
    """Returns `apply_experts` for a mesh; `exchange` ("bucket" or "ragged") is how dropless choices travel."""
    experts, hidden = spread.axes_of("experts"), spread.axes_of("mlp")
    fold = Fold(spread, experts, hidden, spread.residual, bucket_factor, exchange == "ragged", platform)
    return functools.partial(_apply, fold)


def _apply(
    fold: Fold,
    weights: ExpertWeights,
    x_BTD: Float[Array, "B T D"],
    routing: Routing,
    config: MoeConfig,
    drops: bool,
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    tokens = PartitionSpec(fold.spread.rows, fold.sequence)
    specs = {
        name: None if w is None else partition_spec(WEIGHT_DIMS[name], w.shape, fold.spread.mesh, fold.spread.rules)
        for name, w in vars(weights).items()
    }
    choices = (routing.expert_ids_UK, routing.gates_UK, routing.used_UK)
    shard = functools.partial(_capacity_shard if drops else _dropless_shard, fold, config)
    apply = island(
        lambda weights, x, choices: shard(_whole_matrices(weights, specs, x.dtype), x, _routing(*choices)),
        fold.spread.mesh,
        in_specs=(ExpertWeights(**specs), tokens, (tokens,) * 3),
        out_specs=(tokens, PartitionSpec()),
    )
    return apply(weights, x_BTD, choices)


def _whole_matrices(weights: ExpertWeights, specs: dict[str, PartitionSpec | None], dtype: jnp.dtype) -> ExpertWeights:
    """This device's experts with dims that lie on other axes (`embed` over fsdp) gathered."""

    def whole(name: str, w: Array | None) -> Array | None:
        for dim, (logical, axes) in enumerate(zip(WEIGHT_DIMS[name], specs[name] or (), strict=False)):
            if logical == "embed" and axes:
                w = _gather_rounded(w, axes, dim, dtype)
        return w

    return ExpertWeights(**{name: whole(name, w) for name, w in vars(weights).items()})


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_rounded(w: Array, axes: Axes, dim: int, dtype: jnp.dtype) -> Array:
    """A matrix gathered along `dim` in the dtype that products take it in; its gradient is summed unrounded."""
    return jax.lax.all_gather(w.astype(dtype), axes, axis=dim, tiled=True).astype(w.dtype)


def _gather_forward(w: Array, axes: Axes, dim: int, dtype: jnp.dtype) -> tuple[Array, None]:
    return _gather_rounded(w, axes, dim, dtype), None


def _gather_backward(axes: Axes, dim: int, _dtype: jnp.dtype, _residuals: None, dw: Array) -> tuple[Array]:
    return (jax.lax.psum_scatter(dw, axes, scatter_dimension=dim, tiled=True),)


_gather_rounded.defvjp(_gather_forward, _gather_backward)


def _routing(ids: Array, gates: Array, used: Array) -> Routing:
    """The choices alone: losses and counts have been taken outside."""
    none = jnp.zeros(len(ids))
    return Routing(ids, gates, used, RouterLosses(none, none, none[:, None]), RouterStats(none[:, None], none, none))


def _capacity_shard(fold: Fold, config: MoeConfig, weights: ExpertWeights, x_BTD: Array, routing: Routing):
    """Places are given out per whole row, wherever its tokens lie; devices that share a row share out its places."""
    x_BUD, routing = (jax.tree.map(lambda leaf: _gathered(leaf, fold.sequence), part) for part in (x_BTD, routing))
    dispatched = dispatch.capacity(x_BUD, routing, config)
    sharing = _union(fold.sequence, fold.replicas, fold.travelling)
    sharing = tuple(axis for axis in sharing if axis in fold.travelling or axis not in fold.hidden)
    rows_ECD = _exchange(_my_part(dispatched.rows_XCD, sharing), fold.experts, split=0, join=1)
    y_ECD = _split_hidden(
        fold,
        lambda rows: feed_forward(
            weights, dataclasses.replace(dispatched, rows_XCD=rows), config.grouped_product, fold.platform
        ),
        rows_ECD,
    )
    y_ECD = _in_place(_exchange(y_ECD, fold.experts, split=1, join=0), sharing, dispatched.rows_XCD.shape[1])
    y_BUD = dispatch.combine(y_ECD, dispatched.plan, len(x_BTD))
    dropped = jax.lax.psum(jnp.sum(dispatched.stats.dropped_G), fold.spread.rows)
    return _summed(y_BUD, fold.sequence, _union(sharing, fold.hidden)), dropped


def _dropless_shard(fold: Fold, config: MoeConfig, weights: ExpertWeights, x_BTD: Array, routing: Routing):
    """Each device sends its own tokens; only where nothing travels must those that split hidden dims hold the same."""
    gathered = tuple(axis for axis in fold.sequence if axis in fold.hidden and axis not in fold.travelling)
    sharing = tuple(axis for axis in _union(fold.replicas, fold.travelling) if axis not in fold.sequence)
    x_BUD, routing = (jax.tree.map(lambda leaf: _gathered(leaf, gathered), part) for part in (x_BTD, routing))
    length = x_BUD.shape[1]
    x_BUD, routing = (jax.tree.map(lambda leaf: _my_part(leaf, sharing), part) for part in (x_BUD, routing))
    if fold.experts:
        y_BUD, dropped = _to_shards(fold, config, weights, x_BUD, routing)
    else:
        y_BUD, dropped = apply_experts(weights, x_BUD, routing, config, False, fold.platform)
    y_BUD = _in_place(y_BUD, sharing, length)
    counted = tuple(axis for axis in _union(fold.spread.rows, fold.sequence, sharing) if axis not in gathered)
    partial = () if fold.travelling else fold.hidden
    return _summed(y_BUD, gathered, _union(partial, sharing)), jax.lax.psum(dropped, counted)


def _to_shards(fold: Fold, config: MoeConfig, weights: ExpertWeights, x_BUD: Array, routing: Routing):
    """Choices in one bucket for each device that holds experts; what arrives is sorted by expert there.

    A bucket has room for all choices that one device's tokens can make (bucket_factor None), so that none is ever
    without a place, or for its fair share times the factor, and those without a place are counted as dropped.
    """
    rows, tokens, dim = x_BUD.shape
    num_shards = math.prod(fold.spread.mesh.shape[axis] for axis in fold.experts)
    held = config.num_experts // num_shards
    pool = jax.tree.map(lambda leaf: leaf.reshape(1, rows * tokens, *leaf.shape[2:]), (x_BUD, _choices(routing)))
    x_1UD, (ids, gates, used) = pool
    room = _bucket_room(rows * tokens, ids.shape[-1], held, num_shards, fold.bucket_factor)
    serve = functools.partial(_serve_arrived, fold, weights, config, held)
    if fold.ragged:
        routing = _routing(ids, gates, used)
        y_1UD, dropped = to_shards_ragged(x_1UD, routing, held, num_shards * room, fold.experts[0], serve)
        return y_1UD.reshape(x_BUD.shape), dropped
    sent = dispatch.to_places(x_1UD, _routing(ids // held, gates, used), num_shards, room)
    local_S = _take_ids(ids[0] % held, sent.plan.choice_of_slot_PS[0], empty=held)
    exchange = functools.partial(_exchange, axes=fold.experts, split=0, join=0)
    arrived_1SD = exchange(sent.rows_XCD).reshape(1, -1, dim)
    ids_1S = exchange(local_S.reshape(num_shards, room)).reshape(1, -1)
    y_XCD = exchange(serve(arrived_1SD, ids_1S[..., None]).reshape(num_shards, room, dim))
    return dispatch.combine(y_XCD, sent.plan, rows), jnp.sum(sent.stats.dropped_G)


def _serve_arrived(
    fold: Fold, weights: ExpertWeights, config: MoeConfig, held: int, x_1SD: Array, ids_1S1: Array
) -> Array:
    """Rows through the one expert that each is for, of the `held` ones here; none where its id is `held`."""
    all_ids_1S1 = _gathered(ids_1S1, fold.travelling)
    gates = jnp.ones(all_ids_1S1.shape, jnp.float32)
    one_each = _routing(jnp.minimum(all_ids_1S1, held - 1), gates, all_ids_1S1 < held)
    one = {"experts_per_token": 1, "normalize_gates": False, "num_groups": 1, "groups_per_token": 1}  # routed already
    here = dataclasses.replace(config, num_experts=held, **one)
    return _split_hidden(
        fold, lambda rows: apply_experts(weights, rows, one_each, here, False, fold.platform)[0], x_1SD
    )


def _split_hidden(fold: Fold, compute: Callable[[Array], Array], rows_XCD: Array) -> Array:
    """`compute`, whose results are partial sums over the hidden axes, of rows that their devices hold in parts."""
    if not fold.travelling:
        return compute(rows_XCD)
    whole = jax.lax.all_gather(rows_XCD, fold.hidden, axis=1, tiled=True)
    return jax.lax.psum_scatter(compute(whole), fold.hidden, scatter_dimension=1, tiled=True)


def _bucket_room(tokens: int, num_choices: int, held: int, num_shards: int, factor: float | None) -> int:
    most = tokens * min(num_choices, held)
    return most if factor is None else min(most, math.ceil(tokens * num_choices / num_shards * factor))


def _choices(routing: Routing) -> tuple[Array, Array, Array]:
    return routing.expert_ids_UK, routing.gates_UK, routing.used_UK


def _take_ids(ids_UK: Array, choice_S: Array, *, empty: int) -> Array:
    return ids_UK.reshape(-1).at[choice_S].get(mode="fill", fill_value=empty)


def _union(*axes: Axes) -> Axes:
    return tuple(dict.fromkeys(axis for some in axes for axis in some))


def _exchange(x: Array, axes: Axes, split: int, join: int) -> Array:
    return jax.lax.all_to_all(x, axes, split_axis=split, concat_axis=join, tiled=True) if axes else x


def _gathered(x_BT: Array, axes: Axes) -> Array:
    """Dim 1 whole; per-row values without it as they are."""
    return jax.lax.all_gather(x_BT, axes, axis=1, tiled=True) if axes and x_BT.ndim > 2 else x_BT


def _summed(y_BTD: Array, scattered: Axes, summed: Axes) -> Array:
    """The sum over `summed`, of which each device keeps its own tokens along `scattered`."""
    for axis in scattered:
        y_BTD = jax.lax.psum_scatter(y_BTD, axis, scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in summed if axis not in scattered)
    return jax.lax.psum(y_BTD, rest) if rest else y_BTD


def _my_part(x: Array, axes: Axes) -> Array:
    """This device's share of dim 1, padded with zeros where it does not divide."""
    if not axes or x.ndim < 3:
        return x
    share = -(-x.shape[1] // jax.lax.axis_size(axes))
    padding = share * jax.lax.axis_size(axes) - x.shape[1]
    padded = jnp.pad(x, [(0, padding if dim == 1 else 0) for dim in range(x.ndim)])
    return jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(axes) * share, share, axis=1)


def _in_place(x: Array, axes: Axes, length: int) -> Array:
    """Undoes `_my_part`: zeros where other devices have theirs."""
    if not axes:
        return x
    whole = jnp.zeros((x.shape[0], x.shape[1] * jax.lax.axis_size(axes), *x.shape[2:]), x.dtype)
    placed = jax.lax.dynamic_update_slice_in_dim(whole, x, jax.lax.axis_index(axes) * x.shape[1], axis=1)
    return placed[:, :length]
