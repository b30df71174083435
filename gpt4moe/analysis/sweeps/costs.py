"""Figures of what a loss costs: speed, memory, seconds, parameters, with the points that no other beats marked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gpt4moe.analysis.sweeps.drawing import Arm, Marks, Plot, arms_of, log_ticks
from gpt4moe.analysis.sweeps.final import point_row, said
from gpt4moe.analysis.sweeps.table import Point, Sweep, units

# Column to what its axis is called, and whether more of it is better.
COSTS = {
    "tokens_per_second": ("tokens/s (more is better)", True),
    "train_state_bytes": ("bytes of training state", False),
    "train_seconds": ("training seconds", False),
    "total_parameters": ("total parameters", False),
}


def cost_plots(sweep: Sweep) -> list[Plot]:
    """Loss against each cost that differs between points, in one figure."""
    keys = [key for key in COSTS if _differs(sweep, key)]
    if len(sweep.measured) < 2 or not keys or not sweep.axes:
        return []
    axis, num_rows = sweep.axes[0], -(-len(keys) // 2)
    arms = arms_of([axis.named(at) for at in range(len(axis))], ordered=axis.numeric)
    fronts = {key: front(sweep.measured, key, sweep.metric, more=COSTS[key][1]) for key in keys}

    def draw(drawn, marks: Marks) -> None:
        panels = drawn.subplots(num_rows, 2, squeeze=False, sharey=True).flat
        for panel, key in zip(panels, keys, strict=False):
            _panel(panel, sweep, key, fronts[key], arms, marks)
        for panel in panels[len(keys) :]:
            panel.set_visible(False)

    rows = [
        point_row(sweep, point, sweep.metric, *keys) | {f"front_{key}": point in fronts[key] for key in keys}
        for point in sweep.measured
    ]
    caption = (
        "Means over seeds. Rings joined by a line: the Pareto front, points that no other beats in both. "
        "Seconds and speed are those of the machine that ran the sweep."
    )
    return [Plot("costs", "What the loss costs", caption, rows, draw, arms, size=(9.0, 2.9 * num_rows), wide=True)]


def _differs(sweep: Sweep, key: str) -> bool:
    values = np.array([point.mean(key) for point in sweep.measured])
    values = values[np.isfinite(values)]
    return len(values) > 1 and values.max() > 1.01 * values.min()


def front(points: Sequence[Point], cost: str, loss: str, *, more: bool) -> list[Point]:
    """The points that no other beats in cost and loss, cheapest first; `more` of the cost is better, or less."""
    sign = -1 if more else 1
    known = [point for point in points if math.isfinite(point.mean(cost))]
    found, least = [], math.inf
    for point in sorted(known, key=lambda point: (sign * point.mean(cost), point.mean(loss))):
        if point.mean(loss) < least:
            found.append(point)
            least = point.mean(loss)
    return found


def _panel(axes, sweep: Sweep, key: str, on_front: list[Point], arms: Sequence[Arm], marks: Marks) -> None:
    for point in sweep.measured:
        arm, at, loss = point.place[0], point.mean(key), point.mean(sweep.metric)
        if not math.isfinite(at):
            continue
        if math.isfinite(error := point.error(sweep.metric)):
            axes.vlines([at], loss - error, loss + error, color=arms[arm].colour, linewidth=1, **marks.arm(arm))
        tip = f"{said(point, sweep.metric)}, {units(at)} {COSTS[key][0].split(' (')[0]}"
        axes.plot([at], [loss], "o", color=arms[arm].colour, **marks.arm(arm, tip))
    places = [point.mean(key) for point in on_front], [point.mean(sweep.metric) for point in on_front]
    axes.plot(*places, "-", color="#808080", linewidth=1, zorder=1)
    axes.plot(*places, "o", color="#808080", markersize=9, fillstyle="none", zorder=1)
    values = np.array([point.mean(key) for point in sweep.measured])
    if np.nanmax(values) > 3 * np.nanmin(values) > 0:
        log_ticks(axes.xaxis)
    else:
        axes.xaxis.get_major_locator().set_params(nbins=6)
        axes.xaxis.set_major_formatter(lambda value, _: units(value))
    axes.set_xlabel(COSTS[key][0])
    axes.set_ylabel(sweep.metric_label)
