"""From one order of the superblocks in a parameter stack to another, on the devices, without gathering the stack.

An order says which superblock each row of a stack holds, `NO_SUPERBLOCK` (-1) for a row of zeros that pads a chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from gpt4moe.config.mesh import NO_SUPERBLOCK
from gpt4moe.types import Array


def padded_rows(num_rows: int, sharding: Sharding) -> int:
    """`num_rows`, rounded up to what the sharding's first dim divides."""
    span = math.prod(sharding.mesh.shape[axis] for axis in _row_axes(sharding))
    return -(-num_rows // span) * span


def reorder(stack: Array, held: Sequence[int], wanted: Sequence[int]) -> Array:
    """Rows of `stack` [slots, ...] in the wanted order and the sharding of `stack`, to the bit; zeros in a padding row.

    The order `held` may be shorter than the stack, whose further rows are not read. Rows that lie on devices are passed
    once around them: a device holds its part of both orders and one more part at a time.
    """
    rows = tuple(held.index(superblock) if superblock != NO_SUPERBLOCK else NO_SUPERBLOCK for superblock in wanted)
    return _take(stack, rows, stack.sharding)


@functools.partial(jax.jit, static_argnames=("rows", "sharding"))
def _take(stack: Array, rows: tuple[int, ...], sharding: Sharding) -> Array:
    axes, rows = _row_axes(sharding), jnp.array(rows)
    if not axes:
        return jax.lax.with_sharding_constraint(_where_held(stack, rows, jnp.zeros((), stack.dtype)), sharding)
    span = math.prod(sharding.mesh.shape[axis] for axis in axes)
    ring = [(device, (device + 1) % span) for device in range(span)]

    def on_device(part: Array, wanted: Array) -> Array:
        def turn(count: Array, carried: tuple[Array, Array]) -> tuple[Array, Array]:
            taken, passing = carried
            owner = (jax.lax.axis_index(axes) - count) % span
            return _where_held(passing, wanted - owner * len(part), taken), jax.lax.ppermute(passing, axes, ring)

        nothing = jnp.zeros((len(wanted), *part.shape[1:]), part.dtype)
        return jax.lax.fori_loop(0, span, turn, (nothing, part))[0]

    specs = {"in_specs": (sharding.spec, jax.sharding.PartitionSpec(axes)), "out_specs": sharding.spec}
    return jax.shard_map(on_device, mesh=sharding.mesh, **specs, check_vma=False)(stack, rows)


def _where_held(part: Array, rows: Array, otherwise: Array) -> Array:
    """Those of `rows` that `part` has, `otherwise` in place of the rest."""
    has = ((rows >= 0) & (rows < len(part))).reshape(-1, *(1,) * (part.ndim - 1))
    return jnp.where(has, jnp.take(part, rows, axis=0, mode="clip"), otherwise)


def _row_axes(sharding: Sharding) -> tuple[str, ...]:
    """Mesh axes over which the rows lie."""
    entry = sharding.spec[0] if isinstance(sharding, NamedSharding) and len(sharding.spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
