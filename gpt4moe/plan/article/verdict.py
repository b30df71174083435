"""The verdict on a claim, by rule: a claim and what was computed for it in, one word out.

OK: within 3 %, or the same when rounded to the digits that the claim has, or a bound that holds. ROUNDED: a rough
number, within a half. LOOSE: a bound that holds with more than a factor of 3 to spare. UNIT-ERROR: off by a power of
1,000 and otherwise right, or a price that as written needs more than the chips' peak. INCONSISTENT: none of these, or
the article's other claims say otherwise. INPUT, NOT-COMPUTABLE: nothing to judge.
"""

from __future__ import annotations

import math

from gpt4moe.plan.article.claims import Claim
from gpt4moe.plan.article.facts import Answer

TOLERANCE = 0.03
ROUGH = 0.5
SPARE = 3.0
VERDICTS = ("OK", "ROUNDED", "LOOSE", "UNIT-ERROR", "INCONSISTENT", "INPUT", "NOT-COMPUTABLE")


def judge(claim: Claim, answer: Answer | None) -> str:
    """Returns one of `VERDICTS`."""
    if claim.kind == "input":
        return "INPUT"
    if claim.kind == "outside" or answer is None:
        return "NOT-COMPUTABLE"
    if claim.kind == "price":
        return "UNIT-ERROR" if answer.beyond_peak > 1 else "OK"
    if claim.kind == "consequence":
        return "OK"
    stated = claim.number if answer.against is None else answer.against
    if claim.kind in ("above", "below"):
        return _bound(answer.computed / stated if claim.kind == "above" else stated / answer.computed)
    return _number(claim, answer, stated)


def relative_difference(claim: Claim, answer: Answer | None) -> float | None:
    """Returns (computed - stated) / stated; None where the two are not in one unit."""
    if answer is None or answer.computed is None or claim.kind in ("consequence", "price", "input"):
        return None
    stated = claim.number if answer.against is None else answer.against
    return answer.computed / stated - 1


def _bound(margin: float) -> str:
    if margin <= 1:
        return "INCONSISTENT"
    return "LOOSE" if margin > SPARE else "OK"


def _number(claim: Claim, answer: Answer, stated: float) -> str:
    difference = abs(answer.computed / stated - 1)
    is_rough = claim.kind == "about"
    if answer.elsewhere is not None and abs(answer.elsewhere / stated - 1) > TOLERANCE:
        return "INCONSISTENT"
    if difference <= TOLERANCE or (_rounds_to(answer.computed, stated) and not is_rough):
        return "OK"
    if _off_by_thousands(answer.computed, stated):
        return "UNIT-ERROR"
    return "ROUNDED" if is_rough and difference <= ROUGH else "INCONSISTENT"


def _off_by_thousands(computed: float, stated: float) -> bool:
    if computed <= 0:
        return False
    thousands = round(math.log(stated / computed, 1000))
    return thousands != 0 and abs(computed * 1000**thousands / stated - 1) <= TOLERANCE


def _rounds_to(computed: float, stated: float) -> bool:
    """Whether `computed` at the significant digits of `stated` is `stated`; zeros at its end are taken as rounding."""
    digits = len(f"{stated:.15e}".partition("e")[0].replace(".", "").rstrip("0"))
    return float(f"{computed:.{digits - 1}e}") == stated
