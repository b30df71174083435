"""Figures of the final loss against what was swept: lines over numbers, ranked dots for names, maps of two axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from gpt4moe.analysis.sweeps.drawing import MAX_ARMS, Arm, Marks, Plot, arms_at, arms_of, place_ticks
from gpt4moe.analysis.sweeps.table import Axis, Point, Sweep, units

MAPPED = {"tokens_per_second": "tokens/s", "train_state_bytes": "bytes of training state"}
LEAST_ON_MAP = 3
# A map of more cells than these has no numbers in it.
MAX_NUMBERS = 80
MAX_BANDS = 4
# Letters of a name that leave no room for its figure on half the page, and those shown on a whole one.
LONG, LONGEST = 24, 64


def final_plots(sweep: Sweep) -> list[Plot]:
    """The final loss against every axis, and maps of the pairs of numeric axes."""
    plots = [_over_numbers(sweep, axis) if axis.numeric else _ranked(sweep, axis) for axis in sweep.axes]
    numeric = [axis for axis in sweep.axes if axis.numeric and len(axis) >= LEAST_ON_MAP]
    plots += [_map(sweep, across, up) for across, up in itertools.combinations(numeric, 2)]
    return [plot for plot in plots if plot is not None]


def chosen_lines(sweep: Sweep, axis: Axis) -> tuple[dict[str, list[Point]], list[Arm], str]:
    """The lines along an axis that a figure has room for, their arms, and what a caption says of the rest.

    Where no line has two points, as with random draws, all points are one.
    """
    lines, others = sweep.lines(axis), [other for other in sweep.axes if other is not axis]
    if lines and max(map(len, lines.values())) < 2:
        points = sorted(sweep.measured, key=lambda point: point.place[sweep.axes.index(axis)])
        return {"": points}, arms_of([""]), " Points that differ in other settings too."
    names = list(lines)
    kept = [
        names[at] for at in np.unique(np.linspace(0, len(names) - 1, min(len(names), MAX_ARMS)).round().astype(int))
    ]
    rest = f" {len(kept)} of {len(names)} lines are shown; the CSV has all." if len(kept) < len(names) else ""
    index = sweep.axes.index(axis)
    places = [lines[name][0].place for name in kept]
    arms = arms_at(others, [(*place[:index], *place[index + 1 :]) for place in places], kept)
    return {name: lines[name] for name in kept}, arms, rest


def said(point: Point, key: str, form: str = ".4f") -> str:
    """A point in words: what it is, its mean and standard error, and of how many seeds."""
    error = point.error(key)
    spread = f" ± {error:{form}}" if math.isfinite(error) else ""
    seeds = f"{len(point.done)} seed{'s' if len(point.done) > 1 else ''}"
    return f"{point.label or 'all runs'}: {point.mean(key):{form}}{spread} ({seeds})"


def point_row(sweep: Sweep, point: Point, *keys: str) -> dict:
    """A row of a CSV: the swept values of a point, and of columns mean, standard error and how many seeds."""
    row = {name: point.rows[0].get(name) for axis in sweep.axes for name in axis.names}
    for key in keys:
        row |= {key: point.mean(key), f"{key}_standard_error": point.error(key)}
    return row | {"seeds": len(point.done)}


def draw_mean(axes, marks: Marks, arm: int, colour: str, at: float, point: Point, key: str, *, seeds: bool) -> None:
    """A dot at the mean with its standard error, and faint ones at the seeds."""
    mean, error = point.mean(key), point.error(key)
    if seeds and len(point.done) > 1:
        for row, value in zip(point.done, point.values(key), strict=True):
            tip = f"{point.label}, seed {row['seed']}: {value:.4f}"
            axes.plot([at], [value], ".", color=colour, alpha=0.4, markersize=4, **marks.arm(arm, tip))
    if math.isfinite(error):
        axes.vlines([at], mean - error, mean + error, color=colour, **marks.arm(arm))
    axes.plot([at], [mean], "o", color=colour, **marks.arm(arm, said(point, key)))


def _over_numbers(sweep: Sweep, axis: Axis) -> Plot | None:
    lines, arms, rest = chosen_lines(sweep, axis)
    index, key = sweep.axes.index(axis), sweep.metric
    if not lines:
        return None

    def draw(drawn, marks: Marks) -> None:
        axes = drawn.subplots()
        for number, (arm, points) in enumerate(zip(arms, lines.values(), strict=True)):
            places = [axis.at[point.place[index]] for point in points]
            if len(set(places)) == len(places):
                means = [point.mean(key) for point in points]
                axes.plot(places, means, arm.dashes, color=arm.colour, linewidth=1.2, **marks.arm(number))
            for at, point in zip(places, points, strict=True):
                draw_mean(axes, marks, number, arm.colour, at, point, key, seeds=True)
        place_ticks(axes, axis)
        axes.set_ylabel(sweep.metric_label)

    caption = f"Large dots: mean over seeds, bar: its standard error; small dots: single seeds.{rest}"
    rows = [point_row(sweep, point, key) for points in sweep.lines(axis).values() for point in points]
    return Plot(f"loss_by_{axis.title}", f"Final loss by {axis.title}", caption, rows, draw, arms)


def _ranked(sweep: Sweep, axis: Axis) -> Plot | None:
    """Values that are names, best first, with the noise between seeds as a band below the best."""
    lines, arms, rest = chosen_lines(sweep, axis)
    index, key = sweep.axes.index(axis), sweep.metric
    by_value: dict[int, list[Point]] = {}
    for point in sweep.measured:
        by_value.setdefault(point.place[index], []).append(point)
    if not by_value:
        return None
    level = {at: float(np.mean([point.mean(key) for point in points])) for at, points in by_value.items()}
    order = sorted(level, key=level.get)
    noise = sweep.noise

    def draw(drawn, marks: Marks) -> None:
        axes = drawn.subplots()
        for number, (arm, points) in enumerate(zip(arms, lines.values(), strict=True)):
            for point in points:
                _lay(axes, marks, number, arm.colour, order.index(point.place[index]), point, key)
        for number, (arm, points) in enumerate(zip(arms, lines.values(), strict=True)):
            if math.isfinite(noise) and len(arms) <= MAX_BANDS:
                best = min(point.mean(key) for point in points)
                band = {"color": arm.colour, "alpha": 0.12, "linewidth": 0}
                axes.axvspan(best - noise, best + noise, **band, **marks.arm(number))
        axes.set_yticks(range(len(order)), [axis.labels[at][:LONGEST] for at in order])
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.set_xlabel(sweep.metric_label)

    floor = f" One seed deviates by {noise:.4f}" if math.isfinite(noise) else ""
    floor += (": the band at each line's best." if len(arms) <= MAX_BANDS else ".") if floor else ""
    caption = f"Best first. Large dots: mean over seeds with its standard error; small dots: seeds.{floor}{rest}"
    rows = [point_row(sweep, point, key) for at in order for point in by_value[at]]
    wide = max(map(len, axis.labels)) > LONG
    size, title = (9.0 if wide else 5.4, 1.2 + 0.3 * len(order)), f"Final loss by {axis.title}"
    return Plot(f"loss_by_{axis.title}", title, caption, rows, draw, arms, size, wide, {"noise": noise})


def _lay(axes, marks: Marks, arm: int, colour: str, row: int, point: Point, key: str) -> None:
    mean, error = point.mean(key), point.error(key)
    if len(point.done) > 1:
        for run, value in zip(point.done, point.values(key), strict=True):
            tip = f"{point.label}, seed {run['seed']}: {value:.4f}"
            axes.plot([value], [row], ".", color=colour, alpha=0.4, markersize=4, **marks.arm(arm, tip))
    if math.isfinite(error):
        axes.hlines([row], mean - error, mean + error, color=colour, **marks.arm(arm))
    axes.plot([mean], [row], "o", color=colour, **marks.arm(arm, said(point, key)))


def _map(sweep: Sweep, across: Axis, up: Axis) -> Plot | None:
    """Maps over two numeric axes: mean loss, and what it costs where that differs."""
    keys = [sweep.metric, *(key for key in MAPPED if sweep.has(key))]
    maps = {key: _mean_map(sweep, across, up, key) for key in keys}
    shown = [key for key in keys if key == sweep.metric or np.nanmax(maps[key]) > 1.02 * np.nanmin(maps[key])]
    if np.isfinite(maps[sweep.metric]).sum() < LEAST_ON_MAP:
        return None

    def draw(drawn, marks: Marks) -> None:
        for axes, key in zip(drawn.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
            colours = "viridis_r" if key == sweep.metric else "cividis"
            image = axes.imshow(maps[key], colours, aspect="auto", origin="lower")
            axes.grid(visible=False)
            axes.set_xticks(range(len(across)), across.labels)
            axes.set_yticks(range(len(up)), up.labels)
            axes.set_xlabel(across.title)
            axes.set_ylabel(up.title)
            axes.set_title(MAPPED.get(key, sweep.metric_label), fontsize=9)
            _write_numbers(axes, image, maps[key], marks)
            drawn.colorbar(image, ax=axes, pad=0.02, format=lambda value, _: units(value, ".3f"))

    places = itertools.product(range(len(up)), range(len(across)))
    rows = [
        {across.names[0]: across.at[x], up.names[0]: up.at[y]} | {key: float(maps[key][y, x]) for key in keys}
        for y, x in places
    ]
    others = [axis.title for axis in sweep.axes if axis not in (across, up)]
    mean = f"seeds and {', '.join(others)}" if others else "seeds"
    caption = f"Means over {mean}. Blank: no run is done there."
    name = f"map_{across.title}_{up.title}"
    title = f"{across.title} and {up.title}"
    wide = len(shown) > 1
    return Plot(name, title, caption, rows, draw, size=(9.0, 3.0) if wide else (5.4, 3.4), wide=wide)


def _mean_map(sweep: Sweep, across: Axis, up: Axis, key: str) -> np.ndarray:
    x, y = sweep.axes.index(across), sweep.axes.index(up)
    held: dict[tuple[int, int], list[float]] = {}
    for point in sweep.measured:
        held.setdefault((point.place[y], point.place[x]), []).append(point.mean(key))
    found = np.full((len(up), len(across)), np.nan)
    for place, values in held.items():
        found[place] = np.mean(values)
    return found


def _write_numbers(axes, image, values: np.ndarray, marks: Marks) -> None:
    if values.size > MAX_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "#111111" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "#ffffff"
            axes.text(column, row, units(value, ".3f"), ha="center", va="center", fontsize=7, color=ink)


def differences(sweep: Sweep, points: Sequence[Point], first: Point) -> list[tuple[float, float]]:
    """Of each point: its loss less that of `first`, seed by seed, and how many standard errors of it that is.

    The error is pooled over the sweep: three seeds of one point alone hardly tell it. Points without a seed in common
    are compared by their means.
    """
    pair_noise, noise = sweep.pair_noise, sweep.noise
    theirs = _by_seed(sweep, first)
    found = []
    for point in points:
        own = _by_seed(sweep, point)
        common = own.keys() & theirs.keys()
        if common:
            off = float(np.mean([own[seed] - theirs[seed] for seed in common]))
            error = pair_noise * math.sqrt(2 / len(common))
        else:
            off = point.mean(sweep.metric) - first.mean(sweep.metric)
            error = noise * math.sqrt(1 / max(len(own), 1) + 1 / max(len(theirs), 1))
        found.append((off, off / error if error > 0 else math.nan))
    return found


def _by_seed(sweep: Sweep, point: Point) -> dict[int, float]:
    return {row["seed"]: value for row, value in zip(point.done, point.values(sweep.metric), strict=True)}
