"""The numbers behind a figure of a fit: the law along one variable with its band, the constants, the residuals.

Everything is arrays, or rows and dictionaries that go into CSV and JSON as they are; nothing here draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from gpt4moe.analysis.scaling.fitting import Fit, Prediction
from gpt4moe.analysis.scaling.law import require_variables
from gpt4moe.analysis.scaling.observations import Observations
from gpt4moe.config.check import require

AT_LEAST_ONE = ("num_experts", "granularity")
SAME = 0.01  # a run belongs to a curve where its other variables are those of the curve to 1 %


@dataclasses.dataclass(frozen=True)
class Curve:
    """A fitted law along one variable, the others held.

    values: of the variable `along` [n]. held: the other variables. prediction: [n], `outside` is what to shade. runs:
    the fitted runs that lie on the curve.
    """

    along: str
    values: np.ndarray
    held: Mapping[str, float]
    prediction: Prediction
    runs: Observations

    def rows(self) -> list[dict]:
        """One row a point: the variables, `loss`, `low`, `high`, `outside`."""
        said = self.prediction
        columns = zip(self.values, said.loss, said.low, said.high, said.outside, strict=True)
        return [
            {**self.held, self.along: float(value), "loss": float(loss), "low": float(low), "high": float(high)}
            | {"outside": bool(outside)}
            for value, loss, low, high, outside in columns
        ]


def curve(
    fit: Fit,
    along: str,
    values: Sequence[float] | None = None,
    *,
    beyond: float = 4.0,
    num_points: int = 100,
    **held: float,
) -> Curve:
    """Returns the law along a variable with the others held at the values given.

    Without `values` they are evenly spaced in logarithm (of 1 - S for the sparsity) from the fitted range's least to
    its greatest and `beyond` times further on either side, where `outside` is True.
    """
    require_variables(type(fit.law), (along, *held))
    require(beyond >= 1, "beyond", beyond, "must be at least 1")
    grid = np.asarray(values, np.float64) if values is not None else _grid(fit, along, beyond, num_points)
    columns = fit.observations.variables
    near = [np.isclose(columns[name], value, rtol=SAME, atol=1e-12) for name, value in held.items()]
    on_it = np.all(near, axis=0) if near else np.ones(len(fit.observations), bool)
    return Curve(along, grid, held, fit.predict(**{along: grid}, **held), fit.observations.take(on_it))


def summary(fit: Fit) -> dict:
    """Returns the fit as one JSON document: constants with intervals, ranges, errors; no array of runs."""
    constants = {
        name: {"value": getattr(fit.law, name), "low": low, "high": high} for name, (low, high) in fit.intervals.items()
    }
    held = {name: getattr(fit.law, name) for name in fit.law.constants() if name not in constants}
    return {
        "law": type(fit.law).__name__,
        "constants": constants,
        "fixed": held,
        "confidence": fit.config.confidence,
        "ranges": {name: list(bounds) for name, bounds in fit.ranges.bounds.items()},
        "num_runs": len(fit.observations),
        "num_cells": len(np.unique(fit.observations.cells)),
        "rms": fit.rms,
        "held_out": dataclasses.asdict(fit.held_out) if fit.held_out else None,
        "agreeing": fit.agreeing,
        "seconds": fit.seconds,
    }


def residual_rows(fit: Fit) -> list[dict]:
    """Returns one row a run: its variables, `loss`, `predicted`, `residual` = log(loss / predicted), `cell`."""
    runs = fit.observations
    return [
        {name: float(values[index]) for name, values in runs.variables.items()}
        | {"loss": float(runs.loss[index]), "predicted": float(runs.loss[index] / np.exp(fit.residuals[index]))}
        | {"residual": float(fit.residuals[index]), "cell": int(runs.cells[index])}
        for index in range(len(runs))
    ]


def _grid(fit: Fit, along: str, beyond: float, num_points: int) -> np.ndarray:
    low, high = fit.ranges.bounds[along]
    if along == "sparsity":
        return 1 - np.geomspace(1 - low, (1 - high) / beyond, num_points)
    least = max(low / beyond, 1.0) if along in AT_LEAST_ONE else low / beyond
    return np.geomspace(least, high * beyond, num_points)
