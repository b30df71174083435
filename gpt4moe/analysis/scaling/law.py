"""What a scaling law is: a frozen dataclass of named constants whose `loss` takes arrays of named variables.

The variables have one name and one meaning in all laws, so that a table of runs goes into any of them:

    active_parameters   parameters that one token meets; of a dense model all of them
    total_parameters    parameters of all experts, without embeddings (of a sweep's results: `non_embedding_parameters`)
    tokens              training tokens, repeated ones counted each time
    unique_tokens       tokens of the training data that differ
    num_experts         experts of a routed layer, 1 for a dense model
    granularity         how many times narrower than the dense feed-forward an expert is
    sparsity            share of the experts that a token leaves out, (E - K) / E
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Mapping, Sequence

import numpy as np

from gpt4moe.config.check import require

Array = np.ndarray | float


def constant(starts: Sequence[float], *, log: bool = False):
    """Returns the dataclass field of a constant: where its fits start, as its natural logarithm where `log`."""
    return dataclasses.field(metadata={"starts": tuple(starts), "log": log})


class Law(abc.ABC):
    """A frozen dataclass of constants, every one declared by `constant`.

    `loss` is written in numpy functions that take complex numbers and constants that broadcast against the variables:
    fits evaluate many starts at once and differentiate by a complex step.
    """

    @abc.abstractmethod
    def loss(self, **variables: Array) -> Array:
        """Returns nats per token at the variables, which broadcast."""

    @classmethod
    def variables(cls) -> tuple[str, ...]:
        """The names of what the loss depends on."""
        return tuple(inspect.signature(cls.loss).parameters)[1:]

    @classmethod
    def constants(cls) -> dict[str, Mapping]:
        """Name to `starts` and `log` of every constant."""
        return {field.name: field.metadata for field in dataclasses.fields(cls)}


@dataclasses.dataclass(frozen=True)
class Ranges:
    """The box that runs cover: variable to (least, greatest). What lies outside of it is extrapolation.

    A corner of the box may be as far from any run as a point outside: this is the least that a figure must shade.
    """

    bounds: Mapping[str, tuple[float, float]]

    def outside(self, variables: Mapping[str, Array]) -> np.ndarray:
        """True where any variable lies outside; a variable without bounds never does. Shape of the broadcast."""
        values = dict(zip(variables, np.broadcast_arrays(*variables.values()), strict=True))
        slack = 1e-9  # a grid made from the bounds themselves stays inside
        beyond = [
            (values[name] < low - slack * abs(low)) | (values[name] > high + slack * abs(high))
            for name, (low, high) in self.bounds.items()
            if name in values
        ]
        return np.any(beyond, axis=0) if beyond else np.zeros(np.broadcast(*values.values()).shape, bool)

    def warning(self, variables: Mapping[str, Array]) -> str | None:
        """One line that says which variables leave their range, None where none does."""
        beyond = [
            f"{name} {np.min(variables[name]):.3g} .. {np.max(variables[name]):.3g} (fitted on {low:.3g} .. {high:.3g})"
            for name, (low, high) in self.bounds.items()
            if name in variables and self.outside({name: variables[name]}).any()
        ]
        return f"extrapolates: {', '.join(beyond)}" if beyond else None


@dataclasses.dataclass(frozen=True)
class Published:
    """A law with constants from the literature: where they are from, and the ranges they were fitted on, as known."""

    law: Law
    source: str
    ranges: Ranges

    def loss(self, **variables: Array) -> Array:
        """Returns nats per token of the source's own tokenizer and data."""
        return self.law.loss(**variables)


def require_variables(law: type[Law], given: Sequence[str]) -> None:
    """Raises unless `given` are the names of the law's variables."""
    wanted = law.variables()
    require(set(given) == set(wanted), "variables", sorted(given), f"must be those of {law.__name__}: {wanted}")
