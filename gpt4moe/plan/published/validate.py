"""`gpt4moe plan validate`: predictions beside published measurements, per source, per stack and over all.

In: a CSV file (the package's own by default). Out: the JSON document and its text. Errors, bias and regret are
fractions of the measured time; rank correlation is that of utilisation, so that large models do not rank by size.
"""

from __future__ import annotations

import argparse
import pathlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from gpt4moe.plan.published import scores
from gpt4moe.plan.published.calibration import read_calibration
from gpt4moe.plan.published.comparison import Compared, compare_all
from gpt4moe.plan.published.measurements import PUBLISHED_RUNS, read_rows

# What makes a model and its job the same, whatever the layout.
SAME_JOB = ("layers", "d_model", "n_heads", "seq", "global_batch_tokens", "gpus", "params_total", "gpu_type")


def answer(args: argparse.Namespace, build: Any) -> tuple[dict, Callable[[dict], str]]:
    """Returns the document of `validate` and the function that makes text of it; `build` is not used."""
    return examine(args.csv or PUBLISHED_RUNS, args.calibration), format_document


def examine(path: str, calibration: str | None = None) -> dict:
    """Returns the JSON document: scores by source, stack and over all, layouts picked, every row, what was skipped.

    moe: scores of the rows with experts. stacks: of training steps. serving: of prompts and decoding. whole_runs:
    stacks of rows that tell the hours of all chips for a run, restarts and stops among them.

    calibration: a file of `plan calibrate`; scored on the rows it was fitted to, errors are no test. Raises
    `CallerError` with file and line for a bad cell, or where no row has a prediction.
    """
    constants = read_calibration(calibration) if calibration else None
    compared, skipped = compare_all(read_rows(path), constants)
    left_out = _left_out(compared)
    groups = _regret_groups(compared)
    by_source, by_stack = _by(compared, "source"), _by(compared, "stack")
    return {
        "file": str(path),
        "calibration": calibration,
        "sources": {name: _scores(items, left_out, groups) for name, items in by_source.items()},
        **{
            part: {name: _stack_scores(items, left_out) for name, items in by_stack.items() if _part_of(items) == part}
            for part in ("stacks", "serving", "whole_runs")
        },
        "overall": _scores(compared, left_out, groups),
        "moe": _scores([item for item in compared if _has_experts(item)], left_out, groups),
        "regret_groups": groups,
        "rows": [_row(item, left_out.get(item.row.key)) for item in compared],
        "skipped": [{"name": item.name, "reason": item.reason} for item in skipped],
    }


def _by(items: Sequence[Compared], key: str) -> dict[str, list[Compared]]:
    found = defaultdict(list)
    for item in items:
        found[getattr(item, key)].append(item)
    return dict(found)


def _left_out(items: Sequence[Compared]) -> dict[tuple, float]:
    """Error of each row after one scalar for its stack, fitted to the stack's rows of other jobs."""
    found = {}
    for members in _by(items, "stack").values():
        errors = scores.left_out_errors([item.error for item in members], [item.job for item in members])
        found |= {item.row.key: error for item, error in zip(members, errors, strict=True) if error is not None}
    return found


def _scores(items: Sequence[Compared], left_out: dict[tuple, float], groups: Sequence[dict]) -> dict:
    errors = [item.error for item in items]
    ranked = [item.utilization for item in items if item.utilization]
    names = {item.row.name for item in items}
    regrets = [group["regret"] for group in groups if names & set(group["rows"])]
    return {
        "rows": len(items),
        "mape": scores.mape(errors),
        "bias": scores.bias(errors),
        "spearman": scores.spearman([pair[0] for pair in ranked], [pair[1] for pair in ranked]),
        "regret": max(regrets, default=None),
        "calibrated_mape": scores.mape([left_out[item.row.key] for item in items if item.row.key in left_out]),
    }


def _stack_scores(items: Sequence[Compared], left_out: dict[tuple, float]) -> dict:
    errors = [item.error for item in items]
    return {
        "rows": len(items),
        "mape": scores.mape(errors),
        "bias": scores.bias(errors),
        "seconds_scale": scores.best_scale(errors),
        "calibrated_mape": scores.mape([left_out[item.row.key] for item in items if item.row.key in left_out]),
    }


def _part_of(items: Sequence[Compared]) -> str:
    if all(item.is_whole_run for item in items):
        return "whole_runs"
    return "serving" if all(item.row.kind == "infer" for item in items) else "stacks"


def _has_experts(item: Compared) -> bool:
    return bool(item.setup and item.setup.shape.num_moe_layers)


def _regret_groups(items: Sequence[Compared]) -> list[dict]:
    """Layouts of one model on one job, and the regret of the one that the model would have picked."""
    jobs = defaultdict(dict)
    for item in items:
        if item.predicted_seconds is None or item.is_whole_run:
            continue
        job = (item.source, *(getattr(item.row, name) for name in SAME_JOB))
        layouts = {other.setup.layout for other in jobs[job].values()}
        if item.setup.layout not in layouts:
            jobs[job][item.row.name] = item
    found = []
    for rows in jobs.values():
        if len(rows) < 2:
            continue
        predicted = {name: item.predicted_seconds / item.setup.batch_tokens for name, item in rows.items()}
        measured = {name: item.measured_seconds / item.setup.batch_tokens for name, item in rows.items()}
        picked, best = min(predicted, key=predicted.get), min(measured, key=measured.get)
        found.append({"rows": list(rows), "picked": picked, "best": best, "regret": scores.regret(predicted, measured)})
    return found


def _row(item: Compared, left_out: float | None) -> dict:
    row, setup = item.row, item.setup
    document = {
        "name": row.name, "source": item.source, "stack": item.stack, "metric": row.measured_metric,
        "unit": row.unit, "measured": row.value, "predicted": item.predicted, "error": item.error,
        "calibrated_error": left_out, "predicted_seconds": item.predicted_seconds,
        "measured_seconds": item.measured_seconds,
    }  # fmt: skip
    if setup:
        names = ("tensor", "context", "stage", "virtual_stages", "expert", "data", "zero", "microbatch_rows", "remat")
        document["layout"] = {name: getattr(setup.layout, name) for name in names}
        document |= {"guessed": list(setup.guessed), "memory_bytes": setup.memory.total_bytes, "fits": item.fits}
        document["parts"] = setup.step.parts
    return document


def format_document(document: dict) -> str:
    """Returns the document of `examine` as a table to read."""
    head = f"{'rows':>5}{'MAPE':>8}{'bias':>8}{'Spearman':>10}{'regret':>8}{'one scalar a stack':>20}"
    lines = [f"{pathlib.Path(document['file']).name}: predicted over measured time", f"{'source':<28}{head}"]
    for name, found in (*document["sources"].items(), ("with experts", document["moe"]), ("all", document["overall"])):
        rank = "-" if found["spearman"] is None else f"{found['spearman']:.2f}"
        lines.append(
            f"{name:<28}{found['rows']:>5}{_percent(found['mape']):>8}{_percent(found['bias'], '+'):>8}{rank:>10}"
            f"{_percent(found['regret']):>8}{_percent(found['calibrated_mape']):>20}"
        )
    lines += ["", f"{'stack and chip':<40}{'rows':>5}{'scalar':>8}{'left out':>10}"]
    for name, found in (document["stacks"] | document["serving"] | document["whole_runs"]).items():
        scale, error = f"{found['seconds_scale']:.3f}", _percent(found["calibrated_mape"])
        lines.append(f"{name:<40}{found['rows']:>5}{scale:>8}{error:>10}")
    lines += ["", "picked among measured layouts of one model:"] if document["regret_groups"] else []
    for group in document["regret_groups"]:
        lines.append(f"  {group['picked']} of {len(group['rows'])}, best {group['best']}: {_percent(group['regret'])}")
    ran = [row["name"] for row in document["rows"] if row.get("fits") is False]
    if ran:
        lines += ["", f"predicted not to fit though they ran, {len(ran)}: {', '.join(ran)}"]
    reasons = defaultdict(list)
    for item in document["skipped"]:
        reasons[item["reason"]].append(item["name"])
    lines += [f"skipped {len(names)} ({reason}): {', '.join(names)}" for reason, names in reasons.items()]
    return "\n".join(lines)


def _percent(fraction: float | None, sign: str = "") -> str:
    return "-" if fraction is None else f"{100 * fraction:{sign}.1f} %"
