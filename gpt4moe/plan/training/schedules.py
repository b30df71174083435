"""Pipeline schedules: the bubble, the microbatches in flight on a stage, copies of weights, messages between stages.

In: stages p, microbatches m, virtual stages v. Out: numbers; what a bubble lasts is the business of `step_time`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from gpt4moe.accounting.pipeline import idle_fraction


@dataclasses.dataclass(frozen=True)
class Schedule:
    """bubble_ratio(p, m, v): idle time over busy time. in_flight(p, m, v, stage): microbatches whose activations wait.

    weight_copies: of a stage's layers on one chip. messages: times an activation crosses a boundary, over 1F1B's v.
    is_folded: a chip holds stage i and stage p - 1 - i.
    """

    bubble_ratio: Callable[[int, int, int], float]
    in_flight: Callable[[int, int, int, int], float]
    has_virtual_stages: bool = False
    weight_copies: int = 1
    messages: int = 1
    is_folded: bool = False


def _ours(stages: int, microbatches: int, virtual: int) -> float:
    idle = float(idle_fraction(stages, microbatches, virtual))
    return idle / (1 - idle)


def _interleaved_in_flight(stages: int, microbatches: int, virtual: int, stage: int) -> float:
    """p (1 + (p-1)/(p v)) on the first stage (Korthikanti et al. 2022, section 4.2.3), two chunks less for each after.

    Stage r begins its first backward pass after 2 (p - 1 - r) + (v - 1) p forward passes of a chunk, and one.
    """
    if virtual == 1:
        return min(microbatches, stages - stage)
    chunks = 2 * (stages - 1 - stage) + (virtual - 1) * stages + 1
    return min(microbatches, chunks / virtual)


# GPipe: Huang et al. 2019. 1F1B and interleaved: Narayanan et al. 2021, section 2.2. ZB: Qi et al. 2023 (2401.10241),
# table 2, with forward, input gradient and weight gradient of equal length. DualPipe: DeepSeek-V3 (2412.19437), table
# 2, with its overlapped forward and backward as long as the two: (p/2 - 1) (F&B + B - 3W) = (p/2 - 1) 2/3 (F + B).
SCHEDULES = {
    "gpipe": Schedule(_ours, lambda p, m, v, stage: m),
    "circular": Schedule(
        _ours, lambda p, m, v, stage: m if p > 1 else 1, has_virtual_stages=True
    ),  # `accounting.pipeline`
    "1f1b": Schedule(_ours, lambda p, m, v, stage: min(m, p - stage)),
    "interleaved": Schedule(_ours, _interleaved_in_flight, has_virtual_stages=True),
    "zb_h1": Schedule(lambda p, m, v: (p - 1) / (3 * m), lambda p, m, v, stage: min(m, p)),
    "zb_h2": Schedule(lambda p, m, v: 0.0, lambda p, m, v, stage: min(m, 2 * p - 1)),
    "zb_v": Schedule(lambda p, m, v: 0.0, lambda p, m, v, stage: min(m, p), messages=2, is_folded=True),
    "dualpipe": Schedule(
        lambda p, m, v: max(p / 2 - 1, 0) * 2 / (3 * m),
        lambda p, m, v, stage: min(m, p + 1),
        weight_copies=2,
        messages=2,
        is_folded=True,
    ),
}
