"""The bubble of the pipeline schedules: a simulation of what waits for what, beside the formula.

    python benchmarks/pipeline_bubble.py [--json]

Simulates forward and backward of one pass event by event: a stage begins a unit when it is free and the unit's input
has arrived, and takes as long as the chunk has layers, twice that backward; the backward pass begins when the forward
pass has ended on the last stage. Nothing of the schedule's formula enters. Measures for p stages, m microbatches and v
virtual stages the share of time in which a stage is idle, in exact fractions: for equal stages it must be the formula.
Uneven stages stand beside the count of `accounting.pipeline`, in which all hand over together and so wait longer.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
from collections.abc import Sequence
from fractions import Fraction

from gpt4moe.accounting import pipeline

STAGES, VIRTUAL_STAGES = (1, 2, 4, 8, 15, 16), (1, 2, 4)
PASSES_OF_STAGES = (1, 2, 4)  # microbatches are these multiples of the stages, and a number that is none
UNEVEN = (  # layers of every virtual stage, stages, microbatches; the first is the reference's 120 layers as served
    ((7, 8) * 8, 16, 32),
    ((5, 6, 6, 6, 6, 6, 6, 5), 8, 16),
    ((1, 2), 2, 4),
    ((1, 2, 2, 1), 2, 4),
)
BACKWARD_OVER_FORWARD = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    equal, uneven = equal_rows(), [row_of(*case) for case in UNEVEN]
    if arguments.json:
        print(json.dumps({"equal": [plain(row) for row in equal], "uneven": [plain(row) for row in uneven]}))
    else:
        print("\n".join(["equal stages", *table(equal), "", "uneven stages, counted in layer slots", *table(uneven)]))


def equal_rows() -> list[dict]:
    """One row for each p, m and v that the schedule allows (v > 1 needs m >= p)."""
    rows = []
    for stages, virtual, passes in itertools.product(STAGES, VIRTUAL_STAGES, PASSES_OF_STAGES):
        for microbatches in (passes * stages, passes * stages + 3):
            rows.append(row_of((1,) * (stages * virtual), stages, microbatches))
    return rows


def row_of(chunk_sizes: Sequence[int], stages: int, microbatches: int) -> dict:
    """Simulated and calculated idle fraction of one pass."""
    virtual = len(chunk_sizes) // stages
    is_equal = len(set(chunk_sizes)) == 1
    formula = (
        pipeline.idle_fraction(stages, microbatches, virtual)
        if is_equal
        else pipeline.uneven_idle_fraction(chunk_sizes, stages, microbatches)
    )
    simulated = simulate(chunk_sizes, stages, microbatches)
    row = {"stages": stages, "microbatches": microbatches, "virtual_stages": virtual}
    row |= {} if is_equal else {"stage_layers": list(chunk_sizes)}
    return row | {"simulated": simulated, "formula": formula, "difference": simulated - formula}


def simulate(chunk_sizes: Sequence[int], stages: int, microbatches: int) -> Fraction:
    """Idle share of all stages from the start of the forward pass to the end of the backward pass."""
    forward = run(chunk_sizes, stages, microbatches)
    # Backward the last virtual stage comes first, and a stage has the gradient of the last microbatch first: the same
    # chain of dependencies seen from the other end.
    backward = run([BACKWARD_OVER_FORWARD * size for size in reversed(chunk_sizes)], stages, microbatches)
    busy = (1 + BACKWARD_OVER_FORWARD) * microbatches * sum(chunk_sizes)
    return 1 - Fraction(busy, stages * (forward + backward))


def run(durations: Sequence[int], stages: int, microbatches: int) -> int:
    """Time at which the last unit ends, when every microbatch goes through `durations` in order.

    A free stage takes the oldest of what has arrived: the earliest chunk, in it the first microbatch.
    """
    waiting = [[] for _ in range(stages)]
    waiting[0] = [(0, microbatch) for microbatch in range(microbatches)]
    is_free, now, endings = [True] * stages, 0, []
    while True:
        for stage in range(stages):
            if is_free[stage] and waiting[stage]:
                virtual, microbatch = heapq.heappop(waiting[stage])
                heapq.heappush(endings, (now + durations[virtual], virtual, microbatch))
                is_free[stage] = False
        if not endings:
            return now
        now = endings[0][0]
        while endings and endings[0][0] == now:  # all that end at one time, before anything begins
            _, virtual, microbatch = heapq.heappop(endings)
            is_free[virtual % stages] = True
            if virtual + 1 < len(durations):
                heapq.heappush(waiting[(virtual + 1) % stages], (virtual + 1, microbatch))


def plain(row: dict) -> dict:
    """A row with its fractions as numbers; a difference of 0 is exact."""
    return {name: float(value) if isinstance(value, Fraction) else value for name, value in row.items()}


def table(rows: list[dict]) -> list[str]:
    """Lines to read, one a row."""
    lines = [f"{'p':>4}{'m':>5}{'v':>4}{'simulated':>12}{'formula':>12}{'difference':>12}"]
    for row in rows:
        layers = "  " + "-".join(map(str, row["stage_layers"])) if "stage_layers" in row else ""
        numbers = "".join(f"{float(row[name]):>12.6f}" for name in ("simulated", "formula", "difference"))
        lines.append(f"{row['stages']:>4}{row['microbatches']:>5}{row['virtual_stages']:>4}{numbers}{layers}")
    return lines


if __name__ == "__main__":
    main()
