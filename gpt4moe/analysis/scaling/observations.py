"""Runs as a fit sees them: variables, loss, which runs are seeds of one cell, what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from gpt4moe.analysis.scaling.chinchilla import FLOPS_PER_PARAMETER_AND_TOKEN
from gpt4moe.analysis.scaling.law import Ranges
from gpt4moe.config.check import require


@dataclasses.dataclass(frozen=True)
class Observations:
    """n runs. Make them with `observe`.

    variables: name (as in `law`) to float64 [n]. loss: nats per token [n]. cells: int [n], the same for runs that are
    resampled together. compute: FLOPs [n], None where nothing says them.
    """

    variables: Mapping[str, np.ndarray]
    loss: np.ndarray
    cells: np.ndarray
    compute: np.ndarray | None

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, which: np.ndarray) -> Observations:
        """Returns the runs of these indices or of this mask, in that order."""
        variables = {name: values[which] for name, values in self.variables.items()}
        compute = None if self.compute is None else self.compute[which]
        return Observations(variables, self.loss[which], self.cells[which], compute)

    @property
    def ranges(self) -> Ranges:
        """The box of the variables."""
        return Ranges({name: (float(values.min()), float(values.max())) for name, values in self.variables.items()})


def observe(
    loss: Sequence[float],
    *,
    cells: Sequence | None = None,
    compute: Sequence[float] | None = None,
    **variables: Sequence[float],
) -> Observations:
    """Returns the runs with these losses and variables, one entry a run.

    cells: a label for each run, equal for the seeds of one cell; None takes runs that agree in all variables as seeds.
    compute: training FLOPs; None takes 6 active_parameters tokens, or without tokens, as at one budget, the parameters.
    A run that diverged has no place here: raises `CallerError` for a loss that is not a finite number above 0.
    """
    columns = {name: np.asarray(values, np.float64) for name, values in variables.items()}
    losses = np.asarray(loss, np.float64)
    require(losses.ndim == 1 and len(losses) > 0, "loss", losses.shape, "must be one number a run")
    for name, values in {"loss": losses, **columns}.items():
        require(values.shape == losses.shape, name, values.shape, f"must have {len(losses)} entries, one a run")
        least = -np.inf if name == "sparsity" else 0.0
        sound = np.isfinite(values) & (values > least)
        require(bool(sound.all()), name, values[~sound][:3].tolist(), "must be finite and above 0", "drop those runs")
    if cells is None:
        _, labels = np.unique(np.stack(list(columns.values()), axis=1), axis=0, return_inverse=True)
    else:
        require(len(cells) == len(losses), "cells", len(cells), f"must have {len(losses)} entries, one a run")
        _, labels = np.unique(np.array([repr(cell) for cell in cells]), return_inverse=True)
    flops = np.asarray(compute, np.float64) if compute is not None else _compute(columns)
    require(flops is None or flops.shape == losses.shape, "compute", flops, "must have one entry a run")
    return Observations(columns, losses, labels.ravel(), flops)


def _compute(columns: Mapping[str, np.ndarray]) -> np.ndarray | None:
    if "active_parameters" not in columns:
        return None
    return FLOPS_PER_PARAMETER_AND_TOKEN * columns["active_parameters"] * columns.get("tokens", 1.0)
