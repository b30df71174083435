"""How good predictions are: mean error, bias, rank correlation, regret. In: numbers. Out: fractions, None for too few.

Errors are predicted over measured seconds, minus one: above zero is predicted too slow. All are fractions, no per cent.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

FEWEST_TO_RANK = 3


def mape(errors: Sequence[float]) -> float | None:
    """Returns the mean absolute error."""
    return sum(map(abs, errors)) / len(errors) if errors else None


def bias(errors: Sequence[float]) -> float | None:
    """Returns the mean error."""
    return sum(errors) / len(errors) if errors else None


def spearman(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Returns the correlation of the ranks, ties sharing their mean; None below three pairs or where all are equal."""
    if len(predicted) < FEWEST_TO_RANK:
        return None
    return _correlation(_ranks(predicted), _ranks(measured))


def best_scale(errors: Sequence[float]) -> float:
    """Returns the one factor of predicted times that fits best: geometric mean of measured over predicted."""
    return math.exp(-sum(math.log1p(error) for error in errors) / len(errors))


def left_out_errors(errors: Sequence[float], jobs: Sequence[Hashable]) -> list[float | None]:
    """Returns each row's error after one scalar fitted to the rows of other jobs; None where there are none.

    Two rows of one job are one measurement told twice: neither may fit the other.
    """
    found = []
    for error, job in zip(errors, jobs, strict=True):
        others = [other for other, its in zip(errors, jobs, strict=True) if its != job]
        found.append((1 + error) * best_scale(others) - 1 if others else None)
    return found


def regret(predicted_seconds: Mapping[str, float], measured_seconds: Mapping[str, float]) -> float:
    """Returns how much slower than the best measured one the layout is that the model would have picked."""
    picked = min(predicted_seconds, key=predicted_seconds.get)
    return measured_seconds[picked] / min(measured_seconds.values()) - 1


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]


def _correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    means = sum(one) / len(one), sum(other) / len(other)
    products = sum((a - means[0]) * (b - means[1]) for a, b in zip(one, other, strict=True))
    spread = math.sqrt(sum((a - means[0]) ** 2 for a in one) * sum((b - means[1]) ** 2 for b in other))
    return products / spread if spread else None
