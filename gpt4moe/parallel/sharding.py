"""Shardings of parameters, optimizer state and batches, from logical dim names and the rules table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt4moe.config.check import require
from gpt4moe.config.rules import ShardingRules


def partition_spec(
    dims: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: ShardingRules, *, name: str = "tensor"
) -> PartitionSpec:
    """Returns the mesh axes of every dim of one tensor; axes of size 1 are left out.

    Raises `CallerError` where two dims fall on one mesh axis, or an axis does not divide its dim.
    """
    require(len(dims) == len(shape), name, tuple(dims), f"must name each of the {len(shape)} dims of {tuple(shape)}")
    entries, used = [], set()
    for dim, size in zip(dims, shape, strict=True):
        axes = tuple(axis for axis in (rules.axes_of(dim) if dim else ()) if mesh.shape[axis] > 1)
        span = math.prod(mesh.shape[axis] for axis in axes)
        require(not used & set(axes), name, tuple(dims), f"puts two dims on mesh axis {sorted(used & set(axes))}")
        require(size % span == 0, f"{name}.{dim}", size, f"must be divisible by the {'*'.join(axes)} axis ({span})")
        used |= set(axes)
        entries.append(axes if len(axes) > 1 else (axes[0] if axes else None))
    return PartitionSpec(*entries)


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


def batch_sharding(mesh: Mesh, rules: ShardingRules) -> NamedSharding:
    """Returns the sharding of `[B, T]` arrays: rows over data x fsdp x expert."""
    return NamedSharding(mesh, PartitionSpec(rules.batch_axes))


def check_rows(rows: int, mesh: Mesh, rules: ShardingRules) -> None:
    """Raises unless the rows of a microbatch divide over the batch axes."""
    span = math.prod(mesh.shape[axis] for axis in rules.batch_axes)
    require(
        rows % span == 0,
        "microbatch_rows",
        rows,
        f"must be divisible by the {'*'.join(rules.batch_axes)} axes ({span})",
    )
