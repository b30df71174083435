"""The surface of loss over parameters and sparsity: a sweep over both, its least squares, and where it is least."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import spatial

from gpt4moe.analysis.sweeps.drawing import Marks, Plot, log_ticks
from gpt4moe.analysis.sweeps.final import said
from gpt4moe.analysis.sweeps.table import Point, Sweep, units

LEAST_VALUES = 3
NUM_TERMS = 6
NUM_LEVELS = 12
GRID = 80
# Points within this ratio have one size: what a router weighs differs from one number of experts to the next.
ONE_SIZE = 1.1


@dataclasses.dataclass(frozen=True)
class Surface:
    """A polynomial of second degree in x = ln N and y = ln(1 - S).

    N: total parameters, without embeddings where the results say them. S: the share of experts left out.
    places [P, 2]: x and y of the points. coefficients [6]: of 1, x, y, xx, xy, yy, x and y counted from their means.
    rms: of what the polynomial leaves, nats.
    """

    points: Sequence[Point]
    places: np.ndarray
    coefficients: np.ndarray
    rms: float

    def loss(self, places: np.ndarray) -> np.ndarray:
        """Nats at places [..., 2]."""
        return _terms(places - self.places.mean(0)) @ self.coefficients


def sparsity_plots(sweep: Sweep) -> list[Plot]:
    """The surface; none without three sizes and three sparsities that change apart from each other."""
    surface = fit_surface(sweep)
    if surface is None:
        return []
    losses = np.array([point.mean(sweep.metric) for point in surface.points])
    least = min(surface.points, key=lambda point: point.mean(sweep.metric))

    def draw(drawn, marks: Marks) -> None:
        axes = drawn.subplots()
        parameters, left, heights = _inside(surface)
        levels = np.linspace(min(losses.min(), np.nanmin(heights)), max(losses.max(), np.nanmax(heights)), NUM_LEVELS)
        filled = axes.contourf(parameters, left, heights, levels, cmap="viridis_r", alpha=0.85)
        axes.contour(parameters, left, heights, levels, colors="#808080", linewidths=0.5)
        for (x, y), point in zip(np.exp(surface.places), surface.points, strict=True):
            colour = filled.cmap(filled.norm(point.mean(sweep.metric)))
            tip = said(point, sweep.metric)
            axes.plot([x], [y], "o", color=colour, markeredgecolor="#808080", **marks.arm(0, tip))
        log_ticks(axes.xaxis)
        shares = sorted({round(float(share), 6) for share in np.exp(surface.places[:, 1])})
        axes.set_yscale("log", base=2)
        axes.set_yticks(shares, [f"{1 - share:.3g}" for share in shares])
        axes.set_yticks([], minor=True)
        axes.invert_yaxis()
        axes.set_xlabel(sweep.size_label)
        axes.set_ylabel("sparsity, (E - K) / E")
        drawn.colorbar(filled, ax=axes, pad=0.02, format=lambda value, _: f"{value:.3f}", label=sweep.metric_label)

    caption = (
        f"Polynomial of second degree in the logarithms of {sweep.size_label} and of the share of experts met, through "
        f"the means of the points, as Abnar et al. 2025 have it; it leaves {surface.rms:.4f} nats. Nothing is drawn "
        f"outside of the runs. Least: {said(least, sweep.metric)}, {units(least.mean(sweep.size_key))} parameters."
    )
    rows = [
        {sweep.size_key: np.exp(x), "sparsity": 1 - np.exp(y), "loss": loss, "surface": height}
        for (x, y), loss, height in zip(surface.places, losses, surface.loss(surface.places), strict=True)
    ]
    facts = {"coefficients": surface.coefficients.tolist(), "centre": surface.places.mean(0).tolist()}
    return [
        Plot("sparsity", "Loss over parameters and sparsity", caption, rows, draw, facts=facts | {"rms": surface.rms})
    ]


def fit_surface(sweep: Sweep) -> Surface | None:
    """The surface through the means of the points; None where these do not tell all six terms apart."""
    found = [(point, point.mean(sweep.size_key), 1 - point.mean("sparsity")) for point in sweep.measured]
    found = [row for row in found if np.isfinite(row[1:]).all() and row[2] > 0]
    if not found:
        return None
    points = [point for point, _, _ in found]
    places = np.log([row[1:] for row in found])
    terms = _terms(places - places.mean(0))
    enough = min(_num_values(places[:, 0]), _num_values(places[:, 1])) >= LEAST_VALUES
    if not enough or len(points) <= NUM_TERMS or np.linalg.matrix_rank(terms, tol=1e-3) < NUM_TERMS:
        return None
    losses = np.array([point.mean(sweep.metric) for point in points])
    coefficients = np.linalg.lstsq(terms, losses, rcond=None)[0]
    return Surface(points, places, coefficients, float(np.sqrt(np.mean((terms @ coefficients - losses) ** 2))))


def _terms(places: np.ndarray) -> np.ndarray:
    x, y = places[..., 0], places[..., 1]
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)


def _num_values(logs: np.ndarray) -> int:
    """How many values differ by more than `ONE_SIZE`."""
    return 1 + int(np.sum(np.diff(np.sort(logs)) > np.log(ONE_SIZE)))


def _inside(surface: Surface) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, shares and heights [GRID, GRID] of the surface, not a number outside of the points' convex hull."""
    low, high = surface.places.min(0), surface.places.max(0)
    x, y = np.meshgrid(*(np.linspace(*ends, GRID) for ends in zip(low, high, strict=True)))
    places = np.stack([x, y], axis=-1)
    outside = spatial.Delaunay(surface.places).find_simplex(places) < 0
    return np.exp(x), np.exp(y), np.where(outside, np.nan, surface.loss(places))
