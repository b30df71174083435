"""Pipeline parallelism: stages of layers work on different microbatches at a time, and hand them on in a ring.

Behind the contract of `gpt4moe.model.layout.scan_layers`. The schedule is that of `gpt4moe.accounting.pipeline`: at
tick t stage s works on unit t - s, microbatch (unit mod m) through its chunk (unit div m). With one chunk a stage
this is GPipe (Huang et al. 2019); with v chunks tokens go v times round the ring (Megatron's interleaved stages,
Narayanan et al. 2021) and the idle share falls v-fold. Backward ticks are the forward ones in reverse, by autodiff.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gpt4moe.accounting.pipeline import num_ticks, work_at
from gpt4moe.config.mesh import grouped_placement
from gpt4moe.parallel.island import Spread, island, laid_out
from gpt4moe.types import Array


@dataclasses.dataclass(frozen=True)
class Schedule:
    """stages p, chunks of each stage v, slots of a chunk n; slots: which superblock each holds, -1 for none.

    microbatches m of a pass, None: as many as there are rows on a device.
    """

    stages: int
    chunks: int
    slots: tuple[int, ...]
    microbatches: int | None

    @property
    def order(self) -> np.ndarray:
        """The slot of every superblock."""
        held = np.array(self.slots)
        return np.argsort(held, kind="stable")[np.sum(held < 0) :]

    def grouped(self, each: int) -> Schedule:
        """The schedule of groups of `each` superblocks, which stand side by side on a stage."""
        return dataclasses.replace(self, slots=grouped_placement(self.slots, each))


def pipelined_layers(spread: Spread, schedule: Schedule) -> Callable:
    """Returns `scan_layers` for a mesh with a `stage` axis."""
    return functools.partial(_run, spread, schedule)


def _run(spread: Spread, schedule: Schedule, superblock: Callable, parameters, cache, x_BTD: Array, tokens) -> tuple:
    each = len(schedule.slots) // jax.tree.leaves(parameters)[0].shape[0]
    schedule = schedule.grouped(each)
    span = int(np.prod([spread.mesh.shape[axis] for axis in spread.rows]))
    count = schedule.microbatches or max(len(x_BTD) // span, 1)
    on_stage, everywhere = PartitionSpec("stage"), PartitionSpec()
    stage = functools.partial(_stage, spread, schedule, superblock)
    run = island(
        stage,
        spread.mesh,
        in_specs=(on_stage, on_stage, everywhere, everywhere),
        out_specs=(everywhere, on_stage, on_stage, everywhere),
        axes=("stage",),
    )
    cut = functools.partial(_cut, count=count, length=x_BTD.shape[1], spread=spread)
    cut_cache = jax.tree.map(lambda leaf: _cut_cache(leaf, count), cache)
    y_WBTD, cut_cache, reports, idle_slots = run(parameters, cut_cache, cut(x_BTD), jax.tree.map(cut, tokens))
    in_order = jax.tree.map(lambda leaf: leaf[schedule.order], reports)
    y_BTD = y_WBTD.swapaxes(0, 1).reshape(x_BTD.shape)
    return y_BTD, jax.tree.map(_join_cache, cut_cache), in_order, idle_slots * each


def _stage(spread: Spread, schedule: Schedule, superblock: Callable, parameters, cache, x_WBTD: Array, tokens) -> tuple:
    """What one stage does with its slots [v*n, ...] of parameters and cache, and all microbatches [m, B, T, D]."""
    p, v, m = schedule.stages, schedule.chunks, len(x_WBTD)
    stage = jax.lax.axis_index("stage")
    by_chunk = jax.tree.map(lambda leaf: leaf.reshape(v, -1, *leaf.shape[1:]), (parameters, cache))
    held = jnp.array(schedule.slots).reshape(p, v, -1)[stage] >= 0
    ring = [(i, (i + 1) % p) for i in range(p)]

    def tick(carry: tuple, time: Array) -> tuple:
        waiting_WBTD, arrived_BTD, cache, totals, idle = carry
        # What the last stage made of a microbatch comes round to the first, where it waits for its next chunk.
        waiting_WBTD = jnp.where(time >= p, waiting_WBTD.at[(time - p) % m].set(arrived_BTD), waiting_WBTD)
        work = work_at(time, stage, m, v)
        microbatch, chunk = work.microbatch, jnp.clip(work.chunk, 0, v - 1)
        active = held[chunk] & work.is_busy
        x_BTD = jnp.where(stage == 0, waiting_WBTD[microbatch], arrived_BTD)
        at_hand = jax.tree.map(lambda leaf: leaf[microbatch], tokens)
        layer_cache = jax.tree.map(lambda leaf: leaf[chunk], cache)
        here = jax.tree.map(lambda leaf: leaf[:, :, microbatch], layer_cache)
        y_BTD, here, reports = _chunk(superblock, by_chunk[0], chunk, here, active, x_BTD, at_hand)
        cache = jax.tree.map(lambda whole, part: whole.at[chunk, :, :, microbatch].set(part), cache, here)
        totals = jax.tree.map(lambda total, report: total.at[chunk].add(report), totals, reports)
        y_BTD = laid_out(y_BTD, spread.mesh, PartitionSpec(spread.rows, spread.residual))
        idle += jnp.sum(~active, dtype=jnp.int32)
        return (waiting_WBTD, jax.lax.ppermute(y_BTD, "stage", ring), cache, totals, idle), None

    totals = _zeros_of_reports(superblock, by_chunk, x_WBTD, tokens, v)
    carry = (x_WBTD, jnp.zeros_like(x_WBTD[0]), by_chunk[1], totals, jnp.int32(0))
    ticks = num_ticks(p, m, v)
    (waiting_WBTD, arrived_BTD, cache, totals, idle), _ = jax.lax.scan(tick, carry, jnp.arange(ticks))
    done_WBTD = waiting_WBTD.at[m - 1].set(arrived_BTD)
    cache, totals = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (cache, totals))
    idle_slots = jnp.stack([jax.lax.psum(idle, "stage"), ticks * p * held.shape[1]])
    return jax.lax.psum(jnp.where(stage == 0, done_WBTD, 0), "stage"), cache, totals, idle_slots


def _chunk(superblock: Callable, stacks, chunk: Array, cache, active: Array, x_BTD: Array, tokens) -> tuple:
    """The slots of a chunk of the `stacks` [v, n, ...] in turn; an inactive one changes nothing and reports zeros."""

    def step(x_BTD: Array, slot: tuple) -> tuple:
        number, cache, active = slot
        y_BTD, new_cache, report = superblock(x_BTD, stacks, cache, tokens, (chunk, number))
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(active, new, old))
        return keep(y_BTD, x_BTD), (keep(new_cache, cache), keep(report, jax.tree.map(jnp.zeros_like, report)))

    y_BTD, (cache, reports) = jax.lax.scan(step, x_BTD, (jnp.arange(len(active)), cache, active))
    return y_BTD, cache, reports


def _zeros_of_reports(superblock: Callable, by_chunk: tuple, x_WBTD: Array, tokens, chunks: int) -> Any:
    """What `superblock` reports, as zeros [v, n, ...]."""
    parameters, cache = jax.tree.map(lambda leaf: leaf[0, 0], by_chunk)
    cache = jax.tree.map(lambda leaf: leaf[:, 0], cache)  # [layers, B, ...] of microbatch 0
    first = jax.tree.map(lambda leaf: leaf[0], (x_WBTD, tokens))
    report = jax.eval_shape(superblock, first[0], parameters, cache, first[1])[2]
    slots = jax.tree.leaves(by_chunk)[0].shape[1]
    return jax.tree.map(lambda leaf: jnp.zeros((chunks, slots, *leaf.shape), leaf.dtype), report)


def _cut(x_B: Array, *, count: int, length: int, spread: Spread) -> Array:
    """[B, ...] to [m, B/m, ...], every device's rows cut in place: no row moves."""
    cut = x_B.reshape(-1, count, *x_B.shape[1:]).swapaxes(0, 1)
    is_stream = x_B.ndim == 3 and jnp.issubdtype(x_B.dtype, jnp.floating)
    sequence = spread.residual if is_stream else spread.context if x_B.shape[1] == length else ()
    return laid_out(cut, spread.mesh, PartitionSpec(None, spread.rows, sequence))


def _cut_cache(leaf: Array, count: int) -> Array:
    """[slots, layers, B, ...] to [slots, layers, m, B/m, ...]."""
    return leaf.reshape(*leaf.shape[:2], -1, count, *leaf.shape[3:]).swapaxes(2, 3)


def _join_cache(leaf: Array) -> Array:
    return leaf.swapaxes(2, 3).reshape(*leaf.shape[:2], -1, *leaf.shape[4:])
