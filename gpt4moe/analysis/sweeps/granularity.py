"""Finer experts: what each granularity gained, beside what the law of fine-grained experts gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gpt4moe.analysis.scaling import KRAJEWSKI
from gpt4moe.analysis.sweeps.drawing import Marks, Plot
from gpt4moe.analysis.sweeps.final import chosen_lines, differences, point_row
from gpt4moe.analysis.sweeps.table import Axis, Point, Sweep, number, short

LEAST_VALUES = 3


def granularity_plots(sweep: Sweep) -> list[Plot]:
    """Loss over granularity less that of the first; none without three values of it."""
    found = [(name, axis) for axis in sweep.axes for name in axis.names if short(name).lower() == "granularity"]
    if not found or not found[0][1].numeric or len(found[0][1]) < LEAST_VALUES or not sweep.measured:
        return []
    name, axis = found[0]
    lines, arms, rest = chosen_lines(sweep, axis)

    def draw(drawn, marks: Marks) -> None:
        axes = drawn.subplots()
        for index, (arm, points) in enumerate(zip(arms, lines.values(), strict=True)):
            at = [number(point.rows[0], name) for point in points]
            apart = differences(sweep, points, points[0])
            axes.plot(
                at, [off for off, _ in apart], "o-", color=arm.colour, linewidth=1.2, **marks.arm(index, arm.label)
            )
            for place, point, (off, _) in zip(at, points, apart, strict=True):
                if math.isfinite(error := point.error(sweep.metric)):
                    axes.vlines([place], off - error, off + error, color=arm.colour, **marks.arm(index))
            axes.plot(
                at,
                published(points, name, sweep.size_key),
                ":",
                color=arm.colour,
                **marks.arm(index, "Krajewski et al."),
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("granularity")
        axes.set_ylabel("nats above the first")

    caption = (
        "Mean loss less that of the first granularity; bars: standard error of the mean. Dotted: what Krajewski et al. "
        f"2024 give for the same change at as many {sweep.size_label} and tokens, far below those they fitted.{rest}"
    )
    rows = [row for points in lines.values() for row in _rows(sweep, axis, points, name)]
    return [Plot("granularity", "Finer experts", caption, rows, draw, arms)]


def published(points: Sequence[Point], name: str, size_key: str) -> np.ndarray:
    """Nats by which the published law puts each point above the first of the line, at the first's size and tokens."""
    grains = np.array([number(point.rows[0], name) for point in points])
    sizes = {"total_parameters": points[0].mean(size_key), "tokens": points[0].mean("tokens")}
    losses = KRAJEWSKI.loss(granularity=grains, **sizes)
    return losses - losses[0]


def _rows(sweep: Sweep, axis: Axis, points: Sequence[Point], name: str) -> list[dict]:
    apart, theirs = differences(sweep, points, points[0]), published(points, name, sweep.size_key)
    return [
        point_row(sweep, point, sweep.metric)
        | {"difference": off, "in_standard_errors": errors, "published": float(said)}
        for point, (off, errors), said in zip(points, apart, theirs, strict=True)
    ]
