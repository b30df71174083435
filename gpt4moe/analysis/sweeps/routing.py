"""Figures of what routing came to at every point, and of what each held-out source gained."""

from __future__ import annotations

import math

import numpy as np

from gpt4moe.analysis.sweeps.drawing import Marks, Plot, arms_of, place_ticks
from gpt4moe.analysis.sweeps.final import LONGEST, chosen_lines, draw_mean, point_row
from gpt4moe.analysis.sweeps.table import Point, Sweep

LOADS = {
    "load_max_over_mean": "busiest expert / mean",
    "dead_experts": "dead experts, share",
    "dropped_fraction": "dropped, share",
    "router_entropy": "router entropy, nats",
    "router_largest_logit": "largest logit, mean",
}
# More rows than these cannot be told apart in a heat map.
MOST_ROWS = 30
BY_LAYER = "load_max_over_mean_by_layer"


def load_plots(sweep: Sweep) -> list[Plot]:
    """Load, dead experts, drops and entropy against the first axis; none for dense sweeps."""
    keys = [key for key in LOADS if sweep.has(key)]
    if not keys or not sweep.axes or not sweep.measured:
        return []
    axis = sweep.axes[0]
    lines, arms, rest = chosen_lines(sweep, axis)
    drawn_keys = [key for key in keys if any(point.mean(key) != 0 for point in sweep.measured)]
    none = {"dead_experts": "no expert is dead", "dropped_fraction": "nothing is dropped"}
    absent = "".join(f"; {said}" for key, said in none.items() if key in keys and key not in drawn_keys)
    num_rows = -(-len(drawn_keys) // 2)

    def draw(drawn, marks: Marks) -> None:
        panels = drawn.subplots(num_rows, 2, squeeze=False).flat
        for panel, key in zip(panels, drawn_keys, strict=False):
            for number, (arm, points) in enumerate(zip(arms, lines.values(), strict=True)):
                at = [axis.at[point.place[0]] for point in points]
                if axis.numeric and len(set(at)) == len(at):
                    means = [point.mean(key) for point in points]
                    panel.plot(at, means, arm.dashes, color=arm.colour, linewidth=1.2, **marks.arm(number))
                for place, point in zip(at, points, strict=True):
                    draw_mean(panel, marks, number, arm.colour, place, point, key, seeds=False)
            place_ticks(panel, axis)
            panel.set_ylabel(LOADS[key])
            panel.set_ylim(bottom=min(panel.get_ylim()[0], 0) if key != "load_max_over_mean" else None)
        for panel in panels[len(drawn_keys) :]:
            panel.set_visible(False)

    caption = f"Of the last tenth of the steps, means over layers and seeds; bars: standard error{absent}.{rest}"
    rows = [point_row(sweep, point, *keys) for point in sweep.measured]
    return [Plot("load", "Load of the experts", caption, rows, draw, arms, size=(9.0, 2.7 * num_rows), wide=True)]


def layer_plots(sweep: Sweep) -> list[Plot]:
    """The load of each layer's busiest expert at every point, a heat map; none for one layer or without logs."""
    loads = [(point, _by_layer(point)) for point in sorted(sweep.measured, key=lambda point: point.place)]
    loads = [(point, load_L) for point, load_L in loads if load_L is not None and len(load_L) > 1]
    if not loads or len({len(load_L) for _, load_L in loads}) > 1:
        return []
    kept = np.unique(np.linspace(0, len(loads) - 1, min(len(loads), MOST_ROWS)).round().astype(int))
    labels = [(loads[at][0].label or "all runs")[:LONGEST] for at in kept]
    shown_PL = np.stack([loads[at][1] for at in kept])

    def draw(drawn, marks: Marks) -> None:
        axes = drawn.subplots()
        image = axes.imshow(shown_PL, "viridis", aspect="auto", vmin=1.0)
        axes.grid(visible=False)
        axes.set_yticks(range(len(labels)), labels)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        drawn.colorbar(image, ax=axes, pad=0.02, label=LOADS["load_max_over_mean"])

    rest = f" {len(kept)} of {len(loads)} points are shown; the CSV has all." if len(kept) < len(loads) else ""
    caption = f"Of the last tenth of the steps, means over seeds; 1 is an even load.{rest}"
    rows = [
        {"point": point.label, "layer": layer, "load_max_over_mean": load}
        for point, load_L in loads
        for layer, load in enumerate(load_L.tolist())
    ]
    size = (9.0, 1.2 + 0.26 * len(labels))
    return [Plot("load_by_layer", "Load of each layer", caption, rows, draw, size=size, wide=True)]


def _by_layer(point: Point) -> np.ndarray | None:
    """The busiest expert over the mean [L], mean over the seeds that have it."""
    rows_SL = [row[BY_LAYER] for row in point.done if row.get(BY_LAYER)]
    return np.mean(rows_SL, axis=0) if rows_SL else None


def source_plots(sweep: Sweep, trained: frozenset[str]) -> list[Plot]:
    """Each held-out source's loss less that at the first value of the first axis; none where there is one source.

    `trained`: the sources that were trained on, empty where nothing says.
    """
    keys = sorted({key for row in sweep.rows for key in row if key.startswith("eval/") and key.endswith("/loss")})
    if len(keys) < 2 or not sweep.axes or not sweep.measured:
        return []
    axis = sweep.axes[0]
    names = [key.split("/")[1] for key in keys]
    labels = [f"{name}, not trained on" if trained and name not in trained else name for name in names]
    arms = arms_of(labels)
    gains = {key: _gains(sweep, key) for key in keys}

    def draw(drawn, marks: Marks) -> None:
        axes = drawn.subplots()
        axes.axhline(0, color="#808080", linewidth=1)
        for number, (arm, key) in enumerate(zip(arms, keys, strict=True)):
            found = gains[key]
            at = [axis.at[place] for place in found]
            means, errors = [found[place][0] for place in found], [found[place][1] for place in found]
            if axis.numeric:
                axes.plot(at, means, arm.dashes, color=arm.colour, **marks.arm(number))
            for place, mean, error, value in zip(at, means, errors, found, strict=True):
                if math.isfinite(error):
                    axes.vlines([place], mean - error, mean + error, color=arm.colour, **marks.arm(number))
                tip = f"{arm.label}, {axis.title} {axis.labels[value]}: {mean:+.4f}"
                axes.plot([place], [mean], "o", color=arm.colour, **marks.arm(number, tip))
        place_ticks(axes, axis)
        axes.set_ylabel("nats above the first")

    caption = (
        f"Loss of each source less that at {axis.title} {axis.labels[0]}, run by run with the same seed and the same "
        "other settings; mean and standard error. A source that falls less than the others gains less."
    )
    rows = [
        {
            axis.names[0]: axis.value(at),
            "source": name,
            "difference": mean,
            "standard_error": error,
            "runs": count,
        }
        for name, key in zip(names, keys, strict=True)
        for at, (mean, error, count) in gains[key].items()
    ]
    return [Plot("sources", "What each source gains", caption, rows, draw, arms, wide=False)]


def _gains(sweep: Sweep, key: str) -> dict[int, tuple[float, float, int]]:
    """Place on the first axis to mean, standard error and number of the differences to the first place."""
    runs = {
        (point.place, row["seed"]): value
        for point in sweep.measured
        for row, value in zip(point.done, point.values(key), strict=True)
    }
    apart: dict[int, list[float]] = {}
    for (place, seed), value in sorted(runs.items()):
        first = runs.get(((0, *place[1:]), seed))
        if first is not None and math.isfinite(value - first):
            apart.setdefault(place[0], []).append(value - first)
    return {at: (float(np.mean(off)), _error(off), len(off)) for at, off in apart.items()}


def _error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
