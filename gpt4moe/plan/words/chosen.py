"""What a word's flags name: model, chip, price, layout of training, software. In: parsed flags. Out: what they name."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

from gpt4moe.accounting.chips import Chip, chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.accounting.shape import Shape, shape_of
from gpt4moe.config.check import require, require_count, require_not_negative, require_positive
from gpt4moe.plan.money.goodput import Reliability, job_mtbf_seconds
from gpt4moe.plan.money.training_job import TrainingJob
from gpt4moe.plan.published.calibration import calibrated, read_calibration
from gpt4moe.plan.published.sources import stack_named
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.stacks import Stack
from gpt4moe.plan.words.command import Build

USUAL_SEQUENCE_LENGTH = 8192


def shape_from(args: argparse.Namespace, build: Build) -> Shape:
    """Returns the shape of the model that gin files build, or a published one; raises unless one of them is given."""
    given = bool(args.gin_file) + bool(args.shape)
    mend = "give --gin_file=FILE or --shape=NAME"
    require(given == 1, "--shape", args.shape, f"must be named once, not {given} times", mend)
    if args.shape:
        return shape_named(args.shape)
    return dataclasses.replace(shape_of(build.model()), name=pathlib.Path(args.gin_file[-1]).stem)


def sequence_length_from(args: argparse.Namespace, build: Build) -> int:
    """Returns --sequence_length, else the context of the gin file's model, else that of the reference."""
    if args.sequence_length is None:
        return build.model().context_length if args.gin_file else USUAL_SEQUENCE_LENGTH
    require_count("--sequence_length", args.sequence_length)
    return args.sequence_length


def chip_from(args: argparse.Namespace) -> Chip:
    """Returns the chip that --chip names."""
    return chip_named(args.chip)


def price_from(args: argparse.Namespace, chip: Chip) -> float:
    """Returns the dollars of a chip's hour: --price, else what the table of chips says."""
    price = chip.dollars_per_hour if args.price is None else args.price
    require(price is not None, "--price", None, f"of {chip.name} is not in the table", "give --price=DOLLARS")
    require_not_negative("--price", price)
    return price


def layout_from(args: argparse.Namespace, shape: Shape) -> Layout:
    """Returns the layout of the flags: as many replicas as --num_chips allow, experts cut like all else by default."""
    require_count("--num_chips", args.num_chips)
    for name in ("tensor", "context", "stage"):
        require_count(f"--{name}", getattr(args, name))
    own = args.tensor * args.context * args.stage
    require(args.num_chips >= own, "--num_chips", args.num_chips, f"must be at least tensor * context * stage ({own})")
    cut = args.tensor if shape.num_moe_layers else 1
    return Layout(
        tensor=args.tensor,
        context=args.context,
        stage=args.stage,
        virtual_stages=args.virtual_stages,
        expert=args.expert,
        expert_tensor=cut if args.expert_tensor is None else args.expert_tensor,
        data=args.num_chips // own,
        zero=args.zero,
        microbatch_rows=args.microbatch_rows,
        remat=args.remat,
        sequence_parallel=args.tensor > 1,
        schedule=args.schedule or ("interleaved" if args.virtual_stages > 1 else "1f1b"),
    )


def reliability_from(args: argparse.Namespace, num_chips: int = 1) -> Reliability:
    """Returns how often so many chips fail, and what saves and restarts cost; raises with the flag that cannot be."""
    require_positive("--chip_mtbf_hours", args.chip_mtbf_hours)
    require_positive("--save_seconds", args.save_seconds)
    for name in ("restart_seconds", "write_seconds"):
        require_not_negative(f"--{name}", getattr(args, name))
    mtbf = job_mtbf_seconds(args.chip_mtbf_hours, num_chips)
    return Reliability(mtbf, args.save_seconds, args.restart_seconds, args.write_seconds)


def usual_stack(chip: Chip) -> str:
    """Returns the software that most train with on such a chip."""
    return "maxtext" if chip.name.startswith("tpu") else "megatron-core"


def stack_from(args: argparse.Namespace, chip: Chip) -> tuple[Stack, bool]:
    """Returns the software of --stack, by default the usual of such chips, and whether --calibration has it."""
    stack = stack_named(args.stack or usual_stack(chip))
    if args.imbalance is not None:
        require(args.imbalance >= 1, "--imbalance", args.imbalance, "must be at least 1")
        stack = dataclasses.replace(stack, imbalance=args.imbalance)
    if not args.calibration:
        return stack, False
    entries = read_calibration(args.calibration)
    return calibrated(stack, chip.name, entries), f"{stack.name}/{chip.name}" in entries


def job_from(args: argparse.Namespace, shape: Shape, chip: Chip, utilization: float) -> TrainingJob:
    """Returns the run that the flags describe, at this utilisation."""
    reliability_from(args)
    return TrainingJob(
        shape=shape,
        chip=chip,
        num_chips=args.num_chips,
        tokens=args.tokens,
        utilization=utilization,
        dollars_per_chip_hour=price_from(args, chip),
        chip_mtbf_hours=args.chip_mtbf_hours,
        blocking_seconds=args.save_seconds,
        restart_seconds=args.restart_seconds,
        write_seconds=args.write_seconds,
    )
