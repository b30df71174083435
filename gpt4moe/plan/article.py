"""`gpt4moe plan article`: the audit of the reference article; premises and a shape in, a row for every claim out."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gpt4moe.accounting.shape import Shape, shape_of
from gpt4moe.plan import article_serving, article_training
from gpt4moe.plan.claims import Claim, read_claims
from gpt4moe.plan.facts import Answer, Case, Facts
from gpt4moe.plan.premises import Premises, article_premises, article_shape, move
from gpt4moe.plan.verdict import VERDICTS, judge, relative_difference

FORMULAS = article_training.FORMULAS | article_serving.FORMULAS
# A row has moved when its number changed by more than this: routers and norms move many counts in their fifth digit.
MOVED = 1e-3


@dataclasses.dataclass(frozen=True)
class Row:
    """One claim audited. computed: in the claim's unit unless its formula names another.

    relative_difference: (computed - value) / value, None where they are not in one unit. moved: what `computed` and
    `verdict` are under the article's own premises, None where neither has changed.
    """

    id: int
    section: str
    claim: str
    value: float | str
    unit: str
    formula: str
    computed: float | None
    relative_difference: float | None
    verdict: str
    note: str
    moved: dict[str, Any] | None = None


def audit(premises: Premises | None = None, shape: Shape | None = None) -> list[Row]:
    """Returns a row for every claim of the article, under its own premises or others, of its own model or another."""
    claims = read_claims()
    article = Case(article_premises(claims), article_shape())
    case = Case(premises or article.premises, shape or article.shape)
    rows = _rows(Facts(case, article, claims))
    if case == article:
        return rows
    before = _rows(Facts(article, article, claims))
    return [dataclasses.replace(row, moved=_moved(row, old)) for row, old in zip(rows, before, strict=True)]


def answer(args: argparse.Namespace, build: Any) -> tuple[list[dict], Callable[[Any], str]]:
    """Returns the rows of the audit as a JSON document, and the function that makes a table of them."""
    premises, shape = article_premises(read_claims()), article_shape()
    if args.gin_file:
        shape = shape_of(build.model())
    premises, shape = move(premises, shape, args.set)
    rows = audit(premises, shape)
    if args.report:
        from gpt4moe.plan import report

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


def _rows(facts: Facts) -> list[Row]:
    answers = {number: formula(facts) for number, formula in FORMULAS.items()}
    return [_row(claim, answers.get(number)) for number, claim in facts.claims.items()]


def _row(claim: Claim, found: Answer | None) -> Row:
    return Row(
        id=claim.id,
        section=claim.section,
        claim=claim.claim,
        value=claim.value if claim.number is None else claim.number,
        unit=claim.unit,
        formula=claim.formula,
        computed=found.computed if found else None,
        relative_difference=relative_difference(claim, found),
        verdict=judge(claim, found),
        note=found.note if found else "",
    )


def _moved(row: Row, before: Row) -> dict[str, Any] | None:
    same = row.computed == before.computed or abs(row.computed / before.computed - 1) <= MOVED
    if same and row.verdict == before.verdict:
        return None
    return {"computed": before.computed, "verdict": before.verdict}


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
