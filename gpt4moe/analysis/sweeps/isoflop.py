"""Budgets of compute that a sweep spent on models of different size: parabolas, their minima, what is optimal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gpt4moe.analysis.scaling import EPOCH, HOFFMANN
from gpt4moe.analysis.sweeps.drawing import Marks, Plot, arms_of, log_ticks
from gpt4moe.analysis.sweeps.final import draw_mean
from gpt4moe.analysis.sweeps.table import Point, Sweep, units

# Runs of one budget lie within this ratio of FLOPs; sizes of a budget span at least the other.
ONE_BUDGET, SPAN = 1.1, 1.5
LEAST_SIZES = 3
REPLICATES = 1000
INTERVAL = (2.5, 97.5)
DASHES = {"Hoffmann et al.": (HOFFMANN, ":"), "Epoch": (EPOCH, "-.")}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Points of one budget, smallest model first, and the parabola of their loss over log N.

    flops: of a whole training, the mean. coefficients: highest power of ln N first. best: N at the minimum, its
    interval, loss and tokens there; not numbers where the parabola opens downwards. resampled: ln of best N
    [replicates] under the noise of the means. inside: the minimum lies among the sizes.
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


def isoflop_plots(sweep: Sweep) -> list[Plot]:
    """Parabolas and optima of the budgets of a sweep; none where it has no budget with three sizes."""
    found = budgets(sweep)
    if not found:
        return []
    arms = arms_of([f"{budget.flops:.3g} FLOPs" for budget in found], ordered=True)
    parameters, tokens = power(found), power(found, of_tokens=True)

    def draw(drawn, marks: Marks) -> None:
        left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
        for index, (arm, budget) in enumerate(zip(arms, found, strict=True)):
            _draw_budget(left, sweep, budget, arm.colour, marks, index)
        log_ticks(left.xaxis)
        left.set_xlabel("active parameters")
        left.set_ylabel(sweep.metric_label)
        _draw_optima(right, found, parameters, tokens)

    rows = [row for budget in found for row in _rows(budget, sweep)]
    facts = {
        "budgets": [_facts(budget) for budget in found],
        "parameters": dataclasses.asdict(parameters) if parameters else None,
        "tokens": dataclasses.asdict(tokens) if tokens else None,
    }
    caption = (
        "Left: each budget's loss over the size of the model, its parabola, and a star at the minimum. Right: sizes "
        f"and tokens at the minima. {_said(found, parameters, tokens)} Dotted, dash-dotted: Hoffmann et al. 2022 and "
        "Epoch's replication of it, carried on from runs of 70M parameters and more."
    )
    return [Plot("isoflop", "Best size of each budget", caption, rows, draw, arms, (9.0, 3.8), wide=True, facts=facts)]


def budgets(sweep: Sweep) -> list[Budget]:
    """The budgets of a sweep, least first: runs within a tenth of each other's FLOPs, of three sizes or more."""
    spent = [(point.mean("train_flops_per_token") * point.mean("tokens"), point) for point in sweep.measured]
    spent = sorted(((flops, point) for flops, point in spent if math.isfinite(flops)), key=lambda pair: pair[0])
    groups: list[list[tuple[float, Point]]] = []
    for flops, point in spent:
        if groups and flops <= ONE_BUDGET * groups[-1][0][0]:
            groups[-1].append((flops, point))
        else:
            groups.append([(flops, point)])
    return [_budget(group, sweep) for group in groups if _has_sizes(group)]


def power(found: Sequence[Budget], *, of_tokens: bool = False) -> Power | None:
    """The power of the compute by which the best size, or the tokens there, grows; None below two minima."""
    found = [budget for budget in found if math.isfinite(budget.best)]
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
    slopes = np.polyfit(flops, drawn[:, sound], 1)[0] if sound.any() else np.array([np.nan])
    return Power(float(np.exp(offset)), float(exponent), tuple(np.percentile(slopes, INTERVAL).tolist()))


def _has_sizes(group: Sequence[tuple[float, Point]]) -> bool:
    sizes = [point.mean("active_parameters") for _, point in group]
    distinct = {f"{size:.3g}" for size in sizes}
    return len(distinct) >= LEAST_SIZES and max(sizes) >= SPAN * min(sizes)


def _budget(group: Sequence[tuple[float, Point]], sweep: Sweep) -> Budget:
    points = sorted((point for _, point in group), key=lambda point: point.mean("active_parameters"))
    sizes = np.log([point.mean("active_parameters") for point in points])
    losses = np.array([point.mean(sweep.metric) for point in points])
    coefficients = np.polyfit(sizes - sizes.mean(), losses, 2)
    resampled = _resample(sizes - sizes.mean(), losses, coefficients, points, sweep) + sizes.mean()
    best = _minimum(coefficients) + sizes.mean()
    tokens_line = np.polyfit(sizes, np.log([point.mean("tokens") for point in points]), 1)
    sound = resampled[np.isfinite(resampled)]
    ends = tuple(np.exp(np.percentile(sound, INTERVAL)).tolist()) if len(sound) else (math.nan, math.nan)
    loss = float(np.polyval(coefficients, best - sizes.mean()))
    return Budget(
        float(np.mean([flops for flops, _ in group])), tuple(points), coefficients, float(np.exp(best)), ends, loss,
        float(np.exp(np.polyval(tokens_line, best))), bool(sizes[0] <= best <= sizes[-1]), resampled, tokens_line,
    )  # fmt: skip


def _minimum(coefficients: np.ndarray) -> float | np.ndarray:
    """Where parabolas [3] or [3, n] are least, from the mean of ln N; not a number where they open downwards."""
    square, linear = coefficients[0], coefficients[1]
    return np.where(square > 0, -linear / (2 * np.where(square > 0, square, 1)), np.nan)


def _resample(sizes: np.ndarray, losses: np.ndarray, coefficients: np.ndarray, points, sweep: Sweep) -> np.ndarray:
    """Minima [replicates] of parabolas through means that scatter as seeds do, or without seeds as the residuals."""
    freedom = len(sizes) - 3
    residual = np.polyval(coefficients, sizes) - losses
    scatter = sweep.noise / np.sqrt([len(point.done) for point in points])
    if not math.isfinite(sweep.noise):
        scatter = np.full(len(sizes), math.sqrt(float((residual**2).sum()) / freedom) if freedom else math.nan)
    draw = np.random.default_rng(0).standard_normal((len(sizes), REPLICATES))
    if not np.isfinite(scatter).all():
        return np.full(REPLICATES, np.nan)
    return _minimum(np.polyfit(sizes, losses[:, None] + scatter[:, None] * draw, 2))


def _draw_budget(axes, sweep: Sweep, budget: Budget, colour: str, marks: Marks, index: int) -> None:
    sizes = [point.mean("active_parameters") for point in budget.points]
    for size, point in zip(sizes, budget.points, strict=True):
        draw_mean(axes, marks, index, colour, size, point, sweep.metric, seeds=True)
    along = np.geomspace(min(sizes) / 1.2, max(sizes) * 1.2, 100)
    losses = np.polyval(budget.coefficients, np.log(along) - np.log(sizes).mean())
    axes.plot(along, losses, color=colour, linewidth=1.2, **marks.arm(index))
    if budget.inside:
        tip = f"least at {units(budget.best)} parameters, {units(budget.tokens)} tokens: {budget.loss:.4f}"
        axes.plot([budget.best], [budget.loss], "*", color=colour, markersize=11, **marks.arm(index, tip))


def _draw_optima(axes, found: Sequence[Budget], parameters: Power | None, tokens: Power | None) -> None:
    flops = np.array([budget.flops for budget in found])
    along = np.geomspace(flops.min() / 1.5, flops.max() * 1.5, 30)
    kinds = (("parameters", "#3b82f6", parameters, "best"), ("tokens", "#f97316", tokens, "tokens"))
    for label, colour, fitted, field in kinds:
        axes.plot(flops, [getattr(budget, field) for budget in found], "*", color=colour, markersize=9, label=label)
        if fitted is not None:
            axes.plot(along, fitted.scale * along**fitted.exponent, color=colour)
    for published, dashes in DASHES.values():
        best = published.law.optimum(along)
        axes.plot(along, best.active_parameters, dashes, color="#3b82f6", linewidth=1)
        axes.plot(along, best.tokens, dashes, color="#f97316", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("at the minimum")
    axes.legend(fontsize=8, frameon=False)


def _said(found: Sequence[Budget], parameters: Power | None, tokens: Power | None) -> str:
    minima = [
        f"{units(budget.best)} at {budget.flops:.3g} FLOPs"
        + (
            f" ({units(budget.interval[0])} to {units(budget.interval[1])})"
            if math.isfinite(budget.interval[0])
            else ""
        )
        + ("" if budget.inside else ", outside of the sizes that were run")
        for budget in found
        if math.isfinite(budget.best)
    ]
    text = f"Best active parameters: {'; '.join(minima)}." if minima else "No parabola has a minimum."
    if parameters and tokens:
        text += (
            f" Parameters grow as C^{_exponent(parameters)}, tokens as C^{_exponent(tokens)} (Hoffmann: 0.46, 0.54)."
        )
    return text


def _exponent(fitted: Power) -> str:
    low, high = fitted.interval
    return f"{fitted.exponent:.2f}" + (f" ({low:.2f} to {high:.2f})" if math.isfinite(low) else "")


def _rows(budget: Budget, sweep: Sweep) -> list[dict]:
    common = {"budget": budget.flops}
    rows = [
        common
        | {"set": "point", "active_parameters": point.mean("active_parameters"), "tokens": point.mean("tokens")}
        | {"loss": point.mean(sweep.metric), "standard_error": point.error(sweep.metric), "seeds": len(point.done)}
        for point in budget.points
    ]
    low, high = budget.interval
    best = {"set": "minimum", "active_parameters": budget.best, "tokens": budget.tokens, "loss": budget.loss}
    return [*rows, common | best | {"low": low, "high": high, "inside": budget.inside}]


def _facts(budget: Budget) -> dict:
    low, high = budget.interval
    found = {"flops": budget.flops, "active_parameters": budget.best, "low": low, "high": high}
    return found | {"tokens": budget.tokens, "loss": budget.loss, "inside": budget.inside}
