"""Fits a law to runs: observations in, constants with their intervals, residuals and held-out error out.

As in Hoffmann et al. 2022 (section 3.3): the Huber loss of log L, summed over runs, minimised by L-BFGS from a grid of
starts. Summed, not averaged: small numbers end L-BFGS early, which is what Besiroglu et al. 2024 found wrong with the
published intervals. For the same reason a trust-region Gauss-Newton goes from where L-BFGS ends to the floor of the
valley. Gradients are exact, by a complex step. Intervals are percentiles of a bootstrap over cells, widened for how few
cells there are.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Mapping

import numpy as np
import tqdm
from scipy import optimize, stats

from gpt4moe.analysis.scaling.law import Array, Law, Ranges, require_variables
from gpt4moe.analysis.scaling.observations import Observations
from gpt4moe.config.check import require, require_count, require_fraction, require_not_negative, require_seed

STEP = 1e-30  # of the complex derivative: no difference is taken, so nothing cancels
OFF = 1e3  # the residual where a law has no finite value
CHUNK = 512  # starts that are evaluated at once
NO_LIMIT = 50.0  # of a logarithm: where the runs set no limit to a constant, it stops at e^50 or e^-50
ASTRAY = 5.0  # of a logarithm beyond its starts: the law hardly changes there, and no gradient leads back


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How a law is fitted.

    delta: where the Huber loss of log L turns from square to linear; `math.inf` is least squares. max_starts: of the
    grid, drawn where it has more. polished: best starts that are minimised. replicates: of the bootstrap, 0 for none.
    confidence: of intervals. held_out: share of runs, those of the most compute, that a second fit does without.
    """

    delta: float = 1e-3
    max_starts: int = 5000
    polished: int = 20
    replicates: int = 200
    confidence: float = 0.95
    held_out: float = 0.2
    seed: int = 0
    progress: bool = False

    def __post_init__(self):
        require(self.delta > 0, "delta", self.delta, "must be above 0")
        require_count("max_starts", self.max_starts)
        require_count("polished", self.polished)
        require_not_negative("replicates", self.replicates)
        require_fraction("confidence", self.confidence)
        require_fraction("held_out", self.held_out)
        require_seed("seed", self.seed)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a fit says at some variables, all of the broadcast shape.

    loss: nats per token. low, high: the interval of the bootstrap, of the law's value and not of a new run. outside:
    True where a variable leaves the fitted range. warning: one line that says which, None where none does.
    """

    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray
    outside: np.ndarray
    warning: str | None


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """How a fit without the runs of the most compute does on them.

    num_runs of them. error: mean |log(measured / predicted)|. bias: mean log(measured / predicted).
    """

    num_runs: int
    error: float
    bias: float


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law fitted to runs.

    law: with the best constants. resampled: the same class with constants [replicates, 1]. widening: how many times
    farther from the best than resampled ones the ends of intervals lie. residuals: log(measured / predicted) [n].
    intervals: constant to (low, high), e^50 where the runs set no limit. ranges: of the runs. held_out: None where it
    was not asked for, compute is unknown or too few runs remain. agreeing: share of the polished starts that ended at
    the best minimum to 1 %: where it is small, look at the intervals. seconds: of the whole fit.
    """

    law: Law
    resampled: Law
    widening: float
    observations: Observations
    residuals: np.ndarray
    intervals: Mapping[str, tuple[float, float]]
    ranges: Ranges
    held_out: HeldOut | None
    agreeing: float
    seconds: float
    config: FitConfig

    @property
    def rms(self) -> float:
        """Root mean square of the residuals: the relative error of a run's loss."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    def predict(self, **variables: Array) -> Prediction:
        """Returns the law's value, its interval and where it extrapolates."""
        require_variables(type(self.law), tuple(variables))
        arrays = dict(zip(variables, np.broadcast_arrays(*variables.values()), strict=True))
        shape = next(iter(arrays.values())).shape
        flat = {name: np.asarray(values, np.float64).ravel() for name, values in arrays.items()}
        tails = np.array([50 - 50 * self.config.confidence, 50 + 50 * self.config.confidence])
        ends = np.percentile(self.resampled.loss(**flat), tails, axis=0).reshape(2, *shape)
        loss = np.asarray(self.law.loss(**arrays))
        low, high = loss * (ends / loss) ** self.widening
        return Prediction(loss, low, high, self.ranges.outside(arrays), self.ranges.warning(arrays))


def fit(
    law: type[Law],
    observations: Observations,
    config: FitConfig | None = None,
    fixed: Mapping[str, float] | None = None,
) -> Fit:
    """Returns `law` fitted to the runs, the constants in `fixed` held. Deterministic by `config.seed`.

    Takes one to a few seconds for a hundred runs and 200 replicates. Raises `CallerError` unless there are more cells
    than constants to fit.
    """
    began, config, fixed = time.monotonic(), config or FitConfig(), dict(fixed or {})
    require_variables(law, tuple(observations.variables))
    names = tuple(name for name in law.constants() if name not in fixed)
    unknown = sorted(set(fixed) - set(law.constants()))
    require(not unknown, "fixed", unknown, f"must be constants of {law.__name__}: {tuple(law.constants())}")
    num_cells = len(np.unique(observations.cells))
    require(num_cells > len(names), "observations", num_cells, f"must have more cells than {len(names)} constants")
    with tqdm.tqdm(total=config.polished + config.replicates, disable=not config.progress, desc=law.__name__) as bar:
        problem = _Problem(law, names, fixed, observations, config.delta)
        best, agreeing = _minimise(problem, config, bar)
        drawn = _bootstrap(problem, best, config, bar)
    freedom = num_cells - len(names)
    # Residuals of n cells and P constants are smaller than errors by sqrt((n - P) / n).
    widening = math.sqrt(num_cells / freedom) * student_widening(freedom, config.confidence)
    tails = np.array([50 - 50 * config.confidence, 50 + 50 * config.confidence])
    ends = problem.law_at(problem.limited(best + widening * (np.percentile(drawn, tails, axis=0) - best)))
    return Fit(
        law=problem.law_at(best, scalar=True),
        resampled=problem.law_at(drawn),
        widening=widening,
        observations=observations,
        residuals=-problem.errors(best[None])[0],
        intervals={name: tuple(getattr(ends, name).ravel().tolist()) for name in names},
        ranges=observations.ranges,
        held_out=_held_out(problem, config),
        agreeing=agreeing,
        seconds=time.monotonic() - began,
        config=config,
    )


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The constants `names` of a law as points [..., P], logarithms where it says so, and their errors on the runs."""

    law: type[Law]
    names: tuple[str, ...]
    fixed: Mapping[str, float]
    runs: Observations
    delta: float

    def law_at(self, points: np.ndarray, *, scalar: bool = False) -> Law:
        """The law with constants [S, 1] of points [S, P], or with numbers of one point [P]."""
        meta, values = self.law.constants(), dict(self.fixed)
        for index, name in enumerate(self.names):
            value = np.exp(points[..., index]) if meta[name]["log"] else points[..., index]
            values[name] = float(value) if scalar else value[..., None]
        return self.law(**values)

    def errors(self, points: np.ndarray) -> np.ndarray:
        """log(predicted / measured) [S, n] at points [S, P], complex for complex ones."""
        with np.errstate(all="ignore"):
            errors = np.log(self.law_at(points).loss(**self.runs.variables)) - np.log(self.runs.loss)
        return np.where(np.isfinite(errors), errors, OFF)

    def jacobian(self, point: np.ndarray) -> np.ndarray:
        """Derivatives [n, P] of the errors at a point [P]."""
        return self.errors(point + 1j * STEP * np.eye(len(point))).imag.T / STEP

    def huber(self, errors: np.ndarray) -> np.ndarray:
        """The loss [S] of errors [S, n]."""
        size = np.abs(errors)
        linear = self.delta * (size - self.delta / 2) if math.isfinite(self.delta) else 0.0
        return np.where(size <= self.delta, size**2 / 2, linear).sum(-1)

    def value_and_gradient(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        errors = self.errors(point[None])[0]
        return float(self.huber(errors)), np.clip(errors, -self.delta, self.delta) @ self.jacobian(point)

    def descend(self, start: np.ndarray, tolerance: float = 1e-12) -> tuple[np.ndarray, float]:
        """Returns the point [P] where Gauss-Newton in a trust region ends from `start`, and the loss there."""
        robust = {"loss": "huber", "f_scale": self.delta} if math.isfinite(self.delta) else {}
        with np.errstate(all="ignore"):  # steps overflow where a constant changes nothing, and are then refused
            found = optimize.least_squares(
                lambda point: self.errors(point[None])[0], start, self.jacobian,
                x_scale="jac", xtol=tolerance, ftol=tolerance, gtol=1e-14, max_nfev=300, **robust,
            )  # fmt: skip
        return self.limited(found.x), found.cost

    def limited(self, points: np.ndarray) -> np.ndarray:
        """Points [..., P] with the logarithms within what counts as no limit."""
        return np.where(self.logs, np.clip(points, -NO_LIMIT, NO_LIMIT), points)

    @property
    def logs(self) -> np.ndarray:
        """Which of the constants are logarithms [P]."""
        return np.array([self.law.constants()[name]["log"] for name in self.names])

    def led_back(self, point: np.ndarray) -> np.ndarray:
        """A point [P] with the logarithms that went astray at the nearest of their starts."""
        starts = [self.law.constants()[name]["starts"] for name in self.names]
        low, high = np.array([min(values) for values in starts]), np.array([max(values) for values in starts])
        astray = self.logs & ((point < low - ASTRAY) | (point > high + ASTRAY))
        return np.where(astray, np.clip(point, low, high), point)


def _minimise(problem: _Problem, config: FitConfig, bar: tqdm.tqdm | None = None) -> tuple[np.ndarray, float]:
    """The best point [P] of the polished starts, and the share of them that agree with it."""
    starts = _grid(problem, config)
    costs = np.concatenate(
        [problem.huber(problem.errors(starts[at : at + CHUNK])) for at in range(0, len(starts), CHUNK)]
    )
    found = []
    for start in starts[np.argsort(costs, kind="stable")[: config.polished]]:
        rough = optimize.minimize(
            problem.value_and_gradient, start, jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 1e-12}
        )
        found.append(problem.descend(rough.x))
        if bar is not None:
            bar.update()
    best, least = min(found, key=lambda result: result[1])
    return best, float(np.mean([cost <= 1.01 * least + 1e-12 for _, cost in found]))


def _grid(problem: _Problem, config: FitConfig) -> np.ndarray:
    """Starts [S, P]: the product of those of every constant, or `max_starts` drawn from it."""
    axes = [np.array(problem.law.constants()[name]["starts"], np.float64) for name in problem.names]
    size = math.prod(len(axis) for axis in axes)
    if size <= config.max_starts:
        return np.array(list(itertools.product(*axes)))
    draw = np.random.default_rng(config.seed)
    return np.stack([draw.choice(axis, config.max_starts) for axis in axes], axis=1)


def _bootstrap(problem: _Problem, best: np.ndarray, config: FitConfig, bar: tqdm.tqdm) -> np.ndarray:
    """Points [replicates, P] fitted to cells drawn with replacement; the best alone for none.

    Each begins at the best, and a second time from where its astray constants are led back to.
    """
    draw = np.random.default_rng(config.seed)
    members = [np.flatnonzero(problem.runs.cells == cell) for cell in np.unique(problem.runs.cells)]
    origins, drawn = np.unique([best, problem.led_back(best)], axis=0), []
    for _ in range(config.replicates):
        chosen = draw.integers(len(members), size=len(members))
        runs = problem.runs.take(np.concatenate([members[cell] for cell in chosen]))
        resampled = dataclasses.replace(problem, runs=runs)
        ends = [resampled.descend(origin, tolerance=1e-6) for origin in origins]
        drawn.append(min(ends, key=lambda end: end[1])[0])
        bar.update()
    return np.array(drawn) if drawn else best[None]


def student_widening(freedom: int, confidence: float) -> float:
    """Returns how many times wider than a normal variable's an interval is whose deviation is known that well.

    In so few degrees of freedom the quantile is Student's (Efron and Tibshirani 1993, chapter 12; Hesterberg 2015,
    "expanded percentile"). Not a number in none.
    """
    tail = (1 + confidence) / 2
    return float(stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)) if freedom else math.nan


def _held_out(problem: _Problem, config: FitConfig) -> HeldOut | None:
    """A fit without the runs of the most compute, tried on them; all runs of one compute stay on one side."""
    runs = problem.runs
    if runs.compute is None or config.held_out == 0:
        return None
    apart = runs.compute >= np.quantile(runs.compute, 1 - config.held_out, method="higher")
    if apart.all() or len(np.unique(runs.cells[~apart])) <= len(problem.names):
        return None
    best, _ = _minimise(dataclasses.replace(problem, runs=runs.take(~apart)), config)
    errors = -dataclasses.replace(problem, runs=runs.take(apart)).errors(best[None])[0]
    return HeldOut(int(apart.sum()), float(np.mean(np.abs(errors))), float(np.mean(errors)))
