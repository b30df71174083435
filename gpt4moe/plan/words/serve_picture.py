"""The frontier of `gpt4moe plan serve` as a picture: dollars of a thousand tokens against a user's tokens a second."""

from __future__ import annotations

import os
import pathlib

from gpt4moe.config.check import require

READERS = ((250 * 2 / 60, "250 words/min"), (1000 * 2 / 60, "1,000 words/min"))
MARKERS = {"bfloat16": "o", "int8": "s", "fp8": "^"}


def draw_frontier(document: dict, path: str | os.PathLike) -> str:
    """Writes the picture and returns its path; a point's colour is its chips, its mark the weights' format."""
    folder = pathlib.Path(path).absolute().parent
    require(folder.is_dir(), "plot", str(path), "is in a folder that is not there", "make the folder first")
    known = pathlib.Path(path).suffix in (".png", ".svg", ".pdf")
    require(known, "plot", str(path), "must end in .png, .svg or .pdf")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = document["frontier"]
    chips = [row["chips"] for row in rows]
    colours = Normalize(min(chips), max(max(chips), min(chips) + 1))
    for weights, marker in MARKERS.items():
        mine = [row for row in rows if row["weights"] == weights]
        if not mine:
            continue
        speeds, dollars = ([row[key] for row in mine] for key in ("user_tokens_per_second", "dollars_per_1k_tokens"))
        colour = [row["chips"] for row in mine]
        points = axes.scatter(speeds, dollars, c=colour, norm=colours, marker=marker, label=weights, s=30)
    figure.colorbar(points, label="chips of a replica")
    for speed, reader in READERS:
        axes.axvline(speed, color="0.7", linewidth=1)
        axes.text(speed, 0.98, reader, rotation=90, va="top", ha="right", transform=axes.get_xaxis_transform(), size=8)
    axes.set(xscale="log", yscale="log", xlabel="tokens a second of one user", ylabel="dollars per 1,000 tokens")
    axes.set_title(f"{document['shape']} on {document['chip']}, context {document['context']:,}", size=10)
    axes.legend(title="weights")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return str(path)
