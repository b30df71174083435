"""Shardings of parameters, optimizer state and batches, from logical dim names and the rules table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt4moe.config.check import require
from gpt4moe.config.rules import ShardingRules


def partition_spec(
    dims: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: ShardingRules, *, name: str = "tensor"
) -> PartitionSpec:
    """Returns the mesh axes of every dim of one tensor; axes of size 1 are left out. A single expert lies everywhere.

    Raises `CallerError` where two dims fall on one mesh axis, or an axis does not divide its dim.
    """
    require(len(dims) == len(shape), name, tuple(dims), f"must name each of the {len(shape)} dims of {tuple(shape)}")
    entries, used = [], set()
    for dim, size in zip(dims, shape, strict=True):
        axes = split_axes(mesh, rules.axes_of(dim) if dim and not (dim == "experts" and size == 1) else ())
        span = math.prod(mesh.shape[axis] for axis in axes)
        twice = f"puts two dims on mesh axis {sorted(used & set(axes))}"
        require(not used & set(axes), name, tuple(dims), twice, "change ShardingRules.overrides or MESH")
        constraint = f"must be divisible by the {'*'.join(axes)} axis ({span})"
        require(size % span == 0, f"{name}.{dim}", size, constraint, "change the model, ShardingRules or MESH")
        used |= set(axes)
        entries.append(axes if len(axes) > 1 else (axes[0] if axes else None))
    return PartitionSpec(*entries)


def split_axes(mesh: Mesh, axes: Sequence[str]) -> tuple[str, ...]:
    """Those of `axes` that split anything: more than one device lies along them."""
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def state_shardings(abstract_state: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """Returns the shardings of a tree whose parameters (and their optimizer moments) are `nnx.Variable`s.

    A variable names its dims in its `logical_axes` metadata, all of which the table must cover; every plain array
    (step, keys, counts) is replicated.
    """

    def of_leaf(path, leaf):
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        value = leaf.get_value()
        dims = leaf.get_metadata().get("logical_axes")
        require(dims is not None, name, value.shape, "names no logical dims", "give nnx.Param(..., logical_axes=(...))")
        spec = partition_spec(dims, value.shape, mesh, rules, name=name)
        return leaf.replace(NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(
        of_leaf, abstract_state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def laid_out_shapes(shapes: Any, shardings: Any, dtype: jnp.dtype | None = None) -> Any:
    """Returns abstract arrays of these shapes and shardings, of their own dtype or of `dtype`."""

    def of_leaf(leaf: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=where)

    return jax.tree.map(of_leaf, shapes, shardings)


def over_data(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """`sharding` with the replicas along `data` each holding a part: ZeRO-1 (Rajbhandari et al. 2019), for moments.

    The largest dim that divides is cut once more; a tensor without one stays replicated.
    """
    mesh, spec = sharding.mesh, (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    taken = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]
    spans = [math.prod(mesh.shape[axis] for axis in (*axes, "data")) for axes in taken]
    fitting = [dim for dim, span in enumerate(spans) if shape[dim] % span == 0]
    if mesh.shape["data"] == 1 or not fitting:
        return sharding
    cut = max(fitting, key=lambda dim: shape[dim] // spans[dim])
    taken[cut] = (*taken[cut], "data")
    return NamedSharding(mesh, PartitionSpec(*taken))


def by_row(tokens: NamedSharding) -> NamedSharding:
    """Returns the sharding of what a row has once, whatever its tokens: that of `tokens` [..., B, T] without T."""
    return NamedSharding(tokens.mesh, PartitionSpec(*tokens.spec[:-1]))


def batch_sharding(mesh: Mesh, rules: ShardingRules) -> NamedSharding:
    """Returns the sharding of `[B, T]` arrays: rows over the batch axes, T over `context`."""
    return NamedSharding(mesh, PartitionSpec(split_axes(mesh, rules.batch_axes), split_axes(mesh, ("context",))))
