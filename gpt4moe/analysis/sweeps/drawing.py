"""One figure of a sweep: what is drawn and its numbers in; an interactive SVG, a PNG and a CSV out."""

from __future__ import annotations

import csv
import dataclasses
import html
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpt4moe.analysis.canvas import depth_colours
from gpt4moe.analysis.sweeps.table import Axis, units
from gpt4moe.drawing.figure import PALETTE, Chart, figure, svg

FIGURES = "figures"
DOTS_PER_INCH = 150
# More lines than these in one picture cannot be told apart.
MAX_ARMS = 16
# So many letters go below a picture of half the page's width.
LETTERS = 60
DASHES = ("-", "--", ":", "-.")


@dataclasses.dataclass(frozen=True)
class Arm:
    """What one legend entry stands for: its name, its colour, and dashes where colours repeat."""

    label: str
    colour: str
    dashes: str = "-"


class Marks:
    """Gives what is drawn its arm, by which the page hides it, and the text that shows above it."""

    def __init__(self):
        self.tips: list[str] = []

    def arm(self, number: int, tip: str = "") -> dict[str, str]:
        """Keywords for an artist of matplotlib."""
        self.tips.append(tip)
        return {"gid": f"arm{number}-tip{len(self.tips) - 1}"}

    def applied(self, drawn: str) -> str:
        """The SVG with ids made classes and titles, so that figures on one page do not share ids."""

        def marked(match: re.Match) -> str:
            tip = self.tips[int(match[2])]
            title = f"<title>{html.escape(tip)}</title>" if tip else ""
            return f'<g class="arm{match[1]}">{title}'

        return re.sub(r'<g id="arm(-?\d+)-tip(\d+)">', marked, drawn)


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure: file name, title, how to read it, its numbers one row each, how it is drawn, the arms of its legend.

    draw: fills a matplotlib figure, and gives artists `marks.arm(index of the arm)`. facts: what `summary.json` says.
    """

    name: str
    title: str
    caption: str
    rows: Sequence[dict[str, Any]]
    draw: Callable[[Any, Marks], None]
    arms: Sequence[Arm] = ()
    size: tuple[float, float] = (5.4, 3.4)
    wide: bool = False
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def write_plot(plot: Plot, folder: pathlib.Path) -> Chart:
    """Writes `figures/NAME.png` and `figures/NAME.csv` in `folder`, and returns the chart of the page."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", plot.name)
    (folder / FIGURES).mkdir(exist_ok=True)
    marks = Marks()
    with figure(name, plot.size) as drawn:
        plot.draw(drawn, marks)
        text = marks.applied(svg(drawn))
        if len(plot.arms) > 1:
            _legend(drawn, plot)
        drawn.savefig(folder / FIGURES / f"{name}.png", dpi=DOTS_PER_INCH, facecolor="white")
    write_csv(folder / FIGURES / f"{name}.csv", plot.rows)
    files = " ".join(f'<a href="{FIGURES}/{name}.{kind}">{kind.upper()}</a>' for kind in ("png", "csv"))
    foot = f'{_switches(plot.arms)}<p class="files">{files}</p>'
    return Chart(plot.title, plot.caption, text, plot.wide, foot)


def write_csv(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows under all their columns; what a row lacks stays empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def arms_of(labels: Sequence[str], *, ordered: bool = False) -> list[Arm]:
    """An arm for each label: colours along a scale where they are `ordered` by a number, else apart from each other."""
    if ordered and len(labels) > 1:
        return [Arm(label, colour) for label, colour in zip(labels, depth_colours(len(labels)), strict=True)]
    return [
        Arm(label, PALETTE[index % len(PALETTE)], DASHES[index // len(PALETTE) % len(DASHES)])
        for index, label in enumerate(labels)
    ]


def arms_at(axes: Sequence[Axis], places: Sequence[tuple[int, ...]], labels: Sequence[str]) -> list[Arm]:
    """An arm for each place on these axes: of two, the one with more values gives colours, the other dashes."""
    if len(axes) != 2 or min(map(len, axes)) > len(DASHES):
        return arms_of(labels, ordered=len(axes) == 1 and axes[0].numeric)
    coloured = 0 if len(axes[0]) >= len(axes[1]) and len(axes[1]) <= len(DASHES) else 1
    axis = axes[coloured]
    colours = depth_colours(len(axis)) if axis.numeric else [PALETTE[at % len(PALETTE)] for at in range(len(axis))]
    return [
        Arm(label, colours[place[coloured]], DASHES[place[1 - coloured]])
        for place, label in zip(places, labels, strict=True)
    ]


def place_ticks(axes, axis: Axis) -> None:
    """Ticks at the values of a swept axis, on its scale, where there is room for them."""
    axes.set_xlabel(axis.title)
    places = np.log2(axis.at) if axis.log else np.array(axis.at)
    letters = LETTERS * np.diff(places).min() / np.ptp(places)
    longest = max(map(len, axis.labels))
    if axis.log:
        axes.set_xscale("log", base=2)
    if not axis.numeric or longest < letters:
        labels = [label if len(label) < 18 else label[:17] + "…" for label in axis.labels]
        axes.set_xticks(axis.at, labels, rotation=0 if longest < letters else 30)
        axes.set_xticks([], minor=True)
    elif axis.log:
        log_ticks(axes.xaxis)
    else:
        axes.xaxis.set_major_formatter(lambda value, _: units(value))


def log_ticks(side) -> None:
    """A logarithmic axis of counts: labels at 1, of short ones at 2 and 5 too of every ten."""

    def minor(value: float, _) -> str:
        low, high = side.get_view_interval()
        return units(value) if f"{value:.0e}"[0] in "25" and high < 200 * low else ""

    side.axes.set_xscale("log")
    side.set_major_formatter(lambda value, _: units(value))
    side.set_minor_formatter(minor)


def _switches(arms: Sequence[Arm]) -> str:
    """The legend, which hides and shows its lines."""
    if len(arms) < 2:
        return ""
    boxes = [
        f'<label><input type="checkbox" checked data-arm="arm{index}"><i style="background:{arm.colour}"'
        f"{' class=dashed' if arm.dashes != '-' else ''}></i>{html.escape(arm.label)}</label>"
        for index, arm in enumerate(arms)
    ]
    return f'<div class="legend">{"".join(boxes)}</div>'


def _legend(drawn, plot: Plot) -> None:
    """The legend of the PNG, which has no page to show one."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=arm.colour, linestyle=arm.dashes, label=arm.label) for arm in plot.arms]
    longest = max(len(arm.label) for arm in plot.arms)
    columns = max(int(plot.size[0] * 13 / (longest + 7)), 1)
    drawn.set_size_inches(plot.size[0], plot.size[1] + 0.17 * -(-len(handles) // columns))
    drawn.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=8, frameon=False)
