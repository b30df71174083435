"""The claims of the reference article as data: rows of claims.csv in, `Claim`s out.

The article is "GPT-4 Architecture, Infrastructure, Training Dataset, Costs, Vision, MoE" (SemiAnalysis, July 2023).
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.resources

TABLE = "claims.csv"
# What a claim says of its number, and so how it is judged (`plan.verdict`).
KINDS = {
    "input": "a premise, taken as it is",
    "outside": "about something that no configuration determines",
    "equal": "the number",
    "about": "roughly the number",
    "above": "more than the number",
    "below": "less than the number",
    "consequence": "a choice, of which a consequence is computed in another unit",
    "price": "dollars a thousand tokens, of which the throughput that they need is computed",
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim. value: as written, `number` where it is one. formula: what is computed to check it, in words."""

    id: int
    section: str
    claim: str
    value: str
    unit: str
    kind: str
    formula: str

    @property
    def number(self) -> float | None:
        """The value in `unit`; None where it is none or more than one."""
        try:
            return float(self.value)
        except ValueError:
            return None


def read_claims() -> dict[int, Claim]:
    """Returns the article's claims by their number, in its order."""
    text = (importlib.resources.files("gpt4moe.plan.article") / TABLE).read_text()
    rows = csv.DictReader(text.splitlines())
    return {int(row["id"]): Claim(int(row.pop("id")), **row) for row in rows}
