"""Repeated data: loss over epochs, and what tokens seen again are worth by a law fitted to the sweep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from gpt4moe.analysis.scaling import C4, MUENNIGHOFF, Fit, FitConfig, Law, fit, observe, residual_rows, summary
from gpt4moe.analysis.scaling.chinchilla import EXPONENTS, OFFSETS, SCALES, DataConstrained, worth
from gpt4moe.analysis.scaling.law import Array, constant
from gpt4moe.analysis.sweeps.curves import Curve
from gpt4moe.analysis.sweeps.drawing import Arm, Marks, Plot, arms_of
from gpt4moe.analysis.sweeps.final import draw_mean, point_row
from gpt4moe.analysis.sweeps.table import Axis, Point, Sweep, name_of, number, units

# Epochs have to go from at most one to at least two, and lie apart from each other, before they are a question.
REPEATED, APART = 2.0, 1.1
LEAST_EPOCHS = 3
# Tokens within this ratio are as many; sizes too.
SAME = 1.05
MAX_LINES, MAX_FITS = 8, 4
# A loss has risen where it lies so many standard errors of the difference above the least before.
RISE = 2.0
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


@dataclasses.dataclass(frozen=True)
class Seen:
    """A point trained on one source: its name, how often its tokens were seen, how many there were and are unique.

    others: places on the axes that change none of these, and what they are called.
    """

    point: Point
    source: str
    epochs: float
    tokens: float
    unique: float
    others: tuple[int, ...]
    name: str


def repeat_plots(sweep: Sweep, curves: Sequence[Curve], config: FitConfig | None = None) -> list[Plot]:
    """Loss over epochs; none unless points are trained on one source and some see it twice or more."""
    found = _seen(sweep, curves)
    epochs = np.sort([each.epochs for each in found])
    if len(epochs) < LEAST_EPOCHS or epochs[-1] < REPEATED or epochs[-1] < REPEATED * epochs[0]:
        return []
    by_unique = _lines(found, "unique")
    lines = by_unique or _lines(found, "tokens")
    risen = _risen(sweep, by_unique)
    fits = _fits(sweep, [each for each in found if each.point.place not in risen], config)
    return [_plot(sweep, lines, fits, len(risen))] if lines else []


def _seen(sweep: Sweep, curves: Sequence[Curve]) -> list[Seen]:
    facts = {}
    for curve in curves:
        if len(curve.epochs) == 1 and math.isfinite(tokens := curve.point.mean("tokens")):
            ((source, epochs),) = curve.epochs.items()
            facts[curve.point.place] = (curve.point, source, epochs, tokens, tokens / epochs)
    apart = [axis for axis in sweep.axes if not _changes_data(sweep, axis, facts)]
    found = []
    for place, fact in facts.items():
        others = tuple(at for axis, at in zip(sweep.axes, place, strict=True) if axis in apart)
        found.append(Seen(*fact, others, name_of(apart, others)))
    return found


def _changes_data(sweep: Sweep, axis: Axis, facts: Mapping[tuple, tuple]) -> bool:
    """Whether the source, its tokens or its unique tokens change along an axis."""
    for line in sweep.lines(axis).values():
        known = [facts[point.place] for point in line if point.place in facts]
        if len({source for _, source, *_ in known}) > 1:
            return True
        if any(max(values) > SAME * min(values) for values in zip(*(fact[3:] for fact in known), strict=True)):
            return True
    return False


def _lines(found: Sequence[Seen], kept: str) -> dict[str, list[Seen]]:
    """Points of one source in which `kept`, the unique tokens or all of them, stays as it is, by epochs."""
    groups: list[list[Seen]] = []
    for each in sorted(found, key=lambda each: (each.source, each.others, getattr(each, kept))):
        last = groups[-1][0] if groups else None
        alike = last is not None and (last.source, last.others) == (each.source, each.others)
        if alike and getattr(each, kept) <= SAME * getattr(last, kept):
            groups[-1].append(each)
        else:
            groups.append([each])
    lines = [sorted(group, key=lambda each: each.epochs) for group in groups]
    what = {"unique": "unique tokens", "tokens": "tokens"}[kept]
    named = {
        ", ".join(
            part for part in (line[0].source, line[0].name, f"{units(getattr(line[0], kept))} {what}") if part
        ): line
        for line in lines
        if len(line) > 1 and line[-1].epochs > APART * line[0].epochs
    }
    return named


def _risen(sweep: Sweep, lines: Mapping[str, list[Seen]]) -> set[tuple[int, ...]]:
    """Places of points that more of the same tokens made worse, beyond noise: no worth of a token says so."""
    noise, risen = sweep.pair_noise, set()
    for line in lines.values():
        least = line[0].point
        for each in line[1:]:
            rise = each.point.mean(sweep.metric) - least.mean(sweep.metric)
            error = noise * math.sqrt(1 / len(each.point.done) + 1 / len(least.done))
            if rise > (RISE * error if math.isfinite(error) else 0):
                risen.add(each.point.place)
            least = each.point if rise < 0 else least
    return risen


def _fits(sweep: Sweep, found: Sequence[Seen], config: FitConfig | None) -> dict[tuple, Fit]:
    """The law of each source and other setting, where its points are of one size and enough; beta is held for few."""
    groups: dict[tuple, list[Seen]] = {}
    for each in found:
        groups.setdefault((each.source, each.others), []).append(each)
    fits = {}
    for key, group in list(groups.items())[:MAX_FITS]:
        sizes = np.array([each.point.mean("active_parameters") for each in group])
        runs = [(number(row, sweep.metric), number(row, "tokens"), each) for each in group for row in each.point.done]
        runs = [run for run in runs if math.isfinite(run[1])]
        cells = len({(each.tokens, each.unique) for *_, each in runs})
        fixed = {} if cells > len(Repeated.constants()) else {"beta": C4.law.beta}
        if not np.isfinite(sizes).all() or sizes.max() > SAME * sizes.min():
            continue
        if cells > len(Repeated.constants()) - len(fixed):
            losses, tokens, _ = zip(*runs, strict=True)
            unique = [each.unique for *_, each in runs]
            labels = [each.point.place for *_, each in runs]
            fits[key] = fit(Repeated, observe(losses, cells=labels, tokens=tokens, unique_tokens=unique), config, fixed)
    return fits


def _plot(sweep: Sweep, lines: Mapping[str, list[Seen]], fits: Mapping[tuple, Fit], num_risen: int) -> Plot:
    shown = dict(list(lines.items())[:MAX_LINES])
    arms = arms_of(list(shown))

    def draw(drawn, marks: Marks) -> None:
        axes = drawn.subplots()
        for index, (arm, line) in enumerate(zip(arms, shown.values(), strict=True)):
            for each in line:
                draw_mean(axes, marks, index, arm.colour, each.epochs, each.point, sweep.metric, seeds=True)
            found = fits.get((line[0].source, line[0].others))
            if found is not None:
                _draw_law(axes, found, line, arm, marks, index)
            else:
                means = [each.point.mean(sweep.metric) for each in line]
                axes.plot([each.epochs for each in line], means, color=arm.colour, **marks.arm(index))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("epochs")
        axes.set_ylabel(sweep.metric_label)

    rows = [
        {
            "line": label,
            "source": each.source,
            "epochs": each.epochs,
            "tokens": each.tokens,
            "unique_tokens": each.unique,
        }
        | point_row(sweep, each.point, sweep.metric)
        for label, line in lines.items()
        for each in line
    ]
    names = {(each.source, each.others): ", ".join(filter(None, (each.source, each.name))) for line in lines.values()
             for each in line}  # fmt: skip
    known = {names[key]: found for key, found in fits.items() if key in names}
    facts = {name: {"fit": summary(found), "residuals": residual_rows(found)} for name, found in known.items()}
    rest = f" {len(shown)} of {len(lines)} lines are shown; the CSV has all." if len(shown) < len(lines) else ""
    of = len({(each.source, each.others) for line in lines.values() for each in line})
    rest += f" The law is fitted to {len(known)} of {of} sources and settings." if 0 < len(known) < of else ""
    caption = f"Points: means over seeds. {_said(known, num_risen)}{rest}"
    return Plot("epochs", "Repeated data", caption, rows, draw, arms, (9.0, 3.6), wide=True, facts=facts)


def _draw_law(axes, found: Fit, line: Sequence[Seen], arm: Arm, marks: Marks, index: int) -> None:
    """The fitted law along a line with its band, the same with the paper's R_D, and with fresh tokens."""
    epochs = np.array([each.epochs for each in line])
    at = np.geomspace(epochs[0], epochs[-1], 60)
    tokens = np.exp(np.interp(np.log(at), np.log(epochs), np.log([each.tokens for each in line])))
    said = found.predict(tokens=tokens, unique_tokens=tokens / at)
    axes.plot(at, said.loss, color=arm.colour, linewidth=1.2, **marks.arm(index, f"{arm.label}: fitted law"))
    axes.fill_between(at, said.low, said.high, color=arm.colour, alpha=0.18, linewidth=0, **marks.arm(index))
    theirs = dataclasses.replace(found.law, R_D=MUENNIGHOFF.law.R_D).loss(tokens, tokens / at)
    axes.plot(at, theirs, "--", color=arm.colour, linewidth=0.9, **marks.arm(index, "R_D of Muennighoff et al."))
    fresh = found.law.loss(tokens, tokens)
    axes.plot(at, fresh, ":", color=arm.colour, linewidth=0.9, **marks.arm(index, "as many fresh tokens"))


def _said(fits: Mapping[str, Fit], num_risen: int) -> str:
    if not fits:
        return "No law is fitted: points of one size are too few."
    are = (
        "point at which more epochs raised the loss beyond noise is"
        if num_risen == 1
        else ("points at which more epochs raised the loss beyond noise are")
    )
    risen = f"{num_risen} {are} left out of the fit. " if num_risen else ""
    return (
        "Solid: tokens seen again are worth 1 + R_D (1 - exp(-(epochs - 1) / R_D)) epochs (Muennighoff et al. 2023), "
        f"{'; '.join(_constant(name, found) for name, found in fits.items())}. "
        f"{risen}Dashed: with the paper's R_D = {MUENNIGHOFF.law.R_D:.3g}. Dotted: fresh tokens."
    )


def _constant(name: str, found: Fit) -> str:
    low, high = found.intervals["R_D"]
    interval = f"{low:.3g} to {high:.3g}" if high < 1e6 else f"from {low:.3g}, no upper limit"
    value = f"{found.law.R_D:.3g}" if found.law.R_D < 1e6 else "without limit"
    held = "" if "beta" in found.intervals else f", beta held at {found.law.beta:.3g}"
    return f"{name}: R_D = {value} ({interval}){held}, error of a run {found.rms:.2%}"
