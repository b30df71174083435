"""All layouts and batches in which a model can be served on a cluster, what each delivers, which none other beats.

In: shape, chip, number of chips, what is fixed. Out: `Sweep`: services that fit, how many did not, the frontier.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import CallerError, require, require_count, require_positive
from gpt4moe.plan.serving.cost import Service, frontier, serve
from gpt4moe.plan.serving.layout import CACHES, Efficiency, ServeLayout, max_sequences, weight_bytes_per_chip
from gpt4moe.plan.serving.rooflines import Server

MOST_TENSOR = 64
MOST_ROWS = 2**14
LEAST_2D = 16  # chips from which a matrix cut along both its dims can win


@dataclasses.dataclass(frozen=True)
class Question:
    """What is to be served and what is fixed; None is free. context: mean tokens of a row's cache."""

    shape: Shape
    chip: Chip
    num_chips: int
    context: int
    dollars_per_hour: float
    efficiency: Efficiency = dataclasses.field(default_factory=Efficiency)
    utilization: float = 1.0
    weights: tuple[str, ...] = ("bfloat16",)
    tensor: int | None = None
    stage: int | None = None
    expert: int | None = None
    cache: str | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        require_count("num_chips", self.num_chips)
        require_positive("context", self.context)
        for name in ("tensor", "stage", "expert", "rows"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))
        least = (self.tensor or 1) * (self.stage or 1) * (self.expert or 1)
        constraint = f"must be at least tensor x stage x expert ({least})"
        require(self.num_chips >= least, "num_chips", self.num_chips, constraint)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """services: all that fit. too_large: layouts whose weights or least batch do not; short_bytes: of the nearest."""

    services: tuple[Service, ...]
    frontier: tuple[Service, ...]
    too_large: int
    short_bytes: float | None

    def cheapest(self, least_speed: float = 0.0) -> Service | None:
        """Returns the cheapest service that gives every user at least so many tokens a second, None without any."""
        fast = [item for item in self.frontier if item.user_tokens_per_second >= least_speed]
        return min(fast, key=lambda item: (item.dollars_per_1k_tokens, item.chips), default=None)


def sweep(question: Question) -> Sweep:
    """Returns everything that fits and the frontier; raises `CallerError` where nothing fits."""
    services, too_large, short = [], 0, []
    for layout in layouts(question):
        server = Server(question.shape, question.chip, layout, question.efficiency)
        room = max_sequences(question.shape, question.chip, layout, question.context, question.efficiency)
        batches = list(_batches(question, layout, room))
        too_large += not batches
        if not batches:
            usable = question.efficiency.usable_memory * question.chip.memory_bytes
            short.append(weight_bytes_per_chip(question.shape, layout) - usable)
        price, utilization = question.dollars_per_hour, question.utilization
        services += [serve(server, rows, question.context, price, utilization) for rows in batches]
    nearest = min((item for item in short if item > 0), default=None)
    if not services:
        roomiest = max(
            max_sequences(question.shape, question.chip, layout, question.context, question.efficiency)
            for layout in layouts(question)
        )
        if roomiest and question.rows:
            most = f"is more than any layout holds ({roomiest:,.0f} sequences of {question.context:,} tokens)"
            raise CallerError(f"--batch={question.rows} rows for each stage {most}; lower it")
        by = f"the weights alone by {nearest / 1e9:,.1f} GB a chip" if nearest else "the cache of the smallest batch"
        mend = "raise --num_chips, or choose 8-bit --weights or a shorter --context"
        raise CallerError(f"num_chips={question.num_chips} hold no layout, {by} too large; {mend}")
    return Sweep(tuple(services), tuple(frontier(services)), too_large, nearest)


def layouts(question: Question) -> Iterator[ServeLayout]:
    """Yields the layouts to try; raises `CallerError` where a fixed axis does not divide the shape."""
    shape, chip = question.shape, question.chip
    most = question.num_chips if chip.network else 1
    tensors = _fixed(question.tensor) or _tensor_sizes(shape, chip)
    experts = _fixed(question.expert) or _divisors(shape.num_experts if shape.num_moe_layers else 1)
    stages = _fixed(question.stage) or _divisors(shape.num_layers)
    for tensor, expert, stage in itertools.product(tensors, experts, stages):
        if tensor * expert * stage > most:
            continue
        caches, feed_forwards = _caches(question, tensor), _feed_forwards(chip, tensor)
        for cache, feed_forward, weights in itertools.product(caches, feed_forwards, question.weights):
            yield ServeLayout(tensor, stage, expert, weights, cache, feed_forward)


def _fixed(size: int | None) -> list[int]:
    return [size] if size else []


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _tensor_sizes(shape: Shape, chip: Chip) -> list[int]:
    """Powers of two that divide what is sliced, inside one domain of fast links."""
    most = min(MOST_TENSOR, chip.network.domain_chips) if chip.network else 1
    widths = (shape.model_dim, shape.hidden_dim, shape.expert_hidden_dim)
    powers = (2**power for power in range(most.bit_length()))
    return [size for size in powers if size <= most and all(width % size == 0 for width in widths)]


def _caches(question: Question, tensor: int) -> tuple[str, ...]:
    if question.cache:
        return (question.cache,)
    heads = 1 if question.shape.latent else question.shape.num_kv_heads
    return CACHES if heads % tensor else CACHES[:1]


def _feed_forwards(chip: Chip, tensor: int) -> tuple[str, ...]:
    wide = tensor >= LEAST_2D and chip.network and chip.network.torus_axes
    return ("stationary_1d", "stationary_2d") if wide else ("stationary_1d",)


def _batches(question: Question, layout: ServeLayout, room: float) -> Iterator[int]:
    """Rows of a microbatch that fit: powers of two and the most. Every group, and by batch every chip, has one."""
    least = layout.expert * (layout.tensor if layout.cache == "batch" else 1)
    most = min(MOST_ROWS, int(room // layout.stage))
    if question.rows:
        if least <= question.rows <= most:
            yield question.rows
        return
    rows = 1
    while rows <= most:
        if rows >= least:
            yield rows
        rows *= 2
    if most >= least and most & (most - 1):
        yield most
