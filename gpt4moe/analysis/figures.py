"""The figures of a run's report: a `History` in, inline SVG out.

Text and axes are drawn in the page's own colour (`currentColor`) and fonts, so that one figure serves the light and
the dark page.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Callable, Iterator

import numpy as np

from gpt4moe.analysis.history import History, Series

PALETTE = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#06b6d4", "#ca8a04", "#ec4899")
# Stands for the page's text colour until the SVG is written; no figure uses it otherwise.
INK = "#010203"
MAX_POINTS = 600
MAX_LAYERS = 12
SMOOTHED_OVER = 0.03


@dataclasses.dataclass(frozen=True)
class Chart:
    """One figure: its title, a sentence on how to read it, its SVG, whether it takes the page's width."""

    title: str
    caption: str
    svg: str
    wide: bool = False


def run_figures(history: History, evaluation: dict | None) -> list[Chart]:
    """All figures for which the run has logged something; `evaluation` is what `evaluation.json` holds."""
    figures = [_loss(history, evaluation or {}), _load_maps(history), _balance(history), _routing(history)]
    figures += [_throughput(history), _utilization(history), _learning_rate(history), _grad_norm(history)]
    return [figure for figure in figures if figure is not None]


def _loss(history: History, evaluation: dict) -> Chart | None:
    sources = history.names(r"loss/(.+)")
    if not sources:
        return None

    def draw(axes) -> None:
        for source, colour in zip(sources, _colours(), strict=False):
            series = thin(history.series(f"loss/{source}"))
            _trace(axes, series.tokens, series.values, colour, f"{source}, training")
            held_out = history.series(f"eval/{source}/loss")
            if len(held_out.tokens):
                axes.plot(held_out.tokens, held_out.values, "o", color=colour, label=f"{source}, held out")
            unigram = evaluation.get("sets", {}).get(source, {}).get("unigram_loss")
            if unigram is not None:
                axes.axhline(unigram, color=colour, linestyle=":", linewidth=1.2, label=f"{source}, unigram")
        axes.set_ylabel("nats per token")
        _legend(axes, columns=len(sources) if 1 < len(sources) < 5 else 3)

    caption = "Cross-entropy of each source. Points: held-out text. Dotted: what token frequencies alone reach."
    return Chart("Loss", caption, _draw(draw, "loss", (9.0, 3.6)), wide=True)


def _load_maps(history: History) -> Chart | None:
    """Heat maps [expert x tokens] of load over the mean load, one a layer."""
    load = thin(history.series("moe/load"), 200)
    if load.values.ndim != 3:
        return None
    num_layers, num_experts = load.values.shape[1:]
    layers = np.unique(np.linspace(0, num_layers - 1, min(num_layers, MAX_LAYERS)).round().astype(int))
    relative = np.log2(np.clip(load.values * num_experts, 1 / 4, 4))
    columns = min(len(layers), 4)
    grid = (-(-len(layers) // columns), columns)
    with _figure("load", (9.0, 1.5 * grid[0] + 0.7)) as figure:
        panels = figure.subplots(*grid, sharex=True, sharey=True, squeeze=False)
        extent = (0, load.tokens[-1] / 1e6, num_experts - 0.5, -0.5)
        for panel in panels.flat[len(layers) :]:
            panel.set_visible(False)
        for panel, layer in zip(panels.flat, layers, strict=False):
            image = panel.imshow(
                relative[:, layer].T, "coolwarm", aspect="auto", vmin=-2, vmax=2, extent=extent, interpolation="nearest"
            )
            panel.set_title(f"layer {layer}", fontsize=9)
            panel.grid(visible=False)
        figure.supxlabel("million tokens", fontsize=9)
        figure.supylabel("expert", fontsize=9)
        bar = figure.colorbar(image, ax=panels, ticks=[-2, -1, 0, 1, 2], pad=0.01, aspect=30)
        bar.ax.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"])
        svg = _svg(figure)
    shown = "" if len(layers) == num_layers else f" {len(layers)} of {num_layers} layers are shown."
    caption = f"Assignments to each expert over the layer's mean. Grey is balanced, red overloaded, blue idle.{shown}"
    return Chart("Expert load", caption, svg, wide=True)


def _balance(history: History) -> Chart | None:
    load = thin(history.series("moe/load"))
    if load.values.ndim != 3:
        return None
    relative = load.values * load.values.shape[-1]

    def draw(axes) -> None:
        _trace(axes, load.tokens, relative.max((1, 2)), PALETTE[4], "busiest expert of any layer")
        _trace(axes, load.tokens, relative.max(2).mean(1), PALETTE[1], "busiest, mean of layers")
        _trace(axes, load.tokens, relative.min(2).mean(1), PALETTE[5], "idlest, mean of layers")
        _trace(axes, load.tokens, relative.min((1, 2)), PALETTE[0], "idlest expert of any layer")
        axes.set_ylabel("load / mean load")
        axes.set_ylim(bottom=0)
        _legend(axes, columns=2)

    return Chart("Load balance", "1 is a perfectly even spread over the experts.", _draw(draw, "balance"))


def _routing(history: History) -> Chart | None:
    labels = {
        "load_balance_loss": "balance loss (1 is uniform)",
        "router_z_loss": "router z-loss",
        "moe/router_entropy": "router entropy (nats)",
        "moe/dropped_fraction": "dropped fraction",
    }
    return _lines(history, labels, "Routing", "Means over layers, without the weights they enter the loss with.")


def _throughput(history: History) -> Chart | None:
    return _lines(history, {"tokens_per_second": "tokens/s"}, "Throughput", "Training tokens per second of wall clock.")


def _utilization(history: History) -> Chart | None:
    labels = {"model_flops_utilization": "model FLOPs utilisation", "goodput": "goodput"}
    caption = "Matrix-product FLOPs of the model over the peak; goodput is the share of time spent in steps."
    return _lines(history, labels, "Utilisation", caption)


def _learning_rate(history: History) -> Chart | None:
    return _lines(history, {"learning_rate": "learning rate"}, "Learning rate", "What the schedule gave each step.")


def _grad_norm(history: History) -> Chart | None:
    return _lines(history, {"grad_norm": "gradient norm"}, "Gradient norm", "Global norm before clipping.")


def _lines(history: History, labels: dict[str, str], title: str, caption: str) -> Chart | None:
    """One figure of the metrics in `labels` that were logged, averaged over everything but time."""
    logged = {label: thin(history.series(key)) for key, label in labels.items()}
    logged = {label: series for label, series in logged.items() if len(series.tokens)}
    if not logged:
        return None

    def draw(axes) -> None:
        for (label, series), colour in zip(logged.items(), _colours(), strict=False):
            _trace(axes, series.tokens, series.values.reshape(len(series.tokens), -1).mean(1), colour, label)
        axes.set_ylim(bottom=0)
        if len(logged) > 1:
            _legend(axes, columns=2)
        else:
            axes.set_ylabel(next(iter(logged)))

    return Chart(title, caption, _draw(draw, title))


def _trace(axes, tokens: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    """The values as a faint line and their running mean as a strong one."""
    axes.plot(tokens, values, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(tokens, smooth(values), color=colour, label=label)


def _legend(axes, columns: int) -> None:
    """The legend above the axes, where it hides no line."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=8, frameon=False, borderaxespad=0.2)


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


def _draw(draw: Callable, name: str, size: tuple[float, float] = (5.4, 3.0)) -> str:
    """SVG of one pair of axes over million tokens, filled by `draw(axes)`, which plots over plain tokens."""
    with _figure(name, size) as figure:
        axes = figure.subplots()
        draw(axes)
        axes.set_xlabel("million tokens")
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g}")
        axes.spines[["top", "right"]].set_visible(False)
        return _svg(figure)


@contextlib.contextmanager
def _figure(name: str, size: tuple[float, float]) -> Iterator:
    """An empty figure under the report's style. Not through pyplot, whose backend and figures are the notebook's."""
    import matplotlib.figure  # here, for it takes longer to load than the rest of the command

    style = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    style |= {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9}
    style |= {"axes.grid": True, "grid.color": "#808080", "grid.alpha": 0.25, "grid.linewidth": 0.6}
    style |= {"lines.linewidth": 1.5, "lines.markersize": 4.5}
    style |= {"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"}
    with matplotlib.rc_context(style):
        yield matplotlib.figure.Figure(figsize=size, layout="constrained")


def _svg(figure) -> str:
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    svg = written.getvalue()[written.getvalue().index("<svg") :].replace(INK, "currentColor")
    # The page sets the font and the size; the viewBox keeps the proportions.
    svg = re.sub(r"font-family: [^;]*; ?", "", svg)
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)


def _colours() -> Iterator[str]:
    return itertools.cycle(PALETTE)
