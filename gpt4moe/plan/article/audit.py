"""The audit of the reference article: premises and a shape in, a row for every claim out."""

from __future__ import annotations

import dataclasses
from typing import Any

from gpt4moe.accounting.shape import Shape
from gpt4moe.plan.article import serving, training
from gpt4moe.plan.article.claims import Claim, read_claims
from gpt4moe.plan.article.facts import Answer, Case, Facts
from gpt4moe.plan.article.premises import Premises, article_premises, article_shape
from gpt4moe.plan.article.verdict import judge, relative_difference

FORMULAS = training.FORMULAS | serving.FORMULAS
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
