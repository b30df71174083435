"""`report.html` of a run: one self-contained page made of the files in its work directory.

In: `metrics.jsonl`, and where they exist `evaluation.json` (`gpt4moe.train.evaluate`), `samples.json`
(`gpt4moe.infer.generate`), `config.gin` and `environment.json`; the charts that need the model are handed in. Out:
`report.html` beside them, without any reference to the network.
"""

from __future__ import annotations

import dataclasses
import html
import json
import string

import numpy as np
from etils import epath

from gpt4moe.analysis.canvas import Chart
from gpt4moe.analysis.figures import expert_figures, run_figures
from gpt4moe.analysis.history import History, read_history, read_json, read_text
from gpt4moe.analysis.routing import dead_experts


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the page shows of the choices of tokens: charts, the HTML of tables, whether there is a coloured text."""

    charts: tuple[Chart, ...]
    tables: str
    has_page: bool


def write_report(workdir: str | epath.Path, choices: Choices | None = None) -> epath.Path:
    """Writes `report.html` into `workdir` (local or object store) and returns its path.

    Raises `ValueError` where the directory holds no run.
    """
    history = read_history(workdir)
    evaluation = read_json(workdir, "evaluation.json")
    page = PAGE.substitute(
        title=html.escape(f"gpt4moe: {epath.Path(workdir).name}"),
        tiles=_tiles(history),
        evaluation=_evaluation(evaluation),
        charts=_charts(run_figures(history, evaluation)),
        experts=_experts(expert_figures(history), choices),
        samples=_samples(read_json(workdir, "samples.json")),
        configuration=_details("Configuration", read_text(workdir, "config.gin")),
        environment=_details("Environment", _pretty(read_json(workdir, "environment.json"))),
    )
    path = epath.Path(workdir) / "report.html"
    path.write_text(page)
    return path


def _experts(logged: list[Chart], choices: Choices | None) -> str:
    if choices is None:
        note = "<code>gpt4moe report</code> adds what held-out text shows: saturation, co-activation, specialisation."
        return f"<h2>Experts</h2><p>{note}</p>{_charts(logged)}" if logged else ""
    link = '<p><a href="experts.html">Text coloured by expert</a></p>' if choices.has_page else ""
    return f"<h2>Experts</h2>{link}{_charts([*logged, *choices.charts])}{choices.tables}"


def _tiles(history: History) -> str:
    """The run in a row of numbers."""
    load_LE = np.array(history.last("moe/load") or [[]], np.float64)
    relative_LE = load_LE * load_LE.shape[-1]
    shown = {
        "steps": _number(history.last("step"), ",d"),
        "tokens": _number(history.last("tokens"), ",d"),
        "training loss, nats": _number(history.last("loss"), ".3f"),
        "tokens/s, median": _number(history.median("tokens_per_second"), ",.0f"),
        "MFU, median": _number(history.median("model_flops_utilization"), ".1%"),
        "goodput": _number(history.last("goodput"), ".1%"),
        "expert load / mean": f"{relative_LE.min():.2f} to {relative_LE.max():.2f}" if load_LE.size else None,
        "dead experts": f"{dead_experts(load_LE).sum():d}" if load_LE.size else None,
        "dropped assignments": _number(_mean(history.last("moe/dropped_fraction")), ".2%"),
        "skipped steps": _number(history.last("skipped_steps"), ",.0f"),
    }
    tiles = [f"<div><b>{value}</b><span>{name}</span></div>" for name, value in shown.items() if value is not None]
    return "".join(tiles) or "<p>No step has been logged yet.</p>"


def _evaluation(evaluation: dict | None) -> str:
    if not evaluation:
        return ""
    titles = ("source", "loss, nats", "unigram, nats", "bits per byte", "unigram, bits per byte", "tokens")
    keys = ("loss", "unigram_loss", "bits_per_byte", "unigram_bits_per_byte", "tokens")
    rows = [
        [html.escape(source)] + [_number(result.get(key), ",d" if key == "tokens" else ".3f") or "" for key in keys]
        for source, result in evaluation["sets"].items()
    ]
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    note = "Unigram: what the token frequencies of the training text reach, without looking at the context."
    return (
        f"<h2>Held-out text, step {evaluation['step']:,d}</h2>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div><p>{note}</p>'
    )


def _charts(charts: list[Chart]) -> str:
    return f'<div class="charts">{"".join(map(_chart, charts))}</div>'


def _chart(chart: Chart) -> str:
    return (
        f'<figure class="{"wide" if chart.wide else "half"}"><h3>{html.escape(chart.title)}</h3>'
        f'<div class="scroll">{chart.svg}</div><figcaption>{html.escape(chart.caption)}</figcaption></figure>'
    )


def _samples(samples: list[dict] | None) -> str:
    if not samples:
        return ""
    shown = [
        f'<pre class="sample"><b>{html.escape(sample["prompt"])}</b>{html.escape(sample["text"])}</pre>'
        for sample in samples
    ]
    return "<h2>Samples</h2><p>The prompt in bold, then what the model wrote.</p>" + "".join(shown)


def _details(title: str, text: str | None) -> str:
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>" if text else ""


def _pretty(document: dict | None) -> str | None:
    return json.dumps(document, indent=2) if document else None


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(int(value) if form.endswith("d") else value, form)


def _mean(value: float | list | None) -> float | None:
    """Mean over layers; not a number where one of them is null."""
    return None if value is None else float(np.mean(np.array(value, np.float64)))


PAGE = string.Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
:root { color-scheme: light dark; --ink: #1c2430; --quiet: #5d6b7e; --page: #f6f7f9; --card: #fff; --edge: #dde2ea }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ef; --quiet: #94a3b8; --page: #10151c; --card: #182029; --edge: #2b3644 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1080px; padding: 20px 16px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 24px; margin: 8px 0 16px; overflow-wrap: anywhere } h2 { font-size: 18px; margin: 32px 0 8px }
h3 { font-size: 15px; margin: 0 0 6px } p, figcaption { color: var(--quiet); font-size: 13px; margin: 6px 0 0 }
.tiles, .charts { display: grid; gap: 12px }
.tiles { grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)) }
.charts { grid-template-columns: repeat(2, minmax(0, 1fr)); margin-top: 12px }
.tiles div, figure, .scroll > table, pre { background: var(--card); border: 1px solid var(--edge); border-radius: 8px }
.tiles div { padding: 10px 14px } .tiles b { display: block; font-size: 19px; font-variant-numeric: tabular-nums }
.tiles span { color: var(--quiet); font-size: 12px }
figure { margin: 0; padding: 14px; min-width: 0 } figure.wide { grid-column: 1 / -1 }
figure svg { display: block; width: 100%; height: auto; color: var(--ink) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: 7px 14px; text-align: right; border-bottom: 1px solid var(--edge) }
th:first-child, td:first-child { text-align: left } th { font-size: 13px; color: var(--quiet); font-weight: 600 }
tbody tr:last-child td { border-bottom: 0 }
pre { padding: 12px 14px; overflow-x: auto; font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; margin: 8px 0 }
pre.sample { white-space: pre-wrap; overflow-wrap: anywhere }
.vocabulary { white-space: normal } .vocabulary td:last-child { text-align: left; line-height: 2 }
.token { white-space: nowrap; margin-right: 14px; color: var(--quiet); font-size: 12px }
.token code { color: var(--ink); background: var(--page); border: 1px solid var(--edge); border-radius: 4px }
a { color: inherit } details { margin-top: 16px } summary { cursor: pointer; font-weight: 600 }
@media (max-width: 720px) { .charts { grid-template-columns: minmax(0, 1fr) } .wide svg { min-width: 640px } }
</style></head><body>
<h1>$title</h1>
<div class="tiles">$tiles</div>
$evaluation
$charts
$experts
$samples
$configuration
$environment
</body></html>
""")
