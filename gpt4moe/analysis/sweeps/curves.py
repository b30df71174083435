"""Figures of the loss while it falls: against tokens, FLOPs and seconds, a line for each point of the axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from gpt4moe.analysis.canvas import smooth
from gpt4moe.analysis.history import History, read_history
from gpt4moe.analysis.sweeps.drawing import MAX_ARMS, Arm, Marks, Plot, arms_at, log_ticks
from gpt4moe.analysis.sweeps.table import Point, Sweep, number, units

NUM_POINTS = 120
# Before this share of the run the loss falls so far that nothing later could be told apart.
CUT = 0.2
# Where runs end so many times apart, their lengths are drawn on logarithms.
LOG_SPAN = 3


@dataclasses.dataclass(frozen=True)
class Curve:
    """How the loss of a point fell: n places on the way of its shortest run, with mean and extremes over seeds.

    tokens, seconds [n]. loss, low, high [n]: smoothed training loss. held_tokens, held_seconds, held_out, held_low,
    held_high [m]: the same of held-out text. epochs: how often each training source was seen in the end.
    """

    point: Point
    tokens: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray
    held_tokens: np.ndarray
    held_seconds: np.ndarray
    held_out: np.ndarray
    held_low: np.ndarray
    held_high: np.ndarray
    epochs: Mapping[str, float]

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs of one token."""
        return self.point.mean("train_flops_per_token")

    def along(self, kind: str, *, held_out: bool = False) -> np.ndarray:
        """The places in tokens, FLOPs or seconds."""
        tokens = self.held_tokens if held_out else self.tokens
        if kind == "seconds":
            return self.held_seconds if held_out else self.seconds
        return tokens * self.flops_per_token if kind == "FLOPs" else tokens


def read_curves(sweep: Sweep) -> list[Curve]:
    """The curves of the points of which a run is done and has its log."""
    found = []
    for point in sorted(sweep.measured, key=lambda point: point.place):
        logs = [sweep.folder / "runs" / str(row.get("id")) for row in point.done]
        histories = [read_history(log) for log in logs if (log / "metrics.jsonl").exists()]
        histories = [history for history in histories if len(history.series("loss").tokens) > 1]
        if histories:
            found.append(_curve(point, histories))
    return found


def curve_plots(sweep: Sweep, curves: Sequence[Curve]) -> list[Plot]:
    """Loss against tokens, and against FLOPs and seconds where these differ between points."""
    if not curves:
        return []
    at = np.unique(np.linspace(0, len(curves) - 1, min(len(curves), MAX_ARMS)).round().astype(int))
    kept = [curves[index] for index in at]
    labels = [curve.point.label or "all runs" for curve in kept]
    arms = arms_at(sweep.axes, [curve.point.place for curve in kept], labels)
    plots = []
    for kind in ("tokens", "FLOPs", "seconds"):
        places = [curve.along(kind) for curve in kept]
        if all(np.isfinite(place).all() for place in places):
            plots.append(_plot(kind, curves, kept, arms))
    return plots


def tokens_to_match(curve: Curve, loss: float) -> float:
    """Tokens from which on the smoothed training loss stays at or below `loss`; not a number where it ends above."""
    above = np.flatnonzero(curve.loss > loss)
    if not len(above):
        return float(curve.tokens[0])
    before, after = above[-1], above[-1] + 1
    if after == len(curve.loss):
        return math.nan
    share = (curve.loss[before] - loss) / (curve.loss[before] - curve.loss[after])
    return float(curve.tokens[before] + share * (curve.tokens[after] - curve.tokens[before]))


def _curve(point: Point, histories: Sequence[History]) -> Curve:
    series = [history.series("loss") for history in histories]
    first, last = max(each.tokens[0] for each in series), min(each.tokens[-1] for each in series)
    tokens = np.linspace(first, last, NUM_POINTS)
    losses = np.array([_on(tokens, each.tokens, smooth(each.values)) for each in series])
    spent = [clock for history in histories if len((clock := _clock(history))[0])]
    epochs = _epochs(histories)
    evaluated = [_held_out(history, frozenset(epochs)) for history in histories]
    held_tokens = np.array(sorted(set.intersection(*(set(found) for found in evaluated))))
    held = np.array([[found[at] for at in held_tokens] for found in evaluated])

    def seconds(at: np.ndarray) -> np.ndarray:
        each = [np.interp(at, *clock) for clock in spent]
        return np.mean(each, axis=0) if each else np.full(len(at), np.nan)

    return Curve(
        point, tokens, seconds(tokens), losses.mean(0), losses.min(0), losses.max(0),
        held_tokens, seconds(held_tokens), held.mean(0), held.min(0), held.max(0), epochs,
    )  # fmt: skip


def _clock(history: History) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and the seconds until then; a row stands for the steps since the one before it."""
    rows = [row for row in history.rows if row.get("step_seconds") is not None]
    apart = np.diff([0, *(row["step"] for row in rows)])
    seconds = np.cumsum(apart * np.array([row["step_seconds"] for row in rows]))
    return np.array([row["tokens"] for row in rows], np.float64), seconds


def _epochs(histories: Sequence[History]) -> dict[str, float]:
    sources = histories[0].names(r"epoch/(.+)")
    seen = {source: float(np.mean([history.last(f"epoch/{source}") for history in histories])) for source in sources}
    return {source: epochs for source, epochs in seen.items() if epochs > 0}


def _on(places: np.ndarray, tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
    sound = np.isfinite(values)
    return np.interp(places, tokens[sound], values[sound]) if sound.any() else np.full(len(places), np.nan)


def _held_out(history: History, trained: frozenset[str]) -> dict[float, float]:
    """Tokens to held-out loss over the trained sources, as results have it, where every one was finite."""
    found = {}
    for row in history.rows:
        losses = {key: number(row, key) for key in row if key.startswith("eval/") and key.endswith("/loss")}
        losses = {key: loss for key, loss in losses.items() if not trained or key.split("/")[1] in trained}
        weights = [number(row, key.removesuffix("loss") + "tokens") for key in losses]
        if losses and all(map(math.isfinite, (*losses.values(), *weights))):
            found[row["tokens"]] = float(np.average(list(losses.values()), weights=weights))
    return found


def _plot(kind: str, curves: Sequence[Curve], kept: Sequence[Curve], arms: Sequence[Arm]) -> Plot:
    with_held_out = any(len(curve.held_tokens) for curve in kept)

    def draw(drawn, marks: Marks) -> None:
        panels = drawn.subplots(1, 1 + with_held_out, squeeze=False).flat
        for number_, (curve, arm) in enumerate(zip(kept, arms, strict=True)):
            _draw_training(panels[0], curve, kind, arm, marks, number_)
            if with_held_out:
                _draw_held_out(panels[1], curve, kind, arm, marks, number_)
        ends = [curve.along(kind)[-1] for curve in kept]
        for axes, title in zip(panels, ("training", "held-out"), strict=False):
            axes.set_xlabel(kind)
            if max(ends) > LOG_SPAN * min(ends):
                log_ticks(axes.xaxis)
                axes.set_xlim(left=CUT / 2 * min(ends))
            else:
                axes.xaxis.set_major_formatter(lambda value, _: units(value))
            axes.set_ylabel(f"{title} loss, nats")
            axes.spines[["top", "right"]].set_visible(False)
        _limit(panels[0], [curve.loss for curve in kept], [curve.high for curve in kept])
        if with_held_out:
            _limit(panels[1], [curve.held_out for curve in kept], [curve.held_high for curve in kept])

    rest = f" {len(kept)} of {len(curves)} points are shown; the CSV has all." if len(kept) < len(curves) else ""
    caption = f"Mean over seeds; band: least to greatest seed. Training loss is smoothed over 3 % of a run.{rest}"
    rows = [row for curve in curves for row in _rows(curve)]
    return Plot(f"curves_{kind}", f"Loss against {kind}", caption, rows, draw, arms, size=(9.0, 3.4), wide=True)


def _draw_training(axes, curve: Curve, kind: str, arm: Arm, marks: Marks, index: int) -> None:
    at = curve.along(kind)
    if len(curve.point.done) > 1:
        axes.fill_between(at, curve.low, curve.high, color=arm.colour, alpha=0.15, linewidth=0, **marks.arm(index))
    tip = f"{arm.label}: {curve.loss[-1]:.4f} at the end"
    axes.plot(at, curve.loss, arm.dashes, color=arm.colour, linewidth=1.2, **marks.arm(index, tip))


def _draw_held_out(axes, curve: Curve, kind: str, arm: Arm, marks: Marks, index: int) -> None:
    at = curve.along(kind, held_out=True)
    if len(curve.point.done) > 1 and len(at) > 1:
        low, high = curve.held_low, curve.held_high
        axes.fill_between(at, low, high, color=arm.colour, alpha=0.15, linewidth=0, **marks.arm(index))
    axes.plot(at, curve.held_out, arm.dashes, color=arm.colour, linewidth=1.2, **marks.arm(index))
    for place, value, tokens in zip(at, curve.held_out, curve.held_tokens, strict=True):
        tip = f"{arm.label}: {value:.4f} at {tokens:,.0f} tokens"
        axes.plot([place], [value], "o", color=arm.colour, markersize=3.5, **marks.arm(index, tip))


def _limit(axes, losses: Sequence[np.ndarray], highs: Sequence[np.ndarray]) -> None:
    """Cuts off the fall at the beginning, where there is one; all of the rest stays in sight."""
    tails = [loss[int(len(loss) * CUT) :] for loss in losses if len(loss)]
    tops = [high[int(len(high) * CUT) :] for high in highs if len(high)]
    low, high = (min(np.nanmin(tail) for tail in tails), max(np.nanmax(top) for top in tops)) if tails else (0, 0)
    if math.isfinite(low) and high > low:
        axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))


def _rows(curve: Curve) -> list[dict]:
    common = {"point": curve.point.label}
    trained = zip(curve.tokens, curve.along("FLOPs"), curve.seconds, curve.loss, curve.low, curve.high, strict=True)
    held = zip(curve.held_tokens, curve.along("FLOPs", held_out=True), curve.held_seconds, curve.held_out,
               curve.held_low, curve.held_high, strict=True)  # fmt: skip
    names = ("tokens", "flops", "seconds", "loss", "low", "high")
    return [
        common | {"set": kind} | dict(zip(names, map(float, values), strict=True))
        for kind, rows in (("training", trained), ("held out", held))
        for values in rows
    ]
