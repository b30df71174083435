"""`gpt4moe plan explain`: the waterfall of a training run, from the peak of its chips to the tokens it delivers.

In: flags, a model. Out: the JSON document (seconds, bytes, dollars, the constants of the software) and its text.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

from gpt4moe.accounting.summary import scaled
from gpt4moe.config.check import require
from gpt4moe.plan.money.goodput import HOUR_SECONDS
from gpt4moe.plan.training import memory, stacks, waterfall
from gpt4moe.plan.training.stacks import Stack
from gpt4moe.plan.training.step_losses import step_losses, whole_batch
from gpt4moe.plan.words.chosen import chip_from, job_from, layout_from, sequence_length_from, shape_from, stack_from
from gpt4moe.plan.words.command import Build

SHARES = ("data_overlap", "tensor_overlap", "context_overlap", "expert_overlap", "stage_overlap", "network_share")


def answer(args: argparse.Namespace, build: Build) -> tuple[dict, Callable[[dict], str]]:
    """Returns the JSON document of `plan explain` and the function that makes text of it."""
    shape, chip = shape_from(args, build), chip_from(args)
    layout, (stack, is_calibrated) = layout_from(args, shape), stack_from(args, chip)
    require(args.batch_tokens is not None, "--batch_tokens", None, "must be given")
    require(args.numerics in memory.NUMERICS, "--numerics", args.numerics, f"must be in {', '.join(memory.NUMERICS)}")
    length = sequence_length_from(args, build)
    batch = whole_batch(layout, args.batch_tokens, length)
    found = step_losses(
        shape, layout, chip, batch, length, stack=stack, num_chips=args.num_chips
    )  # fmt: skip
    job = job_from(args, shape, chip, found.utilization)
    bars = waterfall.waterfall(found.ideal_seconds, found.lost_seconds, job.goodput)
    needed = memory.estimate(
        shape, layout, chip, sequence_length=length, microbatches=found.step.microbatches,
        numerics=dataclasses.replace(memory.NUMERICS[args.numerics], flash=stack.flash),
    )  # fmt: skip
    document = {
        "shape": shape.name,
        "chip": chip.name,
        "num_chips": args.num_chips,
        "layout": dataclasses.asdict(layout),
        "replicas": layout.data,
        "batch_tokens": batch,
        "microbatches": found.step.microbatches,
        "step_seconds": found.seconds,
        "model_flops_utilization": found.utilization,
        "goodput": job.goodput,
        "delivered_utilization": found.utilization * job.goodput,
        "tokens_per_second": batch / found.seconds * job.goodput,
        "days": job.seconds / (24 * HOUR_SECONDS),
        "dollars": job.dollars,
        "bars": [dataclasses.asdict(bar) for bar in bars],
        "memory_bytes": needed.total_bytes,
        "chip_memory_bytes": needed.chip_bytes,
        "memory_parts": needed.parts,
        "stack": dataclasses.asdict(stack) | constants(chip.name),
        "is_calibrated": is_calibrated,
    }
    if args.plot:
        from gpt4moe.plan.words import pictures

        pictures.write_png([pictures.waterfall_picture(bars)], args.plot)
    return document, format_explanation


def constants(chip_name: str) -> dict[str, float]:
    """Returns what is the same for all software: shares of the data sheet that a chip reaches, in time estimates."""
    return {
        "matmul_efficiency": stacks.matmul_efficiency(chip_name),
        "memory_efficiency": stacks.MEMORY_EFFICIENCY,
        "scale_up_efficiency": stacks.SCALE_UP_EFFICIENCY,
        "scale_out_efficiency": stacks.SCALE_OUT_EFFICIENCY,
    }


def format_explanation(document: dict) -> str:
    """Returns the document of `plan explain` as a table to read."""
    found = document
    bars = [waterfall.Bar(**bar) for bar in found["bars"]]
    needed, there = found["memory_bytes"] / 1e9, found["chip_memory_bytes"] / 1e9
    fits = "fits" if needed <= there else f"does not fit by {needed - there:.1f}"
    return "\n".join(
        [
            f"{found['shape']} on {found['num_chips']:,} x {found['chip']}, {found['replicas']} replicas: a step of "
            f"{found['step_seconds']:.2f} s, {scaled(found['batch_tokens']).strip()} tokens in "
            f"{found['microbatches']} microbatches",
            waterfall.format_bars(bars),
            f"delivered: {found['delivered_utilization']:.1%} of the peak, {found['tokens_per_second']:,.0f} tokens/s, "
            f"{found['days']:.1f} days, ${scaled(found['dollars']).strip()}",
            f"memory: {needed:.1f} of {there:.0f} GB on the fullest chip, {fits}",
            *_stack_lines(found["stack"], found["is_calibrated"]),
        ]
    )


def _stack_lines(stack: dict, is_calibrated: bool) -> list[str]:
    """What the numbers above rest on."""
    hidden = ", ".join(f"{name} {stack[name]:.2g}" for name in SHARES if stack[name])
    attention = "fused attention" if stack["flash"] else "scores through memory"
    lines = [
        f"software: {stack['name']}, products in {stack['matmul_bits']} bits, {attention}, {hidden or 'no overlap'}, "
        f"imbalance {stack['imbalance']:.3g}",
        f"of the data sheet: products {stack['matmul_efficiency']:.0%}, memory {stack['memory_efficiency']:.0%}, "
        f"links {stack['scale_up_efficiency']:.0%}, network {stack['scale_out_efficiency']:.0%}",
    ]
    scales = {field.name: stack[field.name] for field in dataclasses.fields(Stack) if field.name.endswith("_scale")}
    told = ", ".join(f"{name} {value:.3f}" for name, value in scales.items() if value != 1) or "every factor 1"
    return [*lines, f"calibrated: {told}" if is_calibrated else "not calibrated (gpt4moe plan calibrate)"]
