"""What figures of runs are drawn with: numpy in, lines, heat maps and their colours out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gpt4moe.analysis.history import Series
from gpt4moe.drawing.figure import PALETTE, figure, svg

# First layer to last: hues that stand out on a light page and on a dark one.
DEPTH = ("#2563eb", "#a855f7", "#ec4899", "#f97316")
MAX_POINTS = 600
MAX_LAYERS = 12
SMOOTHED_OVER = 0.03


@dataclasses.dataclass(frozen=True)
class Scale:
    """The colours of a heat map between `low` and `high`, what its colour bar says at `ticks`, and of what."""

    colours: str
    low: float
    high: float
    ticks: tuple[float, ...]
    tick_labels: tuple[str, ...]
    label: str


def relative_scale(label: str) -> Scale:
    """Of log2 of ratios: grey is 1, red more, blue less, both ends at a factor of 4."""
    return Scale("coolwarm", -2, 2, (-2, -1, 0, 1, 2), ("≤ ¼", "½", "1", "2", "≥ 4"), label)


def log_ratio(ratios: np.ndarray) -> np.ndarray:
    """What `relative_scale` colours: log2 of ratios, cut at both ends; not a number stays so."""
    return np.log2(np.clip(ratios, 1 / 4, 4))


def shown_layers(num_layers: int) -> list[int]:
    """Which layers a figure shows: all, or so many evenly spread ones."""
    return np.unique(np.linspace(0, num_layers - 1, min(num_layers, MAX_LAYERS)).round().astype(int)).tolist()


def of_layers(num_layers: int) -> str:
    """What a caption says where not all layers are shown."""
    return "" if num_layers <= MAX_LAYERS else f" {MAX_LAYERS} of {num_layers} layers are shown."


def heat_maps(
    name: str,
    maps_LYX: np.ndarray,
    scale: Scale,
    *,
    labels: tuple[str, str],
    height: float,
    columns: int = 4,
    across: tuple[float, float] | None = None,
    row_names: Sequence[str] = (),
) -> str:
    """SVG of one heat map a layer under one colour bar; what is not a number stays blank.

    `labels` of x and y; `height` of a panel in inches; `across`: the x of the left and right edge (None: columns are
    numbered from 0); `row_names` stand for the numbers of the rows.
    """
    layers = shown_layers(len(maps_LYX))
    columns = min(len(layers), columns)
    grid = (-(-len(layers) // columns), columns)
    rows, width = maps_LYX.shape[1:]
    extent = (*(across or (-0.5, width - 0.5)), rows - 0.5, -0.5)
    style = {"aspect": "auto", "vmin": scale.low, "vmax": scale.high, "extent": extent, "interpolation": "nearest"}
    with figure(name, (9.0, height * grid[0] + 0.7)) as drawn:
        panels = drawn.subplots(*grid, sharex=True, sharey=True, squeeze=False)
        for panel in panels.flat[len(layers) :]:
            panel.set_visible(False)
        for panel, layer in zip(panels.flat, layers, strict=False):
            image = panel.imshow(maps_LYX[layer], scale.colours, **style)
            panel.set_title(f"layer {layer}", fontsize=9)
            panel.grid(visible=False)
            if across is None:
                panel.xaxis.get_major_locator().set_params(integer=True)
            if row_names:
                panel.set_yticks(range(rows), row_names, fontsize=8)
            else:
                panel.yaxis.get_major_locator().set_params(integer=True)
        drawn.supxlabel(labels[0], fontsize=9)
        drawn.supylabel(labels[1], fontsize=9)
        bar = drawn.colorbar(image, ax=panels, ticks=scale.ticks, pad=0.01, aspect=30, label=scale.label)
        bar.ax.set_yticklabels(scale.tick_labels)
        return svg(drawn)


def lines(draw: Callable, name: str, size: tuple[float, float] = (5.4, 3.0)) -> str:
    """SVG of one pair of axes over million tokens, filled by `draw(axes)`, which plots over plain tokens."""
    with figure(name, size) as drawn:
        axes = drawn.subplots()
        draw(axes)
        axes.set_xlabel("million tokens")
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g}")
        axes.spines[["top", "right"]].set_visible(False)
        return svg(drawn)


def trace(axes, tokens: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    """The values as a faint line and their running mean as a strong one."""
    axes.plot(tokens, values, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(tokens, smooth(values), color=colour, label=label)


def legend(axes, columns: int) -> None:
    """The legend above the axes, where it hides no line."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=8, frameon=False, borderaxespad=0.2)


def colours() -> Iterator[str]:
    """Colours for lines without an order, for ever."""
    return itertools.cycle(PALETTE)


def depth_colours(count: int) -> list[str]:
    """Colours for the lines of `count` layers, first to last."""
    from matplotlib import colors

    along = colors.LinearSegmentedColormap.from_list("depth", DEPTH)
    return [colors.to_hex(along(place)) for place in np.linspace(0, 1, count)]


def thin(series: Series, max_points: int = MAX_POINTS) -> Series:
    """At most `max_points` points of `series`, each the mean of the neighbours it stands for."""
    count = len(series.tokens)
    if count <= max_points:
        return series
    starts = np.unique(np.linspace(0, count, max_points, endpoint=False).astype(int))
    sizes = np.diff(np.append(starts, count)).reshape(-1, *[1] * (series.values.ndim - 1))
    return Series(np.maximum.reduceat(series.tokens, starts), np.add.reduceat(series.values, starts, axis=0) / sizes)


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean [n] over a centred window of 3 % of the points; what is not a number leaves its window's mean."""
    reach = max(int(len(values) * SMOOTHED_OVER / 2), 1)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(values))
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    held = counts[high] - counts[low]
    return np.where(held > 0, (sums[high] - sums[low]) / np.maximum(held, 1), np.nan)
