"""`report.html` of a sweep: one self-contained page, and every figure as PNG and CSV in `figures/` beside it.

In: `results.json`, `manifest.json` and `runs/ID/metrics.jsonl` as `gpt4moe sweep` leaves them. A figure is drawn where
the axes and columns of the sweep give it a meaning. `figures/summary.json` holds what was fitted.
"""

from __future__ import annotations

import collections
import dataclasses
import html
import json
import math
import pathlib

from gpt4moe.analysis.scaling import FitConfig
from gpt4moe.analysis.sweeps.costs import cost_plots
from gpt4moe.analysis.sweeps.curves import Curve, curve_plots, read_curves
from gpt4moe.analysis.sweeps.drawing import FIGURES, Plot, write_csv, write_plot
from gpt4moe.analysis.sweeps.experts_law import expert_law_plots
from gpt4moe.analysis.sweeps.final import final_plots
from gpt4moe.analysis.sweeps.granularity import granularity_plots
from gpt4moe.analysis.sweeps.isoflop import isoflop_plots
from gpt4moe.analysis.sweeps.repeats import repeat_plots
from gpt4moe.analysis.sweeps.routing import layer_plots, load_plots, source_plots
from gpt4moe.analysis.sweeps.sparsity import sparsity_plots
from gpt4moe.analysis.sweeps.table import Sweep, read_sweep
from gpt4moe.analysis.sweeps.tables import cell_rows, point_rows, table
from gpt4moe.drawing.page import charts, page, tiles

PAGE = "report.html"
# Of the fits, so that a report takes seconds.
POLISHED, REPLICATES = 8, 100
FORMS = {"mean": ".4f", "standard error": ".4f", "to the first": "+.4f", "in standard errors": "+.1f"}
FORMS |= {"to the best": "+.4f", "in its standard errors": "+.1f", "share of tokens to match the first": ".0%"}
FORMS |= {
    "diverged": ".0f",
    "loss spikes": ".0f",
    "skipped steps": ".0f",
    "held_out_loss": ".4f",
    "loss": ".4f",
    "model_flops_utilization": ".1%",
}


def write_sweep_report(folder: str | pathlib.Path, config: FitConfig | None = None) -> pathlib.Path:
    """Writes the report of the sweep in `folder` and returns its path; `config`: how laws are fitted.

    Raises `ValueError` in one line where the folder holds no results.
    """
    sweep = read_sweep(folder)
    (sweep.folder / FIGURES).mkdir(exist_ok=True)
    config = config or FitConfig(polished=POLISHED, replicates=REPLICATES)
    curves = read_curves(sweep)
    sections = {name: plots for name, plots in _sections(sweep, curves, config).items() if plots}
    points = point_rows(sweep, curves)
    write_csv(sweep.folder / FIGURES / "points.csv", points)
    facts = {plot.name: plot.facts for plots in sections.values() for plot in plots if plot.facts}
    document = {"metric": sweep.metric, "noise": sweep.noise, "points": points, "fits": facts}
    (sweep.folder / FIGURES / "summary.json").write_text(json.dumps(_strict(document), indent=1) + "\n")
    parts = [f'<div class="tiles">{_tiles(sweep)}</div>', _summary(points)]
    named = collections.Counter()
    for name, plots in sections.items():
        drawn = [write_plot(_named_once(plot, named), sweep.folder) for plot in plots]
        parts.append(f"<h2>{html.escape(name)}</h2>{charts(drawn)}")
    parts.append(_cells(sweep))
    path = sweep.folder / PAGE
    path.write_text(page(f"gpt4moe: {sweep.folder.resolve().name}", parts, style=STYLE, script=SCRIPT))
    return path


def _sections(sweep: Sweep, curves: list[Curve], config: FitConfig | None) -> dict[str, list[Plot]]:
    trained = frozenset(source for curve in curves for source in curve.epochs)
    return {
        "Final loss": final_plots(sweep),
        "Laws": [
            *expert_law_plots(sweep, config),
            *granularity_plots(sweep),
            *sparsity_plots(sweep),
            *isoflop_plots(sweep),
            *repeat_plots(sweep, curves, config),
        ],
        "Training": curve_plots(sweep, curves),
        "Costs": cost_plots(sweep),
        "Sources": source_plots(sweep, trained),
        "Experts": [*load_plots(sweep), *layer_plots(sweep)],
    }


def _named_once(plot: Plot, named: collections.Counter[str]) -> Plot:
    """The plot under a file name of its own: names of axes are shown without their modules, and two may be alike."""
    named[plot.name] += 1
    return plot if named[plot.name] == 1 else dataclasses.replace(plot, name=f"{plot.name}_{named[plot.name]}")


def _tiles(sweep: Sweep) -> str:
    """The sweep in a row of numbers."""
    states = collections.Counter(str(row.get("state")) for row in sweep.rows)
    best = min(sweep.measured, key=lambda point: point.mean(sweep.metric), default=None)
    at = f", at {html.escape(best.label)}" if best and best.label else ""
    found = {
        "runs": f"{len(sweep.rows):,d}",
        **{html.escape(state): f"{count:,d}" for state, count in sorted(states.items())},
        "points": f"{len(sweep.points):,d}",
        "seeds": f"{len({row['seed'] for row in sweep.rows}):,d}",
        f"least {sweep.metric_label}{at}": f"{best.mean(sweep.metric):.4f}" if best else None,
        "deviation between seeds": f"{sweep.noise:.4f}" if math.isfinite(sweep.noise) else None,
    }
    return tiles(found)


def _summary(points: list[dict]) -> str:
    if not points:
        return "<p>No run is done yet.</p>"
    note = (
        "Means over the seeds that are done. Differences are taken seed by seed and counted in their standard errors, "
        "from what points and seeds leave unexplained in the whole sweep. Share of tokens to match: that of the first "
        "point's tokens from which on the training loss stays below what the first point ends with. A click on a title "
        "sorts."
    )
    return f"<h2>Points</h2>{table(points, forms=FORMS)}<p>{note}</p>"


def _cells(sweep: Sweep) -> str:
    note = "A run by itself: <code>gpt4moe report --workdir=DIR/runs/ID</code>"
    return f"<h2>Runs</h2>{table(cell_rows(sweep), forms=FORMS)}<p>{note}</p>"


def _strict(value):
    """The document with None for what is not a number, as JSON has none."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


STYLE = """\
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; margin-top: 6px }
.legend label { display: inline-flex; align-items: center; gap: 5px; cursor: pointer }
.legend input { margin: 0; accent-color: var(--quiet) }
.legend i { width: 18px; height: 3px; border-radius: 2px }
.legend i.dashed { mask: repeating-linear-gradient(90deg, #000 0 4px, #0000 4px 7px) }
.files a { margin-right: 8px } .off { display: none }
.tiles span { overflow-wrap: anywhere } .scroll:has(.sortable) { max-height: 560px; overflow: auto }
.sortable thead { position: sticky; top: 0; background: var(--card) }
.sortable th { white-space: normal; vertical-align: bottom }
.sortable { font-size: 13px } .sortable th, .sortable td { padding: 5px 10px }
.sortable button { all: unset; cursor: pointer } .sortable button:focus-visible { outline: 2px solid }
.sortable th[aria-sort=ascending] button::after { content: " ↑" }
.sortable th[aria-sort=descending] button::after { content: " ↓" }
.failed td { color: #c2410c } .words { white-space: normal; min-width: 260px; text-align: left }
"""

SCRIPT = """
for (const box of document.querySelectorAll("[data-arm]")) box.addEventListener("change", () => {
  for (const mark of box.closest("figure").querySelectorAll("svg ." + box.dataset.arm))
    mark.classList.toggle("off", !box.checked);
});
for (const button of document.querySelectorAll(".sortable th button")) button.addEventListener("click", () => {
  const title = button.parentElement, body = title.closest("table").tBodies[0], column = title.cellIndex;
  const up = title.getAttribute("aria-sort") !== "ascending";
  for (const other of title.parentElement.children) other.removeAttribute("aria-sort");
  title.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
  };
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const apart = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return up ? apart : -apart;
  };
  body.append(...[...body.rows].sort(order));
});
"""
