"""`gpt4moe plan explain`: the waterfall of a training run, from the peak of its chips to the tokens it delivers."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.summary import scaled
from gpt4moe.plan import waterfall
from gpt4moe.plan.goodput import HOUR_SECONDS
from gpt4moe.plan.step_breakdown import Division, break_down
from gpt4moe.plan.training_job import job_from, shape_from


def answer(args: argparse.Namespace, build: Any) -> tuple[dict, Callable[[dict], str]]:
    """Returns the JSON document of `plan explain` and the function that makes text of it."""
    shape, chip = shape_from(args, build), chip_named(args.chip)
    division = Division(
        args.num_chips, args.tensor, args.stages, args.virtual_stages, args.expert, args.microbatch_rows
    )
    step = break_down(shape, chip, division, args.batch_tokens, args.sequence_length, args.remat, args.imbalance)
    job = job_from(args, build, step.utilization)
    bars = waterfall.waterfall(step.ideal_seconds, step.lost_seconds, job.goodput)
    document = {
        "shape": shape.name,
        "chip": chip.name,
        "num_chips": args.num_chips,
        "replicas": division.replicas,
        "step_seconds": step.seconds,
        "model_flops_utilization": step.utilization,
        "goodput": job.goodput,
        "delivered_utilization": step.utilization * job.goodput,
        "tokens_per_second": args.batch_tokens / step.seconds * job.goodput,
        "days": job.seconds / (24 * HOUR_SECONDS),
        "dollars": job.dollars,
        "bars": [dataclasses.asdict(bar) for bar in bars],
    }
    if args.plot:
        from gpt4moe.plan import pictures

        pictures.write_png([pictures.waterfall_picture(bars)], args.plot)
    return document, format_explanation


def format_explanation(document: dict) -> str:
    """Returns the document of `plan explain` as a table to read."""
    found = document
    bars = [waterfall.Bar(**bar) for bar in found["bars"]]
    return "\n".join(
        [
            f"{found['shape']} on {found['num_chips']:,} x {found['chip']}, {found['replicas']} replicas: a step of "
            f"{found['step_seconds']:.2f} s",
            waterfall.format_bars(bars),
            f"delivered: {found['delivered_utilization']:.1%} of the peak, {found['tokens_per_second']:,.0f} tokens/s, "
            f"{found['days']:.1f} days, ${scaled(found['dollars']).strip()}",
        ]
    )
