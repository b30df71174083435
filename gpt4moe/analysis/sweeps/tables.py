"""The tables of a sweep's page: points in short, and every cell with the reason where it failed."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gpt4moe.analysis.sweeps.curves import Curve, tokens_to_match
from gpt4moe.analysis.sweeps.final import differences
from gpt4moe.analysis.sweeps.table import Point, Sweep, short, shown

MEASURED = (
    "held_out_loss",
    "loss",
    "active_parameters",
    "total_parameters",
    "train_state_bytes",
    "train_flops_per_token",
)
MEASURED += ("tokens", "tokens_per_second", "model_flops_utilization", "train_seconds", "loss_spikes", "skipped_steps")


def point_rows(sweep: Sweep, curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """One row a point: mean, standard error, and how it stands to the first point and to the best."""
    if not sweep.measured:
        return []
    points = sorted(sweep.points, key=lambda point: point.place)
    done = [point for point in points if point.done]
    first, best = done[0], min(done, key=lambda point: point.mean(sweep.metric))
    to_first, to_best = (dict(zip(map(id, done), differences(sweep, done, to), strict=True)) for to in (first, best))
    match = _matches(curves, first)
    rows = []
    for point in points:
        off, errors = to_first.get(id(point), (math.nan, math.nan))
        behind, behind_errors = to_best.get(id(point), (math.nan, math.nan))
        row = {"point": point.label or "all runs", "seeds done": f"{len(point.done)} of {len(point.rows)}"}
        row |= {"mean": point.mean(sweep.metric), "standard error": point.error(sweep.metric)}
        row |= {"to the first": off, "in standard errors": errors}
        row |= {"to the best": behind, "in its standard errors": behind_errors}
        row |= {"share of tokens to match the first": match.get(point.place, math.nan)}
        row |= {"diverged": sum("not finite" in str(run.get("reason")) for run in point.rows)}
        row |= {"loss spikes": sum(point.values("loss_spikes")), "skipped steps": sum(point.values("skipped_steps"))}
        rows.append(row)
    return rows


def cell_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """One row a cell, whatever became of it."""
    measured = [name for name in MEASURED if any(row.get(name) is not None for row in sweep.rows)]
    columns = (*sweep.swept, "seed", "state", *measured, "reason", "id")
    return [{name: row.get(name) for name in columns} for row in sweep.rows]


def table(rows: Sequence[Mapping[str, Any]], *, forms: Mapping[str, str] | None = None) -> str:
    """HTML of rows that a click on a title sorts; columns without a value are left out."""
    names = [name for name in (rows[0] if rows else ()) if any(_held(row[name]) for row in rows)]
    head = "".join(f'<th><button type="button">{html.escape(short(name))}</button></th>' for name in names)
    body = "".join(_row(row, names, forms or {}) for row in rows)
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _matches(curves: Sequence[Curve], first: Point) -> dict[tuple[int, ...], float]:
    """By place: the share of the first point's tokens after which a point has its training loss."""
    reference = next((curve for curve in curves if curve.point is first), None)
    if reference is None:
        return {}
    end = reference.loss[-1]
    return {curve.point.place: tokens_to_match(curve, end) / reference.tokens[-1] for curve in curves}


def _row(row: Mapping[str, Any], names: Sequence[str], forms: Mapping[str, str]) -> str:
    failed = ' class="failed"' if row.get("state") == "failed" else ""
    return f"<tr{failed}>{''.join(_cell(row[name], forms.get(name)) for name in names)}</tr>"


def _cell(value: Any, form: str | None) -> str:
    if not _held(value):
        return "<td></td>"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'<td data-value="{value!r}">{format(value, form) if form else shown(value)}</td>'
    text = str(value)
    words = ' class="words"' if len(text) > 40 else ""
    return f"<td{words}>{html.escape(text)}</td>"


def _held(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value)) and value != ""
