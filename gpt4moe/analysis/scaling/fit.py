"""Fits a law to runs: observations in, constants with intervals and a sense of where they hold out.

As in Hoffmann et al. 2022 (section 3.3): a Huber loss on log L, minimised from every good start of a grid. Intervals
are those of a bootstrap over cells, the seeds of a cell together.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import optimize

from gpt4moe.analysis.scaling.laws import C4, Chinchilla, DataConstrained, FineGrained, Routed, Sparse
from gpt4moe.config.check import require

HUBER_DELTA = 1e-3
MOST_STARTS, POLISHED = 4000, 12
INTERVAL = (2.5, 97.5)

Law = Chinchilla | DataConstrained | FineGrained | Routed | Sparse


@dataclasses.dataclass(frozen=True)
class Constant:
    """One constant of a law: its starts, in logarithms where `log`, as which it is then fitted too."""

    name: str
    starts: tuple[float, ...]
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Form:
    """What is fitted: how to make a law of its constants, which those are, and the variables its loss takes."""

    make: Callable[..., Law]
    constants: tuple[Constant, ...]
    variables: tuple[str, ...]


_EXPONENTS = (0.1, 0.3, 0.5, 1.0)
_SIZES, _OFFSETS = (0.0, 5.0, 10.0, 15.0), (-1.0, -0.5, 0.0, 0.5, 1.0)
CHINCHILLA = Form(
    Chinchilla,
    (
        Constant("A", _SIZES, log=True),
        Constant("B", _SIZES, log=True),
        Constant("E", _OFFSETS, log=True),
        Constant("alpha", _EXPONENTS),
        Constant("beta", _EXPONENTS),
    ),
    ("parameters", "tokens"),
)
ROUTED = Form(
    Routed,
    (
        Constant("a", (-0.2, -0.1, -0.05)),
        Constant("b", (-0.3, -0.15, -0.05)),
        Constant("c", (0.0, 0.01, 0.03)),
        Constant("d", (0.5, 1.0, 1.5)),
        Constant("least", (0.3, 0.7, 1.5), log=True),
        Constant("most", (4.0, 5.5, 7.0), log=True),
    ),
    ("parameters", "experts"),
)
FINE_GRAINED = Form(
    FineGrained,
    (
        Constant("a", (0.0, 2.0, 4.0), log=True),
        Constant("alpha", (0.1, 0.2, 0.4)),
        Constant("b", (1.0, 3.0, 6.0), log=True),
        Constant("beta", (0.1, 0.2, 0.4)),
        Constant("g", (-1.0, 1.0, 3.0), log=True),
        Constant("gamma", (0.3, 0.6, 1.0)),
        Constant("c", (-1.0, 0.0, 0.7), log=True),
    ),
    ("parameters", "tokens", "granularity"),
)
SPARSE = Form(
    Sparse,
    (
        Constant("a", (5.0, 10.0), log=True),
        Constant("alpha", (0.3, 0.6)),
        Constant("b", (5.0, 9.0), log=True),
        Constant("beta", (0.3, 0.5)),
        Constant("c", (-2.0, 0.0), log=True),
        Constant("lambda_", (-0.3, -0.1)),
        Constant("d", (1.0, 3.0), log=True),
        Constant("delta", (0.1, 0.3)),
        Constant("gamma", (0.1, 0.3)),
        Constant("e", (-1.0, 0.0), log=True),
    ),
    ("parameters", "tokens", "sparsity"),
)


def data_constrained(law: Chinchilla = C4) -> Form:
    """Returns the form that fits how repetition wears off, `law` given for data seen once."""
    halves = tuple(Constant(name, (0.0, 1.5, 3.0, 4.5), log=True) for name in ("tokens_half", "parameters_half"))
    return Form(
        lambda **constants: DataConstrained(law, **constants), halves, ("parameters", "tokens", "unique_tokens")
    )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Nats a token with the bootstrap's interval; `extrapolates` where a variable lies outside of what was fitted."""

    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray
    extrapolates: np.ndarray


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law fitted to runs.

    residuals: log of measured over predicted loss, one a run. intervals: by constant, of the bootstrap. ranges: of
    every variable. resampled: laws of the bootstrap. held_out_error: mean |log error| on the runs that were kept apart
    and the fit without them, None where none were.
    """

    law: Law
    residuals: np.ndarray
    intervals: Mapping[str, tuple[float, float]]
    ranges: Mapping[str, tuple[float, float]]
    resampled: tuple[Law, ...]
    held_out_error: float | None

    def predict(self, **variables: np.ndarray | float) -> Prediction:
        """Returns what the law and its resampled ones say at these values of all its variables."""
        columns = dict(zip(variables, np.broadcast_arrays(*variables.values()), strict=True))
        losses = np.array([law.loss(**columns) for law in self.resampled or (self.law,)])
        low, high = np.percentile(losses, INTERVAL, axis=0)
        outside = [(columns[name] < low_) | (columns[name] > high_) for name, (low_, high_) in self.ranges.items()]
        return Prediction(self.law.loss(**columns), low, high, np.any(outside, axis=0))


def fit(
    form: Form,
    variables: Mapping[str, Sequence[float]],
    losses: Sequence[float],
    *,
    cells: Sequence[object] | None = None,
    hold_out: Sequence[bool] | None = None,
    num_resampled: int = 100,
    seed: int = 0,
) -> Fit:
    """Returns the law of `form` that fits `losses` (nats) at these `variables`, one entry a run.

    `cells` says which runs are seeds of one cell (None: every run its own); `hold_out` marks runs that the fit is tried
    on without having seen them, as those of the most compute. Raises `CallerError` for fewer runs than constants.
    """
    require(
        set(variables) == set(form.variables),
        "variables",
        sorted(variables),
        f"must be those of the law {form.variables}",
    )
    columns = {name: np.asarray(values, np.float64) for name, values in variables.items()}
    log_losses = np.log(np.asarray(losses, np.float64))
    enough = len(log_losses) > len(form.constants)
    require(enough, "losses", len(log_losses), f"must be more than the law's {len(form.constants)} constants")
    cell_of = np.unique(
        np.array([repr(c) for c in cells]) if cells else np.arange(len(log_losses)), return_inverse=True
    )[1]
    best = _minimise(form, columns, log_losses, _good_starts(form, columns, log_losses, seed))
    resampled = _bootstrap(form, columns, log_losses, cell_of, best, num_resampled, seed)
    law = _law(form, best)
    constants = np.array([_constants(form, theta) for theta in resampled]).reshape(-1, len(form.constants))
    intervals = {
        constant.name: tuple(np.percentile(column, INTERVAL)) if len(column) else (np.nan, np.nan)
        for constant, column in zip(form.constants, constants.T, strict=True)
    }
    return Fit(
        law=law,
        residuals=log_losses - np.log(law.loss(**columns)),
        intervals=intervals,
        ranges={name: (values.min(), values.max()) for name, values in columns.items()},
        resampled=tuple(_law(form, theta) for theta in resampled),
        held_out_error=_held_out_error(form, columns, log_losses, hold_out, seed),
    )


def _held_out_error(form: Form, columns: Mapping, log_losses: np.ndarray, hold_out, seed: int) -> float | None:
    if hold_out is None or not any(hold_out):
        return None
    apart = np.asarray(hold_out, bool)
    seen = {name: values[~apart] for name, values in columns.items()}
    theta = _minimise(form, seen, log_losses[~apart], _good_starts(form, seen, log_losses[~apart], seed))
    predicted = _law(form, theta).loss(**{name: values[apart] for name, values in columns.items()})
    return float(np.mean(np.abs(np.log(predicted) - log_losses[apart])))


def _bootstrap(form, columns, log_losses, cell_of, best, num_resampled: int, seed: int) -> list[np.ndarray]:
    """Constants fitted to cells drawn with replacement, each from the best of the whole."""
    draw, found = np.random.default_rng(seed), []
    by_cell = [np.flatnonzero(cell_of == cell) for cell in range(cell_of.max() + 1)]
    for _ in range(num_resampled):
        chosen = np.concatenate([by_cell[cell] for cell in draw.integers(len(by_cell), size=len(by_cell))])
        taken = {name: values[chosen] for name, values in columns.items()}
        found.append(_minimise(form, taken, log_losses[chosen], [best]))
    return found


def _good_starts(form: Form, columns: Mapping, log_losses: np.ndarray, seed: int) -> list[np.ndarray]:
    """The starts of the grid with the least loss; of a grid too large, a draw."""
    grid = list(itertools.product(*(constant.starts for constant in form.constants)))
    if len(grid) > MOST_STARTS:
        grid = [grid[i] for i in np.random.default_rng(seed).choice(len(grid), MOST_STARTS, replace=False)]
    starts = [np.array(start) for start in grid]
    costs = [_cost(_errors(form, start, columns, log_losses)) for start in starts]
    return [starts[index] for index in np.argsort(costs)[:POLISHED]]


def _minimise(form: Form, columns: Mapping, log_losses: np.ndarray, starts: Sequence[np.ndarray]) -> np.ndarray:
    results = [
        optimize.least_squares(
            lambda theta: _errors(form, theta, columns, log_losses),
            start,
            loss="huber",
            f_scale=HUBER_DELTA,
            x_scale="jac",
            xtol=1e-12,
            ftol=1e-12,
            gtol=1e-12,
            max_nfev=2000,
        )
        for start in starts
    ]
    return min(results, key=lambda result: result.cost).x


def _errors(form: Form, theta: np.ndarray, columns: Mapping, log_losses: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        errors = np.log(_law(form, theta).loss(**columns)) - log_losses
    return np.where(np.isfinite(errors), errors, 1e3)


def _cost(errors: np.ndarray) -> float:
    size = np.abs(errors)
    return float(np.sum(np.where(size < HUBER_DELTA, size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2))))


def _law(form: Form, theta: np.ndarray) -> Law:
    names = [constant.name for constant in form.constants]
    return form.make(**dict(zip(names, _constants(form, theta), strict=True)))


def _constants(form: Form, theta: np.ndarray) -> list[float]:
    with np.errstate(over="ignore"):
        return [np.exp(value) if c.log else value for c, value in zip(form.constants, theta, strict=True)]
