"""Islands: functions of what one device holds, called from a program that XLA partitions by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.rules import ShardingRules
from gpt4moe.parallel.sharding import split_axes
from gpt4moe.types import Array

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Which axes of a mesh each dim of activations lies on, axes of size 1 left out.

    rows: B. context: T. residual: T between layers, where `sequence_parallel` adds `tensor`.
    """

    mesh: Mesh
    rules: ShardingRules
    rows: Axes
    context: Axes
    residual: Axes

    def axes_of(self, dim: str) -> Axes:
        """Axes of a logical dim of a parameter."""
        return split_axes(self.mesh, self.rules.axes_of(dim))


def spread(mesh: Mesh, config: MeshConfig, rules: ShardingRules) -> Spread:
    """How activations lie on `mesh`."""
    context = split_axes(mesh, ("context",))
    tensor = split_axes(mesh, ("tensor",)) if config.sequence_parallel else ()
    return Spread(mesh, rules, split_axes(mesh, rules.batch_axes), context, context + tensor)


def island(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any, axes: Axes | None = None) -> Callable:
    """Returns `function`, which sees one device's shards, as a function of whole arrays.

    `axes` are those it handles itself (None: all that no island around it does). Arrays whose spec leaves an axis out
    are the same along it, and JAX sums their gradients over it. Varying types are not checked: kernels and functions
    with their own backward pass do not carry them.
    """
    taken = set(jax.sharding.get_abstract_mesh().manual_axes)
    return jax.shard_map(
        function,
        mesh=None if taken else mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(axes or mesh.axis_names) - taken,
        check_vma=False,
    )


def laid_out(x: Array, mesh: Mesh, spec: PartitionSpec) -> Array:
    """`x` with its layout fixed, inside an island or not."""
    inside = jax.sharding.get_abstract_mesh().manual_axes
    return jax.lax.with_sharding_constraint(x, spec if inside else NamedSharding(mesh, spec))
