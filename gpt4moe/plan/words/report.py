"""The audit as one self-contained HTML page: rows of the audit and figures in, a file out."""

from __future__ import annotations

import html
from collections.abc import Sequence

from gpt4moe.accounting.shape import Shape
from gpt4moe.drawing.page import charts, page
from gpt4moe.plan.article.audit import Row
from gpt4moe.plan.article.premises import Premises
from gpt4moe.plan.money import expert_tradeoff, goodput, tornado
from gpt4moe.plan.money.training_job import TrainingJob
from gpt4moe.plan.serving.cost import Demand
from gpt4moe.plan.training import waterfall
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.step_losses import step_losses, whole_batch
from gpt4moe.plan.words import pictures, what_if
from gpt4moe.plan.words.article import short
from gpt4moe.plan.words.pictures import Picture

COUNTS = (2, 4, 8, 16, 32, 64, 128)
SAVINGS = (0.0, 0.1, expert_tradeoff.SWITCH_SAVING)
CHANGE = 0.2
# What a save blocks and a restart takes on a job of that size; the failure rate is that of Llama 3.
SAVE_SECONDS, RESTART_SECONDS = 60, 600
STYLE = """\
table { margin-top: 16px } td { vertical-align: top }
th:nth-child(2), td:nth-child(2) { text-align: left; white-space: normal } td:last-child { text-align: left }
td small { color: var(--quiet) }
td.INCONSISTENT, td.UNIT-ERROR { color: #ef4444 } td.LOOSE, td.ROUNDED { color: #d97706 }
td.OK { color: #10b981 }
"""


def write_report(rows: Sequence[Row], premises: Premises, shape: Shape, path: str) -> None:
    """Writes the audit with its figures; raises `CallerError` where the file cannot be."""
    file = pictures.writable(path, ".html")
    said = (
        f"<p>{len(rows)} claims of GPT-4 Architecture, Infrastructure, Training Dataset, Costs, Vision, MoE "
        f"(SemiAnalysis, July 2023); {html.escape(_counts(rows))}. "
        "Made by <code>gpt4moe plan article --report</code>.</p>"
    )
    drawn = charts([pictures.to_chart(picture) for picture in figures(premises, shape)])
    file.write_text(page("The reference article, audited", [said, drawn, _table(rows)], style=STYLE), encoding="utf-8")


def figures(premises: Premises, shape: Shape) -> list[Picture]:
    """Returns the waterfall of the article's training run, what moves its days and its price, and its experts."""
    chip = premises.chip
    layout, length = _layout(premises, shape), int(premises.context_tokens)
    batch = whole_batch(layout, premises.batch_tokens, length)
    step = step_losses(shape, layout, chip, batch, length, num_chips=premises.gpus)
    mtbf_hours = goodput.observed_chip_mtbf_hours(goodput.LLAMA3_FAILURES, goodput.LLAMA3_CHIPS, goodput.LLAMA3_DAYS)
    middle = (premises.mfu_low_percent + premises.mfu_high_percent) / 200
    job = TrainingJob(
        shape, chip, premises.gpus, premises.training_tokens, middle, premises.dollars_per_gpu_hour, mtbf_hours,
        SAVE_SECONDS, RESTART_SECONDS,
    )  # fmt: skip
    weights = "bfloat16" if premises.weight_bytes > 1 else "int8"
    server = what_if.server_of(shape, chip, premises.inference_tensor, premises.inference_stages, weights)
    demand = Demand(premises.inference_batch, premises.cache_context_tokens, premises.dollars_per_gpu_hour)
    assumptions = what_if.assumptions_of(job, server, demand)
    swings = tornado.tornado(what_if.results_of(job, server), assumptions, CHANGE)
    counts = [count for count in COUNTS if count >= shape.experts_per_token] if shape.num_moe_layers else []
    options = {saving: expert_tradeoff.options(server, counts, demand, job.dollars, saving) for saving in SAVINGS}
    found = [
        pictures.waterfall_picture(waterfall.waterfall(step.ideal_seconds, step.lost_seconds, job.goodput)),
        pictures.tornado_picture(swings, CHANGE, "dollars"),
        pictures.tornado_picture(swings, CHANGE, "dollars_per_1k_tokens"),
    ]
    return [*found, pictures.experts_picture(options)] if counts else found


def _layout(premises: Premises, shape: Shape) -> Layout:
    """The article's: tensor by stages, replicas fill the chips, all layers computed again."""
    tensor, stages = premises.tensor, premises.stages
    return Layout(
        tensor=tensor,
        stage=stages,
        expert_tensor=tensor if shape.num_moe_layers else 1,
        data=max(premises.gpus // (tensor * stages), 1),
        remat="full",
        sequence_parallel=tensor > 1,
    )


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
