"""The audit as one self-contained HTML page: rows of the audit and figures in, a file out."""

from __future__ import annotations

import html
from collections.abc import Sequence

from gpt4moe.accounting.shape import Shape
from gpt4moe.plan import decode_price, expert_tradeoff, goodput, pictures, tornado, waterfall, what_if
from gpt4moe.plan.article import Row, short
from gpt4moe.plan.pictures import Picture
from gpt4moe.plan.premises import Premises
from gpt4moe.plan.step_breakdown import Division, break_down
from gpt4moe.plan.training_job import TrainingJob

COUNTS = (2, 4, 8, 16, 32, 64, 128)
SAVINGS = (0.0, 0.1, expert_tradeoff.SWITCH_SAVING)
CHANGE = 0.2
# What a save blocks and a restart takes on a job of that size; the failure rate is that of Llama 3.
SAVE_SECONDS, RESTART_SECONDS = 60, 600
STYLE = """\
:root { color-scheme: light; --ink: #1c2430; --quiet: #5d6b7e; --edge: #dde2ea }
body { margin: 0 auto; max-width: 1080px; padding: 20px 16px 48px; color: var(--ink); background: #f6f7f9;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
p, figcaption, small { color: var(--quiet); font-size: 13px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 12px }
figure, table { background: #fff; border: 1px solid var(--edge); border-radius: 8px; margin: 0 }
figure { padding: 14px } figure svg { width: 100%; height: auto } .scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; margin-top: 16px; font-variant-numeric: tabular-nums }
th, td { padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--edge); vertical-align: top }
th:nth-child(2), td:nth-child(2) { text-align: left } td:last-child { text-align: left; white-space: nowrap }
.INCONSISTENT, .UNIT-ERROR { color: #b91c1c } .LOOSE, .ROUNDED { color: #b45309 } .OK { color: #047857 }
"""


def write_report(rows: Sequence[Row], premises: Premises, shape: Shape, path: str) -> None:
    """Writes the audit with its figures; raises `CallerError` where the file cannot be."""
    file = pictures.writable(path, ".html")
    drawn = [_figure(picture) for picture in figures(premises, shape)]
    title = "The reference article, audited"
    body = "\n".join(
        [
            f"<h1>{title}</h1>",
            f"<p>{len(rows)} claims of GPT-4 Architecture, Infrastructure, Training Dataset, Costs, Vision, MoE "
            f"(SemiAnalysis, July 2023); {html.escape(_counts(rows))}. "
            "Made by <code>gpt4moe plan article --report</code>.</p>",
            f'<div class="charts">{"".join(drawn)}</div>',
            _table(rows),
        ]
    )
    head = f'<meta charset="utf-8"><title>{title}</title><style>\n{STYLE}</style>'
    file.write_text(f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n')


def figures(premises: Premises, shape: Shape) -> list[Picture]:
    """Returns the waterfall of the article's training run, what moves its days and its price, and its experts."""
    chip = premises.chip
    division = Division(premises.gpus, premises.tensor, premises.stages)
    step = break_down(shape, chip, division, premises.batch_tokens, int(premises.context_tokens), "full", 1.1)
    mtbf_hours = goodput.observed_chip_mtbf_hours(goodput.LLAMA3_FAILURES, goodput.LLAMA3_CHIPS, goodput.LLAMA3_DAYS)
    middle = (premises.mfu_low_percent + premises.mfu_high_percent) / 200
    job = TrainingJob(
        shape, chip, premises.gpus, premises.training_tokens, middle, premises.dollars_per_gpu_hour, mtbf_hours,
        SAVE_SECONDS, RESTART_SECONDS,
    )  # fmt: skip
    cluster = decode_price.Cluster(
        chip, premises.inference_tensor, premises.inference_stages, premises.dollars_per_gpu_hour, premises.weight_bytes
    )
    sequences = premises.inference_batch
    assumptions = what_if.assumptions_of(job, cluster, sequences)
    swings = tornado.tornado(what_if.results_of(job, cluster), assumptions, CHANGE)
    counts = [count for count in COUNTS if count >= shape.experts_per_token] if shape.num_moe_layers else []
    options = {
        saving: expert_tradeoff.options(shape, counts, cluster, sequences, job.dollars, saving) for saving in SAVINGS
    }
    found = [
        pictures.waterfall_picture(waterfall.waterfall(step.ideal_seconds, step.lost_seconds, job.goodput)),
        pictures.tornado_picture(swings, CHANGE, "dollars"),
        pictures.tornado_picture(swings, CHANGE, "dollars_per_1k_tokens"),
    ]
    return [*found, pictures.experts_picture(options)] if counts else found


def _figure(picture: Picture) -> str:
    title, caption = html.escape(picture.title), html.escape(picture.caption)
    return f"<figure><h3>{title}</h3>{pictures.to_svg(picture)}<figcaption>{caption}</figcaption></figure>"


def _table(rows: Sequence[Row]) -> str:
    names = ("#", "claim", "article", "unit", "computed", "difference", "verdict")
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(map(_row, rows))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(row: Row) -> str:
    difference = "" if row.relative_difference is None else f"{row.relative_difference:+.1%}"
    moved = f"moved from {short(row.moved['computed'])}, {row.moved['verdict']}" if row.moved else ""
    below = "".join(f"<br><small>{html.escape(text)}</small>" for text in (row.formula, row.note, moved) if text)
    cells = [
        str(row.id),
        html.escape(row.claim) + below,
        html.escape(short(row.value)),
        html.escape(row.unit),
        short(row.computed),
        difference,
    ]
    shown = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr>{shown}<td class="{row.verdict}">{row.verdict}</td></tr>'


def _counts(rows: Sequence[Row]) -> str:
    verdicts = [row.verdict for row in rows]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
