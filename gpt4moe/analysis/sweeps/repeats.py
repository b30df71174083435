"""Repeated data: loss over epochs, and what tokens seen again are worth by a law fitted to the sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from gpt4moe.analysis.scaling import C4, MUENNIGHOFF, Fit, FitConfig, Law, fit, observe, residual_rows, summary
from gpt4moe.analysis.scaling.chinchilla import EXPONENTS, OFFSETS, SCALES, DataConstrained, worth
from gpt4moe.analysis.scaling.law import Array, constant
from gpt4moe.analysis.sweeps.curves import Curve
from gpt4moe.analysis.sweeps.drawing import Marks, Plot, arms_of
from gpt4moe.analysis.sweeps.final import draw_mean, point_row
from gpt4moe.analysis.sweeps.table import Point, Sweep, number

# Epochs have to go from at most one to at least two, and lie apart from each other, before they are a question.
REPEATED, APART = 2.0, 1.1
LEAST_EPOCHS = 3
REPEATS = DataConstrained.constants()["R_D"]["starts"]


@dataclasses.dataclass(frozen=True)
class Repeated(Law):
    """`DataConstrained` at one size of model: L = E + B / (U worth(D / U))^beta, its size a part of E."""

    B: float = constant(SCALES, log=True)
    E: float = constant(OFFSETS, log=True)
    beta: float = constant(EXPONENTS)
    R_D: float = constant(REPEATS, log=True)

    def loss(self, tokens: Array, unique_tokens: Array) -> Array:
        """Returns nats per token."""
        unique = np.minimum(unique_tokens, tokens)
        return self.E + self.B / (unique * worth(tokens / unique, self.R_D)) ** self.beta


def repeat_plots(sweep: Sweep, curves: Sequence[Curve], config: FitConfig | None = None) -> list[Plot]:
    """Loss over epochs; none unless one source is trained on and some points see it twice or more."""
    epochs = {curve.point.place: next(iter(curve.epochs.values())) for curve in curves if len(curve.epochs) == 1}
    points = [point for point in sweep.measured if epochs.get(point.place, 0) > 0]
    seen = np.sort([epochs[point.place] for point in points])
    if len(seen) < LEAST_EPOCHS or seen[-1] < REPEATED or seen[-1] < REPEATED * seen[0]:
        return []
    lines = _lines(sweep, points, epochs)
    found = _fit(sweep, points, epochs, config)
    return [_plot(sweep, lines, epochs, found)] if lines else []


def _lines(sweep: Sweep, points: Sequence[Point], epochs: Mapping[tuple, float]) -> dict[str, list[Point]]:
    """Points along the axis that changes epochs the most, for every combination of the others."""
    places = {point.place for point in points}

    def span(line: Sequence[Point]) -> float:
        seen = [epochs[point.place] for point in line]
        return max(seen) / min(seen)

    best: dict[str, list[Point]] = {}
    for axis in sweep.axes:
        lines = {label: [point for point in line if point.place in places] for label, line in sweep.lines(axis).items()}
        lines = {label: line for label, line in lines.items() if len(line) >= LEAST_EPOCHS and span(line) > APART}
        if lines and (not best or max(map(span, lines.values())) > max(map(span, best.values()))):
            best = lines
    return {label: sorted(line, key=lambda point: epochs[point.place]) for label, line in list(best.items())[:8]}


def _fit(sweep: Sweep, points: Sequence[Point], epochs: Mapping[tuple, float], config: FitConfig | None) -> Fit | None:
    """The law of the points, where they are of one size and enough of them; beta is held where they are few."""
    sizes = np.array([point.mean("active_parameters") for point in points])
    if not np.isfinite(sizes).all() or sizes.max() > 1.05 * sizes.min():
        return None
    runs = [(row, epochs[point.place]) for point in points for row in point.done]
    tokens = np.array([number(row, "tokens") for row, _ in runs])
    losses = [number(row, sweep.metric) for row, _ in runs]
    unique = tokens / np.array([seen for _, seen in runs])
    seen_once = observe(losses, tokens=tokens, unique_tokens=unique)
    cells = len(np.unique(seen_once.cells))
    fixed = {} if cells > len(Repeated.constants()) else {"beta": C4.law.beta}
    return fit(Repeated, seen_once, config, fixed) if cells > len(Repeated.constants()) - len(fixed) else None


def _plot(sweep: Sweep, lines: Mapping[str, list[Point]], epochs: Mapping[tuple, float], found: Fit | None) -> Plot:
    arms = arms_of([label or "all runs" for label in lines])

    def draw(drawn, marks: Marks) -> None:
        axes = drawn.subplots()
        for index, (arm, line) in enumerate(zip(arms, lines.values(), strict=True)):
            for point in line:
                at = epochs[point.place]
                draw_mean(axes, marks, index, arm.colour, at, point, sweep.metric, seeds=True)
            at, tokens = _along(line, epochs)
            if found is None:
                means = [point.mean(sweep.metric) for point in line]
                axes.plot([epochs[point.place] for point in line], means, color=arm.colour, **marks.arm(index))
                continue
            said = found.predict(tokens=tokens, unique_tokens=tokens / at)
            axes.plot(at, said.loss, color=arm.colour, linewidth=1.2, **marks.arm(index, f"{arm.label}: fitted law"))
            axes.fill_between(at, said.low, said.high, color=arm.colour, alpha=0.18, linewidth=0, **marks.arm(index))
            theirs = dataclasses.replace(found.law, R_D=MUENNIGHOFF.law.R_D).loss(tokens, tokens / at)
            axes.plot(
                at, theirs, "--", color=arm.colour, linewidth=0.9, **marks.arm(index, "R_D of Muennighoff et al.")
            )
            fresh = found.law.loss(tokens, tokens)
            axes.plot(at, fresh, ":", color=arm.colour, linewidth=0.9, **marks.arm(index, "as many fresh tokens"))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("epochs")
        axes.set_ylabel(sweep.metric_label)

    rows = [
        {"line": label, "epochs": epochs[point.place], "tokens": point.mean("tokens")}
        | {"unique_tokens": point.mean("tokens") / epochs[point.place]}
        | point_row(sweep, point, sweep.metric)
        for label, line in lines.items()
        for point in line
    ]
    facts = {"fit": summary(found), "residuals": residual_rows(found)} if found else {}
    caption = f"Points: means over seeds. {_said(found)}"
    return Plot("epochs", "Repeated data", caption, rows, draw, arms, (9.0, 3.6), wide=True, facts=facts)


def _along(line: Sequence[Point], epochs: Mapping[tuple, float]) -> tuple[np.ndarray, np.ndarray]:
    """Epochs [n] and the tokens there [n], between the points of a line on logarithms."""
    at = np.array([epochs[point.place] for point in line])
    along = np.geomspace(at[0], at[-1], 60)
    tokens = np.log([point.mean("tokens") for point in line])
    return along, np.exp(np.interp(np.log(along), np.log(at), tokens))


def _said(found: Fit | None) -> str:
    if found is None:
        return "No law is fitted: points of one size are too few."
    low, high = found.intervals["R_D"]
    interval = f"{low:.3g} to {high:.3g}" if high < 1e6 else f"from {low:.3g}, no upper limit"
    held = "" if "beta" in found.intervals else f", beta held at {found.law.beta:.3g}"
    error = (
        f"; {found.held_out.error:.2%} on the {found.held_out.num_runs} runs of the most tokens"
        if found.held_out
        else ""
    )
    return (
        f"Solid: tokens seen again are worth 1 + R_D (1 - exp(-(epochs - 1) / R_D)) epochs (Muennighoff et al. 2023), "
        f"fitted R_D = {found.law.R_D:.3g} ({interval}){held}, error of a run {found.rms:.2%}{error}. "
        f"Dashed: with the paper's R_D = {MUENNIGHOFF.law.R_D:.3g}. Dotted: as many fresh tokens."
    )
