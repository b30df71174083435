"""What a search found as a JSON document and as a table: the best, the best of each family and why it lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gpt4moe.accounting import parameters
from gpt4moe.accounting.summary import scaled
from gpt4moe.plan.search.gin_export import REMAT
from gpt4moe.plan.search.layouts import OUR_SCHEDULE, Space
from gpt4moe.plan.search.ranking import Costed, Found, cost_one
from gpt4moe.plan.search.reasons import expert_bound, slow_widths, why

# Kinds of parallelism that one expects in the table even where nothing divides into them.
PLAIN_FAMILIES = {"data": "data parallelism alone", "FSDP": "FSDP alone"}
MOST_LEFT_OUT = 6
FAMILY_WIDTH = 46


def to_document(found: Found, space: Space, objective: str, top: int, asked: Costed | None) -> dict:
    """Returns the JSON document of a search. asked: a layout whose fate somebody wants to know."""
    job, best = found.job, next(iter(found.ranked), None)
    counted = parameters.count(job.shape)
    return {
        "shape": job.shape.name,
        "parameters": counted.total,
        "active_parameters": parameters.count_active(job.shape),
        "chip": job.chip.name,
        "num_chips": job.num_chips,
        "memory_gb": job.chip.memory_bytes / 1e9,
        "batch_tokens": job.batch_tokens,
        "sequence_length": job.sequence_length,
        "space": space.name,
        "stack": job.stack.name,
        "numerics": job.numerics.name,
        "objective": objective,
        "examined": found.examined,
        "fitting": len(found.ranked),
        "search_seconds": round(found.seconds, 3),
        "left_out": found.left_out,
        "best": [_row(item, best) for item in found.ranked[:top]],
        "families": [_row(item, best) for item in found.families.values()] + _plain_families(found),
        "asked": _row(asked, best) if asked else None,
        "idle": _idle(found),
        "slow_widths": slow_widths(job.shape, best.layout) if best else [],
    }


def _idle(found: Found) -> dict | None:
    """What leaving chips idle wins, None where the best leaves none: the share by which all of them take longer."""
    best = next(iter(found.ranked), None)
    if best is None or not best.idle_chips:
        return None
    whole = next((item for item in found.ranked if not item.idle_chips), None)
    return {
        "chips": best.idle_chips,
        "used_chips": best.layout.chips,
        "all_chips_slower_by": whole and whole.seconds_per_token / best.seconds_per_token - 1,
        "best_of_all_chips": whole and _row(whole, best),
    }


def ramp_rows(best: Costed, ramp: Sequence[tuple[float, float]]) -> list[dict]:
    """Returns what a step takes at each batch of a ramp, in the layout found for the last; empty without a ramp."""
    job, found = best.job, []
    for (start, _), rows in zip(ramp, (*job.ramp_rows, best.batch_rows), strict=True):
        passes = max(best.layout.passes * rows // best.batch_rows, 1)
        layout = dataclasses.replace(best.layout, passes=passes)
        item = cost_one(job, layout, rows)
        found.append(
            {
                "from_tokens": start,
                "batch_tokens": item.batch_tokens,
                "step_seconds": item.step.seconds,
                "tokens_per_second": item.step.tokens_per_second,
                "model_flops_utilization": item.model_flops_utilization,
            }
        )
    return found if len(found) > 1 else []


def _plain_families(found: Found) -> list[dict]:
    """Families that nothing divided into, with the reason."""
    job = found.job
    if job.num_chips == 1:  # nothing to spread
        return []
    if job.batch_rows < job.num_chips:
        why_not = f"needs {job.num_chips:,} sequences in a batch, one for each chip; there are {job.batch_rows:,}"
    elif job.rows_near(job.num_chips, 1) is None:
        batches = " and ".join(f"{rows:,}" for rows in (*job.ramp_rows, job.batch_rows))
        why_not = f"a batch of {batches} sequences does not divide over {job.num_chips:,} chips"
    else:
        why_not = "the model does not divide so"
    return [
        {"family": words, "layout": None, "fits": None, "why": why_not}
        for name, words in PLAIN_FAMILIES.items()
        if not any(family in (name, f"expert + {name}") for family in found.families)
    ]


def _row(item: Costed, best: Costed | None) -> dict[str, Any]:
    there, step = item.memory, item.step
    return {
        "family": item.family,
        "layout": dataclasses.asdict(item.layout),
        "trainer_remat": REMAT[item.layout.remat] if item.layout.schedule == OUR_SCHEDULE else None,
        "chips": item.layout.chips,
        "idle_chips": item.idle_chips,
        "batch_tokens": item.batch_tokens,
        "microbatches": step.microbatches,
        "fits": there.fits,
        "memory_bytes": there.total_bytes,
        "missing_bytes": max(-there.spare_bytes, 0.0),
        "most_loaded_stage": there.most_loaded_stage,
        "memory": there.parts,
        "step_seconds": step.seconds,
        "tokens_per_second": step.tokens_per_second,
        "model_flops_utilization": item.model_flops_utilization,
        "bubble_fraction": step.bubble_fraction,
        "expert_bound": expert_bound(item.job.shape, item.layout, item.job.chip, item.job.stack),
        "dollars_per_billion_tokens": None if item.dollars_per_token is None else 1e9 * item.dollars_per_token,
        "parts": step.parts,
        "why": why(item, best),
    }


def format_document(document: dict) -> str:
    """Returns the document of `to_document` as tables to read."""
    run = document
    rate = run["examined"] / max(run["search_seconds"], 1e-9)
    left = sorted(run["left_out"].items(), key=lambda item: -item[1])[:MOST_LEFT_OUT]
    lines = [
        f"{run['shape']} ({scaled(run['parameters']).strip()} parameters, {scaled(run['active_parameters']).strip()} "
        f"active) on {run['num_chips']:,} x {run['chip']} of {run['memory_gb']:.0f} GB",
        f"batches of {run['batch_tokens']:,} tokens in rows of {run['sequence_length']:,}; {run['space']}, "
        f"stack {run['stack']}{', calibrated' if run.get('is_calibrated') else ''}, state {run['numerics']}",
        f"{run['examined']:,} layouts, {run['fitting']:,} fit, {run['search_seconds']:.1f} s ({rate:,.0f} a second)",
        "choices left out: " + (", ".join(f"{reason} ({count:,})" for reason, count in left) or "none"),
        "",
        *_table(f"best by {run['objective']}", run["best"]),
        "",
        *_table("best of each family", run["families"]),
    ]
    if run["idle"]:
        lines += ["", _idle_line(run["idle"])]
    if run["asked"]:
        lines += ["", *_table("asked", [run["asked"]])]
    if not run["best"]:
        lines += ["", "no layout fits: take more chips, chips with more memory, or a state of fewer bytes (--numerics)"]
    lines += [f"slow        {text}" for text in run["slow_widths"]]
    if run["space"] == "ours":
        lines += ["", "note        bytes sent are the algorithms' least; --verify shows what XLA adds (docs/plan.md)"]
    lines += ["", *_rest(run)]
    return "\n".join(lines).rstrip()


def _idle_line(idle: dict) -> str:
    said = f"idle        {idle['chips']:,} chips: {idle['used_chips']:,} divide better"
    whole = idle["best_of_all_chips"]
    if whole is None:
        return f"{said}; no layout of all fits"
    return (
        f"{said}; the best layout of all takes {idle['all_chips_slower_by']:.0%} longer "
        f"({whole['model_flops_utilization']:.1%} of the peak): {whole['why']}"
    )


def _rest(run: dict) -> list[str]:
    lines = []
    if "checkpoint" in run:
        save = run["checkpoint"]
        lines.append(
            f"save        every {save['checkpoint_every']:,} steps ({save['interval_seconds']:,.0f} s): the job fails "
            f"every {save['job_mtbf_hours']:.1f} h, goodput {save['goodput']:.3f}"
        )
    for stage in run.get("ramp", ()):
        lines.append(
            f"ramp        from {stage['from_tokens']:.4g} tokens: {stage['batch_tokens']:,} a batch, "
            f"{stage['step_seconds']:.2f} s a step, MFU {stage['model_flops_utilization']:.1%}"
        )
    if "exported" in run:
        lines.append(f"written     {run['exported']}")
    if "report" in run:
        lines.append(f"page        {run['report']}")
    for checked in run.get("verified", ()):
        from gpt4moe.plan.search.verify import format_verification

        lines += ["", format_verification(checked)]
    return lines


def _table(title: str, rows: Sequence[dict]) -> list[str]:
    """A line for each layout; t, c, p, v, e: tensor, context, stage, virtual stages, expert."""
    columns = f"{'t':>4}{'c':>3}{'p x v':>8}{'e x t':>8}{'data':>6}{'ZeRO':>8}{'rows':>10} {'remat':<10}"
    numbers = f"{'Mtok':>7}{'s/step':>9}{'MFU':>7}{'GB':>7}{'$/Gtok':>9}"
    head = f"{title:<{FAMILY_WIDTH}}{columns}{numbers}  why not first"
    return [head, *(_line(number, row) for number, row in enumerate(rows, 1))]


def _line(number: int, row: dict) -> str:
    name = f"{number:>2} {row['family']:<{FAMILY_WIDTH - 3}}"
    if row["layout"] is None:
        return f"{name}  {row['why']}"
    layout, remat = row["layout"], row["trainer_remat"] or row["layout"]["remat"]
    group = layout["zero_group"] if layout["zero"] else 0
    zero = f"{layout['zero']}/{group}" if group else layout["zero"]
    passes = f"/{layout['passes']}" if layout["passes"] > 1 else ""
    rows = f"{layout['microbatch_rows']}x{row['microbatches']}{passes}"
    stages = f"{layout['stage']}x{layout['virtual_stages']}"
    experts = f"{layout['expert']}x{layout['expert_tensor']}"
    dollars = row["dollars_per_billion_tokens"]
    price = "-" if dollars is None else f"{dollars:,.0f}"
    return (
        f"{name}{layout['tensor']:>4}{layout['context']:>3}{stages:>8}{experts:>8}{layout['data']:>6}{zero:>8}"
        f"{rows:>10} {remat:<10}{row['batch_tokens'] / 1e6:>7.3g}{row['step_seconds']:>9.3g}"
        f"{row['model_flops_utilization']:>7.1%}{row['memory_bytes'] / 1e9:>7.1f}{price:>9}  {row['why']}"
    )
