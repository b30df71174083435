"""Budgets of compute that a sweep spent on models of different size: parabolas, their minima, and how these grow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gpt4moe.analysis.scaling.fitting import student_widening
from gpt4moe.analysis.sweeps.table import Axis, Point, Sweep, name_of

# Runs of one budget lie within this ratio of FLOPs; sizes of a budget span at least the other.
ONE_BUDGET, SPAN = 1.1, 1.5
LEAST_SIZES = 3
# Along an axis that sets neither size nor tokens both stay within this ratio.
SAME = 1.05
REPLICATES = 1000
CONFIDENCE = 0.95
# Of the replicates, those without a minimum: where they are more, nothing limits where it lies.
MOST_OPEN = 0.1


@dataclasses.dataclass(frozen=True)
class Scatter:
    """What a run's loss deviates by, on how many degrees of freedom that is known, and whether from seeds."""

    deviation: float
    freedom: int
    of_seeds: bool

    @property
    def widening(self) -> float:
        """How many times wider than a normal variable's an interval is that rests on so few degrees of freedom."""
        return student_widening(self.freedom, CONFIDENCE)


@dataclasses.dataclass(frozen=True)
class Budget:
    """Points of one budget, smallest model first, and the parabola of their loss over log N.

    flops: of a whole training, the mean. coefficients: highest power of ln N first. best: N at the minimum, its
    interval, loss and tokens there; not numbers where the parabola opens downwards, nor the interval where many
    resampled ones do. resampled: ln of best N [replicates]. inside: the minimum lies among the sizes. tokens_line: of
    ln tokens over ln N.
    """

    flops: float
    points: tuple[Point, ...]
    coefficients: np.ndarray
    best: float
    interval: tuple[float, float]
    loss: float
    tokens: float
    inside: bool
    resampled: np.ndarray
    tokens_line: np.ndarray


@dataclasses.dataclass(frozen=True)
class Power:
    """y = scale C^exponent, with the interval of the exponent."""

    scale: float
    exponent: float
    interval: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Family:
    """The budgets, least first, of one combination of what sets neither size nor tokens; its name, its powers.

    parameters, tokens: how the best size and the tokens there grow with the compute; None below two minima among the
    sizes. scatter: that of its runs.
    """

    name: str
    budgets: tuple[Budget, ...]
    parameters: Power | None
    tokens: Power | None
    scatter: Scatter


def families(sweep: Sweep) -> list[Family]:
    """The families of a sweep that have budgets: runs within a tenth of each other's FLOPs, of three sizes or more."""
    others = [axis for axis in sweep.axes if not _sets_budget(sweep, axis)]
    indices = [sweep.axes.index(axis) for axis in others]
    members: dict[tuple[int, ...], list[Point]] = {}
    for point in sorted(sweep.measured, key=lambda point: point.place):
        members.setdefault(tuple(point.place[at] for at in indices), []).append(point)
    found = [_family(sweep, name_of(others, place), points) for place, points in members.items()]
    return [family for family in found if family is not None]


def _sets_budget(sweep: Sweep, axis: Axis) -> bool:
    """Whether sizes or tokens change along an axis."""
    for line in sweep.lines(axis).values():
        for key in ("active_parameters", "tokens"):
            values = np.array([point.mean(key) for point in line])
            values = values[np.isfinite(values)]
            if len(values) and values.max() > SAME * values.min():
                return True
    return False


def _family(sweep: Sweep, name: str, points: Sequence[Point]) -> Family | None:
    spent = [(point.mean("train_flops_per_token") * point.mean("tokens"), point) for point in points]
    spent = sorted(((flops, point) for flops, point in spent if math.isfinite(flops)), key=lambda pair: pair[0])
    groups: list[list[tuple[float, Point]]] = []
    for flops, point in spent:
        if groups and flops <= ONE_BUDGET * groups[-1][0][0]:
            groups[-1].append((flops, point))
        else:
            groups.append([(flops, point)])
    groups = [group for group in groups if _has_sizes(group)]
    if not groups:
        return None
    scatter, draw = _scatter(sweep, groups), np.random.default_rng(0)  # one for all: budgets err apart from each other
    budgets = tuple(_budget(group, sweep, scatter, draw) for group in groups)
    return Family(name, budgets, power(budgets, scatter), power(budgets, scatter, of_tokens=True), scatter)


def _has_sizes(group: Sequence[tuple[float, Point]]) -> bool:
    sizes = [point.mean("active_parameters") for _, point in group]
    distinct = {f"{size:.3g}" for size in sizes}
    return len(distinct) >= LEAST_SIZES and max(sizes) >= SPAN * min(sizes)


def _scatter(sweep: Sweep, groups: Sequence[Sequence[tuple[float, Point]]]) -> Scatter:
    """From seed to seed, or without seeds by what the parabolas of all budgets leave."""
    if math.isfinite(sweep.pair_noise):
        return Scatter(sweep.pair_noise, sweep.pair_freedom, of_seeds=True)
    squares, freedom = 0.0, 0
    for group in groups:
        sizes, losses = _curve(sweep, [point for _, point in group])
        left = np.polyval(np.polyfit(sizes - sizes.mean(), losses, 2), sizes - sizes.mean()) - losses
        squares, freedom = squares + float((left**2).sum()), freedom + len(sizes) - 3
    return Scatter(math.sqrt(squares / freedom) if freedom else math.nan, freedom, of_seeds=False)


def _curve(sweep: Sweep, points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.log([point.mean("active_parameters") for point in points])
    return sizes, np.array([point.mean(sweep.metric) for point in points])


def _budget(group: Sequence[tuple[float, Point]], sweep: Sweep, scatter: Scatter, draw: np.random.Generator) -> Budget:
    points = sorted((point for _, point in group), key=lambda point: point.mean("active_parameters"))
    sizes, losses = _curve(sweep, points)
    centre = sizes.mean()
    coefficients = np.polyfit(sizes - centre, losses, 2)
    errors = scatter.deviation / np.sqrt([len(point.done) for point in points])
    noise = errors[:, None] * draw.standard_normal((len(sizes), REPLICATES))
    known = bool(np.isfinite(errors).all())
    resampled = _minimum(np.polyfit(sizes - centre, losses[:, None] + noise, 2)) if known else np.full(1, np.nan)
    least = float(_minimum(coefficients))
    tokens_line = np.polyfit(sizes, np.log([point.mean("tokens") for point in points]), 1)
    low, high = _interval(resampled, least, scatter)
    best = least + centre
    return Budget(
        flops=float(np.mean([flops for flops, _ in group])),
        points=tuple(points),
        coefficients=coefficients,
        best=float(np.exp(best)),
        interval=(float(np.exp(low + centre)), float(np.exp(high + centre))),
        loss=float(np.polyval(coefficients, least)),
        tokens=float(np.exp(np.polyval(tokens_line, best))),
        inside=bool(sizes[0] <= best <= sizes[-1]),
        resampled=resampled + centre,
        tokens_line=tokens_line,
    )


def _minimum(coefficients: np.ndarray) -> np.ndarray:
    """Where parabolas [3] or [3, n] are least, from the mean of ln N; not a number where they open downwards."""
    square, linear = coefficients[0], coefficients[1]
    return np.where(square > 0, -linear / (2 * np.where(square > 0, square, 1)), np.nan)


def _interval(resampled: np.ndarray, best: float, scatter: Scatter) -> tuple[float, float]:
    """Percentiles of the replicates, widened; not numbers where too many have no value."""
    sound = resampled[np.isfinite(resampled)]
    if len(sound) < (1 - MOST_OPEN) * len(resampled) or not math.isfinite(scatter.widening):
        return math.nan, math.nan
    ends = np.percentile(sound, [50 - 50 * CONFIDENCE, 50 + 50 * CONFIDENCE])
    low, high = best + scatter.widening * (ends - best)
    return float(low), float(high)


def power(budgets: Sequence[Budget], scatter: Scatter, *, of_tokens: bool = False) -> Power | None:
    """The power of the compute by which the best size, or the tokens there, grows.

    Of the budgets whose minimum lies among their sizes; None below two of them.
    """
    found = [budget for budget in budgets if budget.inside]
    if len(found) < 2:
        return None
    flops = np.log([budget.flops for budget in found])
    best = np.log([budget.tokens if of_tokens else budget.best for budget in found])
    exponent, offset = np.polyfit(flops, best, 1)
    drawn = np.stack([budget.resampled for budget in found])
    if of_tokens:
        lines = np.stack([budget.tokens_line for budget in found])
        drawn = lines[:, :1] * drawn + lines[:, 1:]
    sound = np.isfinite(drawn).all(0)
    slopes = np.full(drawn.shape[1], np.nan)
    if sound.any():
        slopes[sound] = np.polyfit(flops, drawn[:, sound], 1)[0]
    return Power(float(np.exp(offset)), float(exponent), _interval(slopes, float(exponent), scatter))
