"""Dollars, speed and utilisation of serving: what a layout delivers, which layouts none other beats.

In: a `Server` (shape, chip, layout, efficiency), a batch, a context, a price. Out: `Service`, frontiers, ratios. One
replica of `layout.chips` chips has a microbatch of `rows` rows on each of its stages at any time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from gpt4moe.config.check import require_fraction, require_not_negative, require_positive
from gpt4moe.plan.serving.layout import max_sequences
from gpt4moe.plan.serving.rooflines import Server, StageTime, decode_step, prefill_step

SECONDS_PER_HOUR = 3600
LEAST_PROMPT_GAIN = 0.05


@dataclasses.dataclass(frozen=True)
class Service:
    """What one replica delivers at a batch: tokens a second together and to each user, dollars, utilisation.

    rows: of each of `server.layout.stage` microbatches; stage_time: of one stage and step. dollars_per_1k_tokens: of
    decoded tokens at full load, divided by the utilisation of the day.
    """

    server: Server
    rows: float
    context: float
    stage_time: StageTime
    tokens_per_second: float
    user_tokens_per_second: float
    dollars_per_1k_tokens: float
    model_flops_utilization: float
    bandwidth_utilization: float
    sequences: float
    max_sequences: float

    @property
    def chips(self) -> int:
        """Chips of the replica."""
        return self.server.layout.chips

    @property
    def fits(self) -> bool:
        """Whether weights and cache have room."""
        return self.sequences <= self.max_sequences


@dataclasses.dataclass(frozen=True)
class Demand:
    """What is asked of one replica: sequences in flight, tokens in the cache of each, and what a chip's hour costs."""

    sequences: float
    context_tokens: float
    dollars_per_chip_hour: float

    def __post_init__(self) -> None:
        require_positive("sequences", self.sequences)
        require_positive("context", self.context_tokens)
        require_not_negative("price", self.dollars_per_chip_hour)


def serve_demand(server: Server, demand: Demand) -> Service:
    """Returns what a replica delivers that has an equal part of the demand in each of its stages."""
    rows = demand.sequences / server.layout.stage
    return serve(server, rows, demand.context_tokens, demand.dollars_per_chip_hour)


def serve(server: Server, rows: float, context: float, dollars_per_hour: float, utilization: float = 1.0) -> Service:
    """Returns what a replica delivers with `rows` rows a microbatch, each attending to `context` tokens on average.

    Args:
      server: what serves.
      rows: rows of one pipeline microbatch.
      context: tokens in a row's cache, the mean.
      dollars_per_hour: price of one chip's hour, at least 0.
      utilization: share of full load that the day brings, in (0, 1].
    """
    step = decode_step(server, rows, context)
    layout, chip = server.layout, server.chip
    tokens_per_second = rows / step.seconds
    peak = layout.chips * chip.peak_flops
    read_seconds = (step.weights_seconds + step.cache_seconds) * server.efficiency.memory
    return Service(
        server=server,
        rows=rows,
        context=context,
        stage_time=step,
        tokens_per_second=tokens_per_second,
        user_tokens_per_second=1 / (layout.stage * step.seconds),
        dollars_per_1k_tokens=dollars_per_1k_tokens(layout.chips, dollars_per_hour, tokens_per_second, utilization),
        model_flops_utilization=tokens_per_second * server.sizes.flops / peak,
        bandwidth_utilization=read_seconds / step.seconds,
        sequences=rows * layout.stage,
        max_sequences=max_sequences(server.shape, chip, layout, context, server.efficiency),
    )


def dollars_per_1k_tokens(
    chips: int, dollars_per_hour: float, tokens_per_second: float, utilization: float = 1.0
) -> float:
    """Returns the dollars of a thousand tokens: chips rented by the hour over tokens delivered.

    utilization: mean load over full load (DeepSeek's day: 226.75 of 278 nodes, 0.82).
    """
    require_not_negative("price", dollars_per_hour)
    require_positive("tokens_per_second", tokens_per_second)
    require_positive("utilization", utilization)
    require_fraction("utilization", utilization)
    return 1000 * chips * dollars_per_hour / (SECONDS_PER_HOUR * tokens_per_second * utilization)


def blended_dollars_per_1k_tokens(prompt: float, completion: float, prompt_tokens: float, new_tokens: float) -> float:
    """Returns the dollars of a thousand tokens of requests with so many prompt and new tokens, prompts paid too.

    prompt, completion: dollars of a thousand tokens of each.
    """
    return (prompt * prompt_tokens + completion * new_tokens) / (prompt_tokens + new_tokens)


def prefill_tokens_per_second(server: Server, prompts: float, prompt_tokens: float) -> float:
    """Returns the prompt tokens a second of a replica whose stages are all busy with prompts."""
    return prompts * prompt_tokens / prefill_step(server, prompts, prompt_tokens).seconds


def prompts_at_once(server: Server, prompt_tokens: float) -> int:
    """Returns how many prompts a pass of a replica that reads prompts alone takes together.

    Doubled while that brings `LEAST_PROMPT_GAIN` more tokens a second, and weights and cache have room on all stages:
    short prompts alone are too few tokens to be worth the reading of the weights.
    """
    room = max_sequences(server.shape, server.chip, server.layout, prompt_tokens, server.efficiency)
    prompts, speed = 1, prefill_tokens_per_second(server, 1, prompt_tokens)
    while 2 * prompts * server.layout.stage <= room:
        faster = prefill_tokens_per_second(server, 2 * prompts, prompt_tokens)
        if faster < (1 + LEAST_PROMPT_GAIN) * speed:
            break
        prompts, speed = 2 * prompts, faster
    return prompts


def disaggregation_ratio(
    prompt_tokens: float, new_tokens: float, prefill_per_chip: float, decode_per_chip: float
) -> float:
    """Returns how many chips must read prompts for each chip that decodes, so that neither waits.

    prefill_per_chip, decode_per_chip: tokens a second of one chip of each kind.
    """
    require_positive("new_tokens", new_tokens)
    require_positive("prefill_per_chip", prefill_per_chip)
    return prompt_tokens / new_tokens * decode_per_chip / prefill_per_chip


def day_utilization(hourly_loads: Sequence[float]) -> float:
    """Returns mean over peak of a day's loads: the utilisation of chips bought for the peak."""
    peak = max(hourly_loads)
    require_positive("the highest hourly load", peak)
    return sum(hourly_loads) / len(hourly_loads) / peak


def rows_at_speed(server: Server, context: float, user_tokens_per_second: float) -> float:
    """Returns the most rows a microbatch at which every user still gets so many tokens a second, by bisection.

    0 where not even one row is that fast; memory is not asked (`max_sequences`).
    """
    require_positive("user_tokens_per_second", user_tokens_per_second)
    allowed_seconds = 1 / (server.layout.stage * user_tokens_per_second)

    def is_fast(rows: float) -> bool:
        return decode_step(server, rows, context).seconds <= allowed_seconds

    if not is_fast(1):
        return 0.0
    low, high = 1.0, 2.0
    while is_fast(high):
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if is_fast(middle) else (low, middle)
    return low


def frontier(services: Iterable[Service]) -> list[Service]:
    """Returns the services that no other beats: faster for a user, cheaper a token, fewer chips, or equal.

    From fastest to slowest for a user. Of services alike in all three the first stays.
    """
    ordered = sorted(services, key=lambda item: (-item.user_tokens_per_second, item.dollars_per_1k_tokens, item.chips))
    kept: list[Service] = []
    for service in ordered:
        better = (
            other.dollars_per_1k_tokens <= service.dollars_per_1k_tokens and other.chips <= service.chips
            for other in kept
        )
        if not any(better):
            kept.append(service)
    return kept
