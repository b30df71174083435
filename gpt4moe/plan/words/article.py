"""`gpt4moe plan article`: the audit as a table, with the premises that flags move and the report that they ask for."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gpt4moe.accounting.shape import shape_of
from gpt4moe.plan.article.audit import audit
from gpt4moe.plan.article.claims import read_claims
from gpt4moe.plan.article.premises import article_premises, article_shape, move
from gpt4moe.plan.article.verdict import VERDICTS


def answer(args: argparse.Namespace, build: Any) -> tuple[list[dict], Callable[[Any], str]]:
    """Returns the rows of the audit as a JSON document, and the function that makes a table of them."""
    premises, shape = article_premises(read_claims()), article_shape()
    if args.gin_file:
        shape = shape_of(build.model())
    premises, shape = move(premises, shape, args.set)
    rows = audit(premises, shape)
    if args.report:
        from gpt4moe.plan.words import report

        report.write_report(rows, premises, shape, args.report)
    return [dataclasses.asdict(row) for row in rows], format_rows


def format_rows(rows: Sequence[dict]) -> str:
    """Returns the rows of the audit as a table to read, with what moved below it."""
    lines = [f"{'#':>2}  {'claim':<46}{'article':>12}{'computed':>12}{'diff':>9}  verdict"]
    for row in rows:
        difference = "" if row["relative_difference"] is None else f"{row['relative_difference']:+.1%}"
        numbers = f"{short(row['value']):>12}{short(row['computed']):>12}{difference:>9}"
        lines.append(f"{row['id']:>2}  {_cut(row['claim'], 45):<46}{numbers}  {row['verdict']}")
        if row["note"]:
            lines.append(f"      {row['note']}")
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
    lines += ["", ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number)]
    moved = [row for row in rows if row["moved"]]
    if moved:
        lines += ["", "moved from the article's own premises:"]
    for row in moved:
        old = row["moved"]
        change = f"{short(old['computed'])} -> {short(row['computed'])}"
        verdicts = "" if old["verdict"] == row["verdict"] else f", {old['verdict']} -> {row['verdict']}"
        lines.append(f"{row['id']:>2}  {_cut(row['claim'], 45):<46}{change}{verdicts}")
    return "\n".join(lines)


def short(value: float | str | None) -> str:
    """Returns a number in four digits, with a letter for thousands and more: 1.833T."""
    if value is None or isinstance(value, str):
        return _cut(value or "", 11)
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if factor <= abs(value) < 1e15:
            return f"{value / factor:.4g}{letter}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e6 else f"{value:.4g}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
