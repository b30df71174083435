"""`report.html` of a run: one self-contained page made of the files in its work directory.

In: `metrics.jsonl`, and where they exist `evaluation.json` (`gpt4moe.train.evaluate`), `samples.json`
(`gpt4moe.infer.generate`), `config.gin` and `environment.json`; the charts that need the model are handed in. Out:
`report.html` beside them, without any reference to the network.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import json

import numpy as np
from etils import epath

from gpt4moe.analysis.figures import expert_figures, run_figures
from gpt4moe.analysis.history import History, read_history, read_json, read_text
from gpt4moe.analysis.routing import dead_experts
from gpt4moe.drawing.figure import Chart
from gpt4moe.drawing.page import charts, details, page, tiles

# Columns of the table of held-out text: title, dotted key of `evaluation.json`, format.
HELD_OUT = (
    ("loss, nats", "loss", ".3f"),
    ("unigram, nats", "unigram_loss", ".3f"),
    ("bits per byte", "bits_per_byte", ".3f"),
    ("unigram, bits per byte", "unigram_bits_per_byte", ".3f"),
    ("tokens", "tokens", ",d"),
)
OF_IMAGES = (
    ("loss without images, nats", "loss_without_image", ".3f"),
    ("characters read wrongly", "read.character_error_rate", ".1%"),
    ("read exactly", "read.exact_match", ".1%"),
    ("wrongly without images", "read.character_error_rate_without_image", ".1%"),
    ("exactly without images", "read.exact_match_without_image", ".1%"),
)
BY_ENCODER = (("wrongly by the encoder alone", "read.character_error_rate_spelled", ".1%"),)


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the page shows of the choices of tokens: charts, the HTML of tables, whether there is a coloured text."""

    charts: tuple[Chart, ...]
    tables: str
    has_page: bool


def write_report(workdir: str | epath.Path, choices: Choices | None = None, reading: str = "") -> epath.Path:
    """Writes `report.html` into `workdir` (local or object store) and returns its path.

    `reading`: HTML of what was read and where the model looked. Raises `ValueError` where the directory holds no run.
    """
    history = read_history(workdir)
    evaluation = read_json(workdir, "evaluation.json")
    parts = [
        f'<div class="tiles">{_tiles(history)}</div>',
        _evaluation(evaluation),
        charts(run_figures(history, evaluation)),
        _experts(expert_figures(history), choices),
        reading,
        _samples(read_json(workdir, "samples.json")),
        details("Configuration", read_text(workdir, "config.gin")),
        details("Environment", _pretty(read_json(workdir, "environment.json"))),
    ]
    path = epath.Path(workdir) / "report.html"
    path.write_text(page(f"gpt4moe: {epath.Path(workdir).name}", parts))
    return path


def _experts(logged: list[Chart], choices: Choices | None) -> str:
    if choices is None:
        note = "<code>gpt4moe report</code> adds what held-out text shows: saturation, co-activation, specialisation."
        return f"<h2>Experts</h2><p>{note}</p>{charts(logged)}" if logged else ""
    link = '<p><a href="experts.html">Text coloured by expert</a></p>' if choices.has_page else ""
    return f"<h2>Experts</h2>{link}{charts([*logged, *choices.charts])}{choices.tables}"


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
    return tiles(shown) or "<p>No step has been logged yet.</p>"


def _evaluation(evaluation: dict | None) -> str:
    if not evaluation:
        return ""
    sets = evaluation["sets"]
    columns = HELD_OUT + (OF_IMAGES if any("read" in result for result in sets.values()) else ())
    spells = any(_field(result, BY_ENCODER[0][1]) is not None for result in sets.values())
    columns += BY_ENCODER if spells else ()
    rows = [
        [html.escape(source), *(_number(_field(result, key), form) or "" for _, key, form in columns)]
        for source, result in sets.items()
    ]
    head = "".join(f"<th>{title}</th>" for title in ("source", *(title for title, *_ in columns)))
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    note = "Unigram: what the token frequencies of the training text reach, without looking at the context."
    return (
        f"<h2>Held-out text, step {evaluation['step']:,d}</h2>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div><p>{note}</p>'
    )


def _field(result: dict, key: str) -> float | None:
    """The value of a dotted key, None where there is none."""
    return functools.reduce(lambda found, name: (found or {}).get(name), key.split("."), result)


def _samples(samples: list[dict] | None) -> str:
    if not samples:
        return ""
    shown = [
        f'<pre class="sample"><b>{html.escape(sample["prompt"])}</b>{html.escape(sample["text"])}</pre>'
        for sample in samples
    ]
    return "<h2>Samples</h2><p>The prompt in bold, then what the model wrote.</p>" + "".join(shown)


def _pretty(document: dict | None) -> str | None:
    return json.dumps(document, indent=2) if document else None


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(int(value) if form.endswith("d") else value, form)


def _mean(value: float | list | None) -> float | None:
    """Mean over layers; not a number where one of them is null."""
    return None if value is None else float(np.mean(np.array(value, np.float64)))
