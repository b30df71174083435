"""Replicas that the trough of a day does not need, lent to training runs that may be stopped at any time.

In: the day's rates, what a replica serves, how full replicas may be. Out: how many are needed in each hour, the events
at which others close and open, the share of chip-hours that can be lent. Checkpoints of the training runs are theirs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from gpt4moe.config.check import require, require_count, require_fraction, require_not_negative, require_positive
from gpt4moe.plan.serving.cost import prefill_tokens_per_second, serve
from gpt4moe.plan.serving.rooflines import Server
from gpt4moe.plan.serving.traffic import Traffic


@dataclasses.dataclass(frozen=True)
class Lender:
    """Which of `replicas` serve in each hour. Replica i serves in the hours that need more than i of them.

    return_seconds: from calling a replica back to its first request (a training run stops, weights are read); it is
    called so long before the hour that needs it.
    """

    replicas: int
    needed: tuple[int, ...]
    hour_seconds: float = 3600.0
    return_seconds: float = 60.0

    def __post_init__(self) -> None:
        require_count("replicas", self.replicas)
        require_positive("hour_seconds", self.hour_seconds)
        require_not_negative("return_seconds", self.return_seconds)
        shorter = f"must be less than an hour ({self.hour_seconds:g})"
        require(self.return_seconds < self.hour_seconds, "return_seconds", self.return_seconds, shorter)

    def events(self) -> Iterator[tuple[bool, float, int]]:
        """Yields (whether it closes, seconds, index) for each replica and each change of the day, in no order.

        A replica called back opens at once for this simulation's sake, where it was lent until then.
        """
        for index in range(self.replicas):
            was_needed = True
            for hour, needed in enumerate(self.needed):
                is_needed = needed > index
                if is_needed != was_needed:
                    early = self.return_seconds if is_needed else 0.0
                    yield not is_needed, hour * self.hour_seconds - early, index
                was_needed = is_needed

    def lent_fraction(self) -> float:
        """Returns the share of chip-hours lent, where requests end at once: what the simulation tends to."""
        hours = len(self.needed)
        lent = sum(self.replicas - min(needed, self.replicas) for needed in self.needed)
        events = [closes for closes, _, _ in self.events()]
        recalls = len(events) - sum(events)
        return (lent - recalls * self.return_seconds / self.hour_seconds) / (hours * self.replicas)


def requests_per_second(server: Server, rows: int, traffic: Traffic, *, mixed_prefill: bool = True) -> float:
    """Returns the requests a second that one replica serves with all rows full: mean prompt, mean answer.

    A row's context is taken as the prompt and half of the answer, the mean over its life.
    """
    prompt, answer = traffic.prompts.mean_tokens, traffic.outputs.mean_tokens
    context = prompt + mean_context_of_answer(traffic)
    seconds = answer / serve(server, rows, context, 0.0).tokens_per_second
    if mixed_prefill:
        seconds += prompt / prefill_tokens_per_second(server, 1, prompt)
    return 1 / seconds


def mean_context_of_answer(traffic: Traffic) -> float:
    """Returns the tokens of the answer that a row has already, the mean over its steps: E[n^2] / 2 E[n]."""
    mean, kind, sample = traffic.outputs.mean_tokens, traffic.outputs.kind, traffic.outputs.sample
    if sample:
        return sum(length**2 for length in sample) / len(sample) / (2 * mean)
    squares = {"fixed": 1.0, "uniform": 4 / 3, "exponential": 2.0}
    return mean * squares.get(kind, math.exp(traffic.outputs.sigma**2)) / 2


def replicas_needed(hour_rates: Sequence[float], replica_rate: float, target: float = 0.8) -> tuple[int, ...]:
    """Returns how many replicas each hour needs so that each is at most `target` full; at least one.

    hour_rates, replica_rate: requests a second, of the whole cluster by the hour and of one replica at its fullest.
    """
    require_fraction("target utilization", target)
    require_positive("target utilization", target)
    require_positive("requests a second of a replica", replica_rate)
    return tuple(max(1, math.ceil(rate / (target * replica_rate) - 1e-9)) for rate in hour_rates)
