"""Why 16 experts and not 64 or 128: the same model with more or fewer, dollars to train and dollars to serve out.

Experts leave FLOPs a token alone. They save training tokens to the same loss, how many is a premise; they have to be
held and read from memory by whoever serves, with more chips, more stages and more sequences in flight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from gpt4moe.accounting import flops, parameters
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import require, require_count
from gpt4moe.plan.serving.cost import Demand, serve_demand
from gpt4moe.plan.serving.layout import ServeLayout, cache_bytes_per_chip, weight_bytes_per_chip
from gpt4moe.plan.serving.rooflines import Server

# Switch-Base with 64 experts needs a seventh of the steps of T5-Base (Fedus et al. 2022, section 3.1): a small model.
SWITCH_SAVING = 1 - (1 / 7) ** (1 / math.log2(64))


@dataclasses.dataclass(frozen=True)
class Option:
    """One number of experts. tokens_per_second_of_a_user: of one sequence; on_frontier: nothing is cheaper in both.

    fits: whether weights and cache have room on the serving chips.
    """

    num_experts: int
    parameters: int
    serving_chips: int
    train_dollars: float
    serve_dollars_per_1k_tokens: float
    tokens_per_second_of_a_user: float
    fits: bool = True
    on_frontier: bool = False


def options(server: Server, counts: Sequence[int], demand: Demand, train_dollars: float, saving: float) -> list[Option]:
    """Returns an option for each count of experts, in their order.

    server: for the model as it is; other counts get stages in proportion to their weights and cache, so that a chip
    holds the same, but no more than layers. train_dollars: of the model as it is; saving: share of the training tokens
    that each doubling of the experts saves at the same loss.
    """
    require(0 <= saving < 1, "saving", saving, "must be at least 0 and below 1")
    found = [_option(server, count, demand, train_dollars, saving) for count in counts]
    best = [not any(_is_better(other, one) for other in found) for one in found]
    return [dataclasses.replace(one, on_frontier=keep) for one, keep in zip(found, best, strict=True)]


def break_even_tokens(few: Option, many: Option) -> float | None:
    """Returns how many generated tokens use up what `many` experts save in training; None where they save nothing."""
    saved = few.train_dollars - many.train_dollars
    dearer = (many.serve_dollars_per_1k_tokens - few.serve_dollars_per_1k_tokens) / 1000
    return saved / dearer if saved > 0 and dearer > 0 else None


def cheapest(found: Sequence[Option], served_tokens: float) -> Option:
    """Returns the option with the fewest dollars to train once and generate so many tokens."""
    return min(found, key=lambda one: one.train_dollars + served_tokens / 1000 * one.serve_dollars_per_1k_tokens)


def _option(server: Server, count: int, demand: Demand, train_dollars: float, saving: float) -> Option:
    shape = server.shape
    require_count("num_experts", count, shape.experts_per_token)
    changed = dataclasses.replace(shape, num_experts=count)
    held = [_bytes_per_chip(each, server.layout, demand) for each in (changed, shape)]
    stages = min(max(math.ceil(server.layout.stage * held[0] / held[1]), 1), shape.num_layers)
    own = dataclasses.replace(server, shape=changed, layout=dataclasses.replace(server.layout, stage=stages))
    service = serve_demand(own, demand)
    per_token = flops.train_flops_per_token(changed) / flops.train_flops_per_token(shape)
    tokens = (1 - saving) ** math.log2(count / shape.num_experts)
    return Option(
        num_experts=count,
        parameters=parameters.count(changed).total,
        serving_chips=service.chips,
        train_dollars=train_dollars * per_token * tokens,
        serve_dollars_per_1k_tokens=service.dollars_per_1k_tokens,
        tokens_per_second_of_a_user=service.user_tokens_per_second,
        fits=service.fits,
    )


def _bytes_per_chip(shape: Shape, layout: ServeLayout, demand: Demand) -> float:
    cache = cache_bytes_per_chip(shape, layout, demand.sequences, demand.context_tokens)
    return weight_bytes_per_chip(shape, layout) + cache


def _is_better(one: Option, other: Option) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("train_dollars", "serve_dollars_per_1k_tokens")]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
