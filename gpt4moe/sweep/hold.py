"""What stays fixed while other settings change: quantities of a run, and the binding that keeps each where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt4moe.accounting import flops, parameters
from gpt4moe.config.check import CallerError, require
from gpt4moe.config.run import RunConfig
from gpt4moe.config.sweep import SweepConfig
from gpt4moe.train.schedule import planned_tokens

# Largest multiple that a derived binding may take.
LARGEST = 2**40
FARTHEST_OFF = 0.1

_OF_RUN: dict[str, Callable[[RunConfig], float]] = {
    "active_flops": lambda run: flops.forward_flops_per_token(run.model),
    "active_parameters": lambda run: parameters.count_active(run.model),
    "total_parameters": lambda run: parameters.count(run.model).total,
    "tokens": lambda run: planned_tokens(run.train),
    "train_flops": lambda run: flops.train_flops_per_token(run.model) * planned_tokens(run.train),
}


def quantity(name: str, run: RunConfig) -> float:
    """Returns a quantity of a run: FLOPs of one token forward, parameters, tokens, or FLOPs of the whole training."""
    return _OF_RUN[name](run)


def derive(
    point: Mapping[str, Any],
    config: SweepConfig,
    build: Callable[[Sequence[str]], tuple[RunConfig, str]],
    targets: Mapping[str, float],
) -> dict[str, Any]:
    """Returns `point` with the bindings that hold its quantities, one after the other, at its own or their targets.

    Raises `CallerError` where no value of a binding comes within a tenth of its target.
    """
    from gpt4moe.sweep.cells import overrides_of

    bound, multiples = dict(point), dict(config.multiples)
    for name, (binding, _) in config.hold:

        def reached(count: int, name=name, binding=binding) -> float:
            value = count * multiples.get(binding, 1)
            return quantity(name, build(overrides_of({**bound, binding: value}))[0])

        target = point.get(name, targets[name])
        count = _nearest(reached, target)
        off = reached(count) / target - 1
        constraint = f"cannot be held by {binding}: the nearest value is off by {off:+.1%} at {dict(point)}"
        require(abs(off) < FARTHEST_OFF, name, f"{target:.4g}", constraint, "change multiples or the axes")
        bound[binding] = count * multiples.get(binding, 1)
    return bound


def _nearest(reached: Callable[[int], float], target: float) -> int:
    """The count from 1 up whose rising `reached` is nearest the target; counts that cannot be built are passed over."""
    attempts: dict[int, float | CallerError] = {}

    def value(count: int) -> float | None:
        if count not in attempts:
            try:
                attempts[count] = reached(count)
            except CallerError as error:
                attempts[count] = error
        return None if isinstance(attempts[count], CallerError) else attempts[count]

    high = 1
    while value(high) is None or value(high) < target:
        high *= 2
        if high > LARGEST:
            raise next(error for error in attempts.values() if isinstance(error, CallerError))
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        found = value(middle)
        low, high = (middle, high) if found is None or found < target else (low, middle)
    fitting = [count for count in (low, high) if count >= 1 and value(count) is not None]
    return min(fitting, key=lambda count: abs(value(count) - target))
