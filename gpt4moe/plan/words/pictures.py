"""The planner's figures: bars, swings and options in, a picture out; several make one PNG, each a chart of a page."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt4moe.config.check import require
from gpt4moe.drawing.figure import Chart, figure, svg
from gpt4moe.plan.money.expert_tradeoff import Option
from gpt4moe.plan.money.tornado import Swing
from gpt4moe.plan.training.waterfall import PEAK, Bar

GOOD, BAD, LESS, MORE = "#10b981", "#ef4444", "#3b82f6", "#f97316"
INCHES, DOTS_PER_INCH = (6.4, 3.8), 150
LEAST_SHARE = 1e-3


@dataclasses.dataclass(frozen=True)
class Picture:
    """One figure: its title, a sentence on how to read it, and `draw(axes)`, which fills a pair of axes."""

    title: str
    caption: str
    draw: Callable[[Any], None]


def waterfall_picture(bars: Sequence[Bar]) -> Picture:
    """From the peak of the chips down to what is delivered, a bar for each cause that takes a thousandth or more."""
    shown = [bar for bar in bars if abs(bar.share) >= LEAST_SHARE]

    def draw(axes) -> None:
        before = [1.0, *(bar.utilization for bar in shown[1:])]
        for place, (bar, above) in enumerate(zip(shown, [1.0, *before[:-1]], strict=True)):
            if bar.cause == PEAK:
                axes.bar(place, 1.0, color=GOOD)
                continue
            axes.bar(place, above - bar.utilization, bottom=bar.utilization, color=BAD)
            axes.text(place, bar.utilization - 0.02, f"{bar.utilization:.0%}", ha="center", va="top", fontsize=8)
        axes.bar(len(shown), shown[-1].utilization, color=GOOD)
        axes.text(len(shown), shown[-1].utilization + 0.02, f"{shown[-1].utilization:.0%}", ha="center", fontsize=8)
        names = [bar.cause.replace("_", " ") for bar in shown]
        axes.set_xticks(range(len(shown) + 1), [*names, "delivered"], rotation=40, ha="right")
        axes.set_ylim(0, 1.05)
        axes.set_ylabel("model FLOPs over the peak")

    return Picture(
        "From peak to delivered tokens", "Each red bar is what one cause takes of what was left before it.", draw
    )


def tornado_picture(swings: Sequence[Swing], change: float, result: str | None = None) -> Picture:
    """How far one result swings with each assumption; None: the last one, dollars of tokens."""
    names = list(swings[0].less)
    result = names[-1] if result is None else result
    require(result in names, "result", result, f"must be in {names}")
    shown = sorted((swing for swing in swings if swing.width(result) > LEAST_SHARE), key=lambda s: s.width(result))

    def draw(axes) -> None:
        for place, swing in enumerate(shown):
            axes.barh(place, 100 * swing.less[result], color=LESS, label=f"{change:.0%} less" if not place else None)
            axes.barh(place, 100 * swing.more[result], color=MORE, label=f"{change:.0%} more" if not place else None)
        axes.set_yticks(range(len(shown)), [swing.assumption.replace("_", " ") for swing in shown])
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set_xlabel(f"change of {result.replace('_', ' ')}, %")
        axes.legend(frameon=False, fontsize=8)

    caption = f"Each assumption is {change:.0%} less and {change:.0%} more, alone; longest bars matter most."
    return Picture(f"What moves {result.replace('_', ' ')}", caption, draw)


def experts_picture(options: Mapping[float, Sequence[Option]]) -> Picture:
    """Dollars to train and to serve for each number of experts; a line for each saving of training tokens."""

    def draw(axes) -> None:
        for saving, found in options.items():
            train = [option.train_dollars / 1e6 for option in found]
            serve = [option.serve_dollars_per_1k_tokens for option in found]
            axes.plot(train, serve, "o-", markersize=4, label=f"{saving:.0%} fewer tokens for each doubling")
            for option, x, y in zip(found, train, serve, strict=True):
                axes.annotate(str(option.num_experts), (x, y), textcoords="offset points", xytext=(5, 3), fontsize=8)
        axes.set(xscale="log", yscale="log", xlabel="to train to the same loss, million $")
        axes.set_ylabel("to generate 1,000 tokens, $")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.legend(frameon=False, fontsize=8)

    caption = (
        "Numbers are experts a layer. To the left is cheaper to train, down is cheaper to serve. What a doubling of "
        "the experts saves in training is a premise; that it makes serving dearer, with so many sequences in flight, "
        "is not."
    )
    return Picture("How many experts", caption, draw)


def write_png(pictures: Sequence[Picture], path: str) -> None:
    """Writes pictures side by side; raises `CallerError` for a file that is no .png or a folder that is not there."""
    file = writable(path, ".png")
    with figure("pictures", (INCHES[0] * len(pictures), INCHES[1])) as drawn:
        panels = drawn.subplots(1, len(pictures), squeeze=False)[0]
        for picture, axes in zip(pictures, panels, strict=True):
            picture.draw(axes)
            axes.set_title(picture.title, fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        drawn.savefig(file, dpi=DOTS_PER_INCH, facecolor="white")


def to_chart(picture: Picture) -> Chart:
    """Returns a picture as a chart of a page."""
    with figure(picture.title, INCHES) as drawn:
        axes = drawn.subplots()
        picture.draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        return Chart(picture.title, picture.caption, svg(drawn))


def writable(path: str, suffix: str) -> pathlib.Path:
    """Returns the file of this name; raises `CallerError` for another suffix or a folder that is not there."""
    file = pathlib.Path(path)
    require(file.suffix == suffix, "file", path, f"must end in {suffix}")
    require(file.parent.is_dir(), "file", path, "must lie in a folder that is there")
    return file
