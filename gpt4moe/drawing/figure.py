"""Figures of a page: a size in, an empty figure of matplotlib out, and of a drawn one its inline SVG.

Text and axes are drawn in the page's own colour (`currentColor`) and fonts, so that one figure serves the light and
the dark page.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator

PALETTE = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#06b6d4", "#ca8a04", "#ec4899")
# Stands for the page's text colour until the SVG is written; no figure uses it otherwise.
INK = "#010203"


@dataclasses.dataclass(frozen=True)
class Chart:
    """One figure: its title, a sentence on how to read it, its SVG, whether it takes the page's width.

    foot: HTML under the picture.
    """

    title: str
    caption: str
    svg: str
    wide: bool = False
    foot: str = ""


@contextlib.contextmanager
def figure(name: str, size: tuple[float, float]) -> Iterator:
    """An empty figure under the page's style. Not through pyplot, whose backend and figures are the notebook's."""
    import matplotlib.figure  # here, for it takes longer to load than the rest of the command

    style = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    style |= {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9}
    style |= {"axes.grid": True, "grid.color": "#808080", "grid.alpha": 0.25, "grid.linewidth": 0.6}
    style |= {"lines.linewidth": 1.5, "lines.markersize": 4.5}
    style |= {"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"}
    with matplotlib.rc_context(style):
        yield matplotlib.figure.Figure(figsize=size, layout="constrained")


def svg(drawn) -> str:
    """A figure as SVG in the page's ink, font and width."""
    written = io.StringIO()
    drawn.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()[written.getvalue().index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # The page sets the font and the size; the viewBox keeps the proportions.
    text = re.sub(r"font-family: [^;]*; ?", "", text)
    return re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
