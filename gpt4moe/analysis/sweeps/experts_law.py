"""The law of routed models fitted to a sweep over experts: curve with its band, extrapolation shaded, residuals."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from gpt4moe.analysis.scaling import REFIT_S_BASE, Fit, FitConfig, Routed, curve, fit, observe, residual_rows, summary
from gpt4moe.analysis.sweeps.drawing import Arm, Marks, Plot, arms_of
from gpt4moe.analysis.sweeps.final import draw_mean
from gpt4moe.analysis.sweeps.table import Axis, Point, Sweep, number, short

LEAST_VALUES = 4
MOST_FITS = 4
# So few numbers of experts say nothing of where the gain begins and ends: E_start and E_max are held.
FEW = 5
# Sizes within this ratio count as one: what a router weighs differs from one number of experts to the next.
ONE_SIZE = 1.25
# Beyond these a constant is one that the runs do not limit (`scaling.fitting.NO_LIMIT` and what comes near it).
BEYOND = 1e9


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A law on one line of a figure: the fit, the size it is drawn at, the points of the line."""

    fit: Fit
    active_parameters: float
    points: Sequence[Point]


def expert_law_plots(sweep: Sweep, config: FitConfig | None = None) -> list[Plot]:
    """Loss over experts with the law fitted to it; none without four numbers of experts at one size."""
    name, axis = experts_axis(sweep)
    if axis is None:
        return []
    lines = {label: points for label, points in sweep.lines(axis).items() if len(_experts(points, name)) > 3}
    sizes = {label: _sizes(points) for label, points in lines.items()}
    lines = {label: points for label, points in lines.items() if _is_one(sizes[label])}
    together = _is_grid_of_sizes(sweep, lines, sizes)
    names = (sweep.metric, name)
    fitted = _fit_together(lines, names, config) if together else _fit_apart(lines, names, config)
    return [_plot(sweep, fitted, name, together, len(lines))] if fitted else []


def experts_axis(sweep: Sweep) -> tuple[str, Axis | None]:
    """The name that sets how many experts there are, and its axis."""
    for axis in sweep.axes:
        for name in axis.names:
            if short(name).lower() == "num_experts" and axis.numeric and len(axis) >= LEAST_VALUES:
                return name, axis
    return "", None


def _experts(points: Sequence[Point], name: str) -> set[float]:
    return {number(point.rows[0], name) for point in points}


def _sizes(points: Sequence[Point]) -> np.ndarray:
    return np.array([point.mean("active_parameters") for point in points])


def _is_one(values: np.ndarray, ratio: float = ONE_SIZE) -> bool:
    return bool(np.isfinite(values).all() and values.min() > 0 and values.max() <= ratio * values.min())


def _is_grid_of_sizes(sweep: Sweep, lines: Mapping[str, Sequence[Point]], sizes: Mapping[str, np.ndarray]) -> bool:
    """Whether the lines differ in size alone, in three sizes or more: then one law holds for all."""
    means = sorted(float(np.exp(np.log(sizes[label]).mean())) for label in lines)
    apart = all(high > ONE_SIZE * low for low, high in itertools.pairwise(means))
    tokens = np.array([point.mean("tokens") for points in lines.values() for point in points])
    return len(sweep.axes) == 2 and len(means) >= 3 and apart and _is_one(tokens, 1.01)


def _runs(points: Sequence[Point], *names: str) -> list[list[float]]:
    """These columns of every run that is done."""
    return [[number(row, name) for point in points for row in point.done] for name in names]


def _fit_together(
    lines: Mapping[str, Sequence[Point]], names: Sequence[str], config: FitConfig | None
) -> dict[str, Fitted]:
    points = [point for line in lines.values() for point in line]
    losses, experts, sizes = _runs(points, *names, "active_parameters")
    found = fit(Routed, observe(losses, active_parameters=sizes, num_experts=experts), config)
    return {label: Fitted(found, _middle(points), points) for label, points in lines.items()}


def _fit_apart(
    lines: Mapping[str, Sequence[Point]], names: Sequence[str], config: FitConfig | None
) -> dict[str, Fitted]:
    """A law for each line; `names`: the columns of loss and experts.

    At one size the terms in the size are constants: a and c are held at 0.
    """
    fitted = {}
    for label in list(lines)[:MOST_FITS]:
        losses, experts = _runs(lines[label], *names)
        size = _middle(lines[label])
        fixed = {"a": 0.0, "c": 0.0}
        if len(set(experts)) <= FEW:
            fixed |= {name: getattr(REFIT_S_BASE.law, name) for name in ("E_start", "E_max")}
        # Of one compute all: what is held out is what has the most experts.
        runs = observe(losses, active_parameters=[size] * len(losses), num_experts=experts, compute=experts)
        fitted[label] = Fitted(fit(Routed, runs, config, fixed), size, lines[label])
    return fitted


def _middle(points: Sequence[Point]) -> float:
    return float(np.exp(np.log(_sizes(points)).mean()))


def _plot(sweep: Sweep, fitted: Mapping[str, Fitted], name: str, together: bool, num_lines: int) -> Plot:
    arms = arms_of([label or "all runs" for label in fitted], ordered=together)
    with np.errstate(invalid="ignore"):  # a resampled law may have no value far beyond its runs
        drawn_laws = {
            label: curve(each.fit, "num_experts", _experts_drawn(each.fit), active_parameters=each.active_parameters)
            for label, each in fitted.items()
        }

    def draw(drawn, marks: Marks) -> None:
        left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
        for index, (arm, label) in enumerate(zip(arms, fitted, strict=True)):
            _draw_law(left, drawn_laws[label], arm, marks, index)
            for point in fitted[label].points:
                at = number(point.rows[0], name)
                draw_mean(left, marks, index, arm.colour, at, point, sweep.metric, seeds=False)
            _draw_residuals(right, fitted[label], arm, marks, index)
        _shade(left, next(iter(fitted.values())).fit)
        _limit(left, [each.prediction.loss[~each.prediction.outside] for each in drawn_laws.values()], sweep)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xlabel("experts of a layer")
        left.set_ylabel(sweep.metric_label)
        right.set_ylabel("log(measured / law)")
        right.axhline(0, color="#808080", linewidth=1)

    said = _said(fitted, name, together)
    rest = f" Fitted to {len(fitted)} of {num_lines} lines." if len(fitted) < num_lines else ""
    confidence = next(iter(fitted.values())).fit.config.confidence
    caption = (
        f"Routed law (Clark et al. 2022, eq. 1, there of one expert for a token) with its {confidence:.0%} bootstrap "
        f"band; shaded: experts beyond those it was fitted on. Right: residuals of every run. {said}{rest}"
    )
    rows = [{"line": label, "set": "law"} | row for label in fitted for row in drawn_laws[label].rows()]
    once = {"": next(iter(fitted.values()))} if together else fitted
    rows += [{"line": label, "set": "run"} | row for label, each in once.items() for row in residual_rows(each.fit)]
    facts = {label or "all runs": summary(each.fit) for label, each in once.items()}
    if together:
        facts["all runs"]["dense_multiplier"] = multipliers(fitted, name)
    return Plot("law_experts", "Law of routed models", caption, rows, draw, arms, (9.0, 3.6), wide=True, facts=facts)


def multipliers(fitted: Mapping[str, Fitted], name: str) -> dict[str, dict[str, float]]:
    """By line and number of experts: how many times larger a dense model of the same loss is (Clark et al., eq. 11)."""
    return {
        label: {
            f"{experts:g}": float(each.fit.law.dense_multiplier(each.active_parameters, experts))
            for experts in sorted(_experts(each.points, name))
        }
        for label, each in fitted.items()
    }


def _experts_drawn(found: Fit) -> np.ndarray:
    """From the least number fitted, below which the law has a pole, to four times the greatest."""
    low, high = found.ranges.bounds["num_experts"]
    return np.geomspace(low, 4 * high, 100)


def _draw_law(axes, drawn_law, arm: Arm, marks: Marks, index: int) -> None:
    law = drawn_law.prediction
    axes.fill_between(
        drawn_law.values, law.low, law.high, color=arm.colour, alpha=0.18, linewidth=0, **marks.arm(index)
    )
    for beyond, dashes in ((False, "-"), (True, ":")):
        values = np.where(law.outside == beyond, law.loss, np.nan)
        axes.plot(drawn_law.values, values, dashes, color=arm.colour, linewidth=1.2, **marks.arm(index))


def _shade(axes, found: Fit) -> None:
    low, high = found.ranges.bounds["num_experts"]
    left, right = max(axes.get_xlim()[0], 0.8), axes.get_xlim()[1]
    for span in ((1, low), (high, right)):
        if span[1] > span[0]:
            axes.axvspan(*span, color="#808080", alpha=0.12, linewidth=0)
    axes.set_xlim(left, right)


def _limit(axes, laws: Sequence[np.ndarray], sweep: Sweep) -> None:
    """What runs need, and laws where there are any; what lies beyond them may leave the picture."""
    runs = [value for point in sweep.measured for value in point.values(sweep.metric)]
    low, high = min(*map(np.min, laws), *runs), max(*map(np.max, laws), *runs)
    axes.set_ylim(low - 0.2 * (high - low), high + 0.1 * (high - low))


def _draw_residuals(axes, each: Fitted, arm: Arm, marks: Marks, index: int) -> None:
    runs = each.fit.observations
    mine = np.isclose(runs.variables["active_parameters"], each.active_parameters, rtol=ONE_SIZE - 1)
    for experts, residual in zip(runs.variables["num_experts"][mine], each.fit.residuals[mine], strict=True):
        tip = f"{arm.label}, {experts:g} experts: {residual:+.4f}"
        axes.plot([experts], [residual], "o", color=arm.colour, markersize=3.5, **marks.arm(index, tip))


def _said(fitted: Mapping[str, Fitted], name: str, together: bool) -> str:
    """The constants of each fit in words, with intervals, error and held-out error."""
    said = []
    if together:
        found = multipliers(fitted, name)
        largest = "; ".join(f"{label}: {list(each.values())[-1]:.3g}" for label, each in found.items())
        said.append(
            f"Size of the dense model of the loss with the most experts, over the active parameters: {largest}."
        )
    for label, each in list(fitted.items())[: 1 if together else None]:
        found = each.fit
        constants = ", ".join(
            f"{name} = {_end(getattr(found.law, name))} ({_end(low)} to {_end(high)})"
            for name, (low, high) in found.intervals.items()
        )
        held = [
            f"{name} = {getattr(found.law, name):.4g}" for name in found.law.constants() if name not in found.intervals
        ]
        text = f"{constants}{', held: ' + ', '.join(held) if held else ''}; error of a run {found.rms:.2%}"
        if found.held_out is not None:
            most = "of the most FLOPs" if together else "with the most experts"
            text += (
                f", {found.held_out.error:.2%} on the {found.held_out.num_runs} runs {most} when fitted without them"
            )
        said.append(f"{label}: {text}." if label and not together else f"{text}.")
    return " ".join(said)


def _end(value: float) -> str:
    return (
        "no limit" if not math.isfinite(value) or abs(value) > BEYOND or 0 < abs(value) < 1 / BEYOND else f"{value:.4g}"
    )
