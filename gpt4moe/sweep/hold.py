"""What stays fixed while other settings change: quantities of a run, and the binding that keeps each where it was."""

from __future__ import annotations

import functools
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
# So many counts below the target are tried where they cannot be built.
FARTHEST_DOWN = 256
# Turns in which several bindings are derived until none moves what another holds.
MOST_TURNS = 20
MEND = "hold it by a binding that changes it, and that nothing else limits"

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
    """Returns `point` with the bindings that hold its quantities at its own or their targets.

    A binding may move what another holds: they are derived in turn until none changes. Raises `CallerError` where no
    value of a binding comes within a tenth of its target, or where the quantities cannot be held together.
    """
    from gpt4moe.sweep.cells import overrides_of

    bound, multiples = dict(point), dict(config.multiples)

    def reached(name: str, binding: str, count: int) -> float:
        return quantity(name, build(overrides_of({**bound, binding: count * multiples.get(binding, 1)}))[0])

    for _ in range(MOST_TURNS):
        before = dict(bound)
        for name, (binding, _) in config.hold:
            count = _nearest(functools.partial(reached, name, binding), target := point.get(name, targets[name]))
            require(count is not None, name, f"{target:.4g}", f"does not follow from {binding} at {dict(point)}", MEND)
            off = reached(name, binding, count) / target - 1
            constraint = f"cannot be held by {binding}: the nearest value is off by {off:+.1%} at {dict(point)}"
            require(abs(off) < FARTHEST_OFF, name, f"{target:.4g}", constraint, "change multiples or the axes")
            bound[binding] = count * multiples.get(binding, 1)
        if bound == before or len(config.hold) == 1:
            return bound
    constraint = f"cannot be held together at {dict(point)}: deriving one moves another"
    raise CallerError(f"SweepConfig.hold={[name for name, _ in config.hold]} {constraint}; hold fewer of them")


def _nearest(reached: Callable[[int], float], target: float) -> int | None:
    """The count from 1 up whose rising `reached` is nearest the target, None where it never gets there.

    Counts that cannot be built are passed over; raises `CallerError` where none can.
    """
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
            refused = next((error for error in attempts.values() if isinstance(error, CallerError)), None)
            if refused is not None:
                raise refused
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        found = value(middle)
        low, high = (middle, high) if found is None or found < target else (low, middle)
    fitting = [high] if value(high) is not None else []
    for count in range(low, max(low - FARTHEST_DOWN, 0), -1):  # past counts that cannot be built
        found = value(count)
        if found is not None:
            fitting.append(count)
            if found <= target:
                break
    return min(fitting, key=lambda count: abs(value(count) - target))
