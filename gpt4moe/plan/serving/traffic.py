"""Requests to a serving cluster: when they come, how long their prompts and answers are.

In: a rate, lengths, the course of a day, a seed's generator. Out: `Request` in order of arrival.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from gpt4moe.config.check import require, require_count, require_not_negative, require_positive
from gpt4moe.plan.serving.batching import Lengths

HOURS_PER_DAY = 24


@dataclasses.dataclass(frozen=True)
class Request:
    """One request: when it arrives, tokens of its prompt, tokens that it will generate."""

    arrival_seconds: float
    prompt_tokens: int
    new_tokens: int

    @property
    def cache_tokens(self) -> int:
        """Tokens for which room in the cache is kept until it ends."""
        return self.prompt_tokens + self.new_tokens


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Poisson arrivals at a mean rate, with a day's course where `hourly` gives one.

    hourly: relative rates of the 24 hours, of any scale. hour_seconds: what an hour lasts in the simulation; fewer than
    3,600 show a whole day in less time, as long as an hour stays much longer than a request.
    """

    requests_per_second: float
    prompts: Lengths = dataclasses.field(default_factory=lambda: Lengths(mean=1024))
    outputs: Lengths = dataclasses.field(default_factory=lambda: Lengths(mean=256))
    hourly: tuple[float, ...] = ()
    hour_seconds: float = 3600.0

    def __post_init__(self) -> None:
        require_positive("requests per second", self.requests_per_second)
        require_positive("hour_seconds", self.hour_seconds)
        if self.hourly:
            count = len(self.hourly)
            require(count == HOURS_PER_DAY, "hourly", count, f"must be {HOURS_PER_DAY} rates")
            for rate in self.hourly:
                require_not_negative("an hourly rate", rate)
            require_positive("the sum of hourly rates", float(sum(self.hourly)))

    def hour_rates(self) -> tuple[float, ...]:
        """Returns the requests a second of each hour; their mean is `requests_per_second`."""
        if not self.hourly:
            return (self.requests_per_second,) * HOURS_PER_DAY
        mean = sum(self.hourly) / HOURS_PER_DAY
        return tuple(self.requests_per_second * rate / mean for rate in self.hourly)


def day_curve(peak_hour: float = 15.0, trough_over_peak: float = 0.3) -> tuple[float, ...]:
    """Returns 24 relative rates on a cosine: 1 in the hour of the peak, `trough_over_peak` twelve hours later."""
    middle, swing = (1 + trough_over_peak) / 2, (1 - trough_over_peak) / 2
    hours = (2 * math.pi * (hour - peak_hour) / HOURS_PER_DAY for hour in range(HOURS_PER_DAY))
    return tuple(middle + swing * math.cos(angle) for angle in hours)


def poisson_requests(traffic: Traffic, count: int, generator: Any) -> list[Request]:
    """Returns `count` requests with exponential gaps, at the mean rate all the time."""
    require_count("requests", count)
    gaps = generator.exponential(1 / traffic.requests_per_second, count)
    return with_lengths(traffic, gaps.cumsum(), generator)


def day_requests(traffic: Traffic, generator: Any) -> list[Request]:
    """Returns the requests of one day: in each hour a Poisson number of them, spread evenly at random."""
    import numpy as np

    rates = np.asarray(traffic.hour_rates()) * traffic.hour_seconds
    counts = generator.poisson(rates)
    starts = np.repeat(np.arange(HOURS_PER_DAY), counts)
    arrivals = np.sort(starts + generator.random(counts.sum())) * traffic.hour_seconds
    return with_lengths(traffic, arrivals, generator)


def with_lengths(traffic: Traffic, arrivals: Sequence[float], generator: Any) -> list[Request]:
    """Returns a request for each given arrival, in seconds, with lengths drawn from the traffic's."""
    prompts = traffic.prompts.draw(generator, len(arrivals))
    outputs = traffic.outputs.draw(generator, len(arrivals))
    return [Request(float(at), int(p), int(n)) for at, p, n in zip(arrivals, prompts, outputs, strict=True)]
