"""The pipeline schedule and its bubble: from stages (p), microbatches (m) and virtual stages (v) to who works when.

A pass sends m microbatches through p stages, each holding v chunks of layers; chunk j of stage s is virtual stage
j*p + s, so that a microbatch goes round all stages v times (circular, or interleaved: Narayanan et al. 2021, section
2.2; with v = 1 it is GPipe, Huang et al. 2019). A stage works on unit u = j*m + i at tick u + s: all microbatches i
through its chunk j, then the next chunk. With m >= p a microbatch is back at the first stage before its next turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import Any


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage does in one tick: nothing unless `is_busy`, else `microbatch` through its `chunk`.

    Both are in range for a busy stage only.
    """

    is_busy: Any
    microbatch: Any
    chunk: Any


def work_at(tick: Any, stage: Any, num_microbatches: int, virtual_stages: int = 1) -> Work:
    """Returns what `stage` does in `tick`, both counted from 0; either may be a traced integer."""
    unit = tick - stage
    is_busy = (unit >= 0) & (unit < virtual_stages * num_microbatches)
    return Work(is_busy, unit % num_microbatches, unit // num_microbatches)


def num_ticks(num_stages: int, num_microbatches: int, virtual_stages: int = 1) -> int:
    """Returns the ticks of one pass: v*m units on every stage, the last of which begins p - 1 ticks late."""
    return virtual_stages * num_microbatches + num_stages - 1


def idle_fraction(num_stages: int, num_microbatches: int, virtual_stages: int = 1) -> Fraction:
    """Returns the share of stage-ticks without work where all chunks are equal, (p-1) / (v*m + p-1)."""
    return Fraction(num_stages - 1, num_ticks(num_stages, num_microbatches, virtual_stages))


def uneven_idle_fraction(chunk_sizes: Sequence[int], num_stages: int, num_microbatches: int) -> Fraction:
    """Returns the share of layer slots without work, for the layers of every virtual stage in counting order.

    Stages hand over together, so that every tick lasts as long as the longest chunk: a shorter one waits. Equals
    `idle_fraction` where all chunks are equal.
    """
    ticks = num_ticks(num_stages, num_microbatches, len(chunk_sizes) // num_stages)
    slots = ticks * num_stages * max(chunk_sizes)
    return 1 - Fraction(num_microbatches * sum(chunk_sizes), slots)
