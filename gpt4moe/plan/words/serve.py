"""What `gpt4moe plan serve` answers: the frontier of speed, dollars and chips of a served model, and a simulation.

In: flags, a model. Out: the JSON document (seconds, bytes, dollars, tokens) and what makes text of it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

from gpt4moe.accounting import parameters
from gpt4moe.config.check import require, require_positive
from gpt4moe.plan.serving.batching import Lengths, continuous_batching_gain
from gpt4moe.plan.serving.cost import (
    Service,
    blended_dollars_per_1k_tokens,
    disaggregation_ratio,
    prefill_tokens_per_second,
    prompts_at_once,
)
from gpt4moe.plan.serving.expert_load import max_expert_rows
from gpt4moe.plan.serving.frontier import Question, sweep
from gpt4moe.plan.serving.layout import WEIGHT_BYTES, Efficiency, total_weight_bytes
from gpt4moe.plan.serving.rooflines import Server, critical_rows, prefill_step
from gpt4moe.plan.words.chosen import chip_from, price_from, shape_from
from gpt4moe.plan.words.command import Build
from gpt4moe.plan.words.serve_text import to_text

# Tokens a second that a reader of 250 and of 1,000 words a minute takes in, at two tokens a word.
READING_SPEEDS = (250 * 2 / 60, 1000 * 2 / 60)


def answer(args: argparse.Namespace, build: Build) -> tuple[dict, Callable[[dict], str]]:
    """Returns the JSON document and what makes text of it; draws --plot on the way."""
    require_positive("prompt_tokens", args.prompt_tokens)
    require_positive("new_tokens", args.new_tokens)
    if args.min_speed is not None:
        require_positive("min_speed", args.min_speed)
    question = _question(args, build)
    found = sweep(question)
    speeds = (args.min_speed,) if args.min_speed else READING_SPEEDS
    document = _about(question, args) | {
        "considered": len(found.services),
        "too_large": found.too_large,
        "nearest_short_bytes": found.short_bytes,
        "frontier": [_row(item, args) for item in found.frontier],
        "cheapest": [_cheapest(found.cheapest(speed), speed, args) for speed in speeds],
    }
    if args.simulate:
        from gpt4moe.plan.words.serve_simulated import simulated

        chosen = found.cheapest(args.min_speed or 0.0)
        require(chosen is not None, "min_speed", args.min_speed, "is more than any layout reaches", "lower it")
        document["simulation"] = simulated(args, question, chosen)
    if args.plot:
        from gpt4moe.plan.words.serve_picture import draw_frontier

        document["plot"] = draw_frontier(document, args.plot)
    return document, to_text


def _question(args: argparse.Namespace, build: Build) -> Question:
    shape, chip = shape_from(args, build), chip_from(args)
    weights = tuple(args.weights.split(","))
    for name in weights:
        require(name in WEIGHT_BYTES, "weights", name, f"must be in {tuple(WEIGHT_BYTES)}")
    fixed = {name: getattr(args, name) for name in ("tensor", "stage", "expert", "cache")}
    return Question(
        shape,
        chip,
        args.num_chips,
        args.context,
        price_from(args, chip),
        Efficiency(args.matmul_efficiency, args.memory_efficiency, args.link_efficiency),
        args.utilization,
        weights,
        rows=args.batch,
        **fixed,
    )


def _about(question: Question, args: argparse.Namespace) -> dict:
    """What was asked, and what the shape and the chip say before any layout."""
    shape, chip = question.shape, question.chip
    return {
        "shape": shape.name,
        "total_parameters": parameters.count(shape).total,
        "active_parameters": parameters.count_active(shape),
        "num_layers": shape.num_layers,
        "chip": chip.name,
        "num_chips": question.num_chips,
        "dollars_per_chip_hour": question.dollars_per_hour,
        "context": question.context,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "usable_bytes": question.num_chips * chip.memory_bytes * question.efficiency.usable_memory,
        "critical_tokens": {name: critical_rows(chip, name, shape) for name in question.weights},
        "efficiency": dataclasses.asdict(question.efficiency),
    }


def _row(service: Service, args: argparse.Namespace) -> dict:
    """One service: layout, batch, what it delivers, where a stage's time goes; prompts at the same layout."""
    server, layout, shape = service.server, service.server.layout, service.server.shape
    prompt = prompt_numbers(server, args.prompt_tokens, service.dollars_per_1k_tokens, service.tokens_per_second)
    blended = blended_dollars_per_1k_tokens(
        prompt["prompt_dollars_per_1k_tokens"], service.dollars_per_1k_tokens, args.prompt_tokens, args.new_tokens
    )
    per_chip = service.tokens_per_second / layout.chips
    return (
        dataclasses.asdict(layout)
        | {
            "chips": layout.chips,
            "replicas": args.num_chips // layout.chips,
            "rows": service.rows,
            "sequences": service.sequences,
            "max_sequences": service.max_sequences,
            "fullest_expert_rows": max_expert_rows(shape.num_experts, shape.experts_per_token, service.rows),
            "continuous_batching_gain": continuous_batching_gain(
                Lengths(args.lengths, args.new_tokens), int(service.rows)
            ),
            "weight_bytes": total_weight_bytes(server.shape, layout),
            "tokens_per_second": service.tokens_per_second,
            "user_tokens_per_second": service.user_tokens_per_second,
            "dollars_per_1k_tokens": service.dollars_per_1k_tokens,
            "blended_dollars_per_1k_tokens": blended,
            "model_flops_utilization": service.model_flops_utilization,
            "bandwidth_utilization": service.bandwidth_utilization,
            "stage_seconds": dataclasses.asdict(service.stage_time) | {"seconds": service.stage_time.seconds},
            "prefill_chips_per_decode_chip": disaggregation_ratio(
                args.prompt_tokens, args.new_tokens, prompt["prompt_tokens_per_second"] / layout.chips, per_chip
            ),
        }
        | prompt
    )


def prompt_numbers(server: Server, prompt_tokens: int, decode_dollars: float, decode_speed: float) -> dict:
    """Returns what prompts cost on the same replica: seconds to the first token, tokens a second, dollars.

    Seconds are of a prompt alone, tokens a second and dollars of as many at once as pay (`prompts_at_once`).
    decode_dollars: of a thousand decoded tokens at `decode_speed` tokens a second: a second costs the same for both.
    """
    step, prompts = prefill_step(server, 1, prompt_tokens), prompts_at_once(server, prompt_tokens)
    speed = prefill_tokens_per_second(server, prompts, prompt_tokens)
    return {
        "prompts_at_once": prompts,
        "first_token_seconds": step.seconds * server.layout.stage,
        "prompt_tokens_per_second": speed,
        "prompt_dollars_per_1k_tokens": decode_dollars * decode_speed / speed,
    }


def _cheapest(service: Service | None, speed: float, args: argparse.Namespace) -> dict:
    """The cheapest service at a user's speed, or that none is that fast."""
    return {"min_speed": speed} | ({"service": _row(service, args)} if service else {"service": None})
