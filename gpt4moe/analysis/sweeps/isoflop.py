"""The figure of budgets of compute: their parabolas over the size of the model, and what is best at each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gpt4moe.analysis.scaling import EPOCH, HOFFMANN
from gpt4moe.analysis.sweeps.budgets import Budget, Family, Power, families
from gpt4moe.analysis.sweeps.drawing import Arm, Marks, Plot, arms_of, log_ticks
from gpt4moe.analysis.sweeps.final import draw_mean
from gpt4moe.analysis.sweeps.table import Sweep, units

PUBLISHED = {"Hoffmann et al.": (HOFFMANN, ":"), "Epoch": (EPOCH, "-.")}
PARAMETERS, TOKENS = "#3b82f6", "#f97316"


def isoflop_plots(sweep: Sweep) -> list[Plot]:
    """Parabolas and optima of the budgets of a sweep; none where it has no budget with three sizes."""
    found = families(sweep)
    if not found:
        return []
    drawn_budgets = [(family, budget) for family in found for budget in family.budgets]
    labels = [", ".join(filter(None, (family.name, f"{budget.flops:.3g} FLOPs"))) for family, budget in drawn_budgets]
    arms = arms_of(labels, ordered=len(found) == 1)

    def draw(drawn, marks: Marks) -> None:
        left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
        for index, (arm, (_, budget)) in enumerate(zip(arms, drawn_budgets, strict=True)):
            _draw_budget(left, sweep, budget, arm.colour, marks, index)
        log_ticks(left.xaxis)
        left.set_xlabel("active parameters")
        left.set_ylabel(sweep.metric_label)
        _draw_optima(right, found, arms, marks)

    rows = [{"family": family.name} | row for family, budget in drawn_budgets for row in _rows(budget, sweep)]
    facts = {
        family.name or "all runs": {
            "budgets": [_facts(budget) for budget in family.budgets],
            "parameters": dataclasses.asdict(family.parameters) if family.parameters else None,
            "tokens": dataclasses.asdict(family.tokens) if family.tokens else None,
        }
        for family in found
    }
    caption = (
        "Left: each budget's loss over the size of the model, its parabola, and a star at the minimum. Right: sizes "
        f"and tokens at the minima. {' '.join(map(_said, found))} Dotted, dash-dotted: Hoffmann et al. 2022 and "
        f"Epoch's replication of it ({_theirs()}), carried on from runs of 70M parameters and more."
    )
    return [Plot("isoflop", "Best size of each budget", caption, rows, draw, arms, (9.0, 3.8), wide=True, facts=facts)]


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


def _draw_optima(axes, found: Sequence[Family], arms: Sequence[Arm], marks: Marks) -> None:
    flops = np.array([budget.flops for family in found for budget in family.budgets])
    along = np.geomspace(flops.min() / 1.5, flops.max() * 1.5, 30)
    index = 0
    for family in found:
        for fitted, colour in ((family.parameters, PARAMETERS), (family.tokens, TOKENS)):
            if fitted is not None:
                axes.plot(along, fitted.scale * along**fitted.exponent, color=colour, linewidth=1.2)
        for budget in family.budgets:
            filled = "full" if budget.inside else "none"
            for value, colour, low, high in (
                (budget.best, PARAMETERS, *budget.interval),
                (budget.tokens, TOKENS, math.nan, math.nan),
            ):
                if math.isfinite(low):
                    axes.vlines([budget.flops], low, high, color=colour, linewidth=1, **marks.arm(index))
                tip = f"{arms[index].label}: {units(value)}"
                style = {"color": colour, "markersize": 9, "fillstyle": filled}
                axes.plot([budget.flops], [value], "*", **style, **marks.arm(index, tip))
            index += 1
    for published, dashes in PUBLISHED.values():
        best = published.law.optimum(along)
        axes.plot(along, best.active_parameters, dashes, color=PARAMETERS, linewidth=1)
        axes.plot(along, best.tokens, dashes, color=TOKENS, linewidth=1)
    for label, colour in (("parameters", PARAMETERS), ("tokens", TOKENS)):
        axes.plot([], [], "*", color=colour, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("at the minimum")
    axes.legend(fontsize=8, frameon=False)


def _theirs() -> str:
    """The exponents of the published laws: beta and alpha over their sum."""
    said = []
    for published, _ in PUBLISHED.values():
        law = published.law
        said.append(f"C^{law.beta / (law.alpha + law.beta):.2f} and C^{law.alpha / (law.alpha + law.beta):.2f}")
    return "; ".join(said)


def _said(family: Family) -> str:
    name = f" of {family.name}" if family.name else ""
    known = family.scatter.freedom > 0
    minima = [_least(budget, known=known) for budget in family.budgets if math.isfinite(budget.best)]
    text = f"Best active parameters{name}: {'; '.join(minima)}." if minima else f"No parabola{name} has a minimum."
    if family.parameters and family.tokens:
        text += f" Parameters grow as C^{_exponent(family.parameters)}, tokens as C^{_exponent(family.tokens)}."
    of = "the deviation between seeds" if family.scatter.of_seeds else "what the parabolas leave"
    return (
        f"{text} Intervals from {of}."
        if family.scatter.freedom
        else f"{text} One seed of so few sizes has no interval."
    )


def _least(budget: Budget, *, known: bool) -> str:
    low, high = budget.interval
    open_ended = " (nothing limits it)" if known else ""  # more than a tenth of the replicates have no minimum
    interval = f" ({units(low)} to {units(high)})" if math.isfinite(low) else open_ended
    outside = "" if budget.inside else ", outside of the sizes that were run and no part of the powers"
    return f"{units(budget.best)} at {budget.flops:.3g} FLOPs{interval}{outside}"


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
    return [*rows, common | {"set": "minimum"} | _facts(budget)]


def _facts(budget: Budget) -> dict:
    low, high = budget.interval
    found = {"flops": budget.flops, "active_parameters": budget.best, "low": low, "high": high}
    return found | {"tokens": budget.tokens, "loss": budget.loss, "inside": budget.inside}
