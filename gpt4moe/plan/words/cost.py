"""`gpt4moe plan cost`: days, dollars, energy and goodput of a training run whose utilisation is known or assumed."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence

from gpt4moe.accounting import flops
from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.shape import Shape
from gpt4moe.accounting.summary import scaled
from gpt4moe.config.check import require, require_positive
from gpt4moe.plan.money import goodput, train_cost
from gpt4moe.plan.money.goodput import HOUR_SECONDS
from gpt4moe.plan.money.train_cost import Power, RampStage
from gpt4moe.plan.money.training_job import TrainingJob
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.step_losses import step_losses, whole_batch
from gpt4moe.plan.words.chosen import chip_from, job_from, layout_from, sequence_length_from, shape_from, stack_from
from gpt4moe.plan.words.command import Build

DAY_SECONDS = 24 * HOUR_SECONDS
SPARE_RISK = 0.01


def answer(args: argparse.Namespace, build: Build) -> tuple[dict, Callable[[dict], str]]:
    """Returns the JSON document of `plan cost` and the function that makes text of it."""
    shape, chip = shape_from(args, build), chip_from(args)
    length = sequence_length_from(args, build)
    job = job_from(args, shape, chip, _utilization(args, shape, chip, length))
    slower, stages = _ramp(args, job, length)
    hours = job.chip_hours * slower
    power = _power(args, job)
    best = goodput.best_interval_seconds(job.reliability)
    document = {
        "shape": job.shape.name,
        "chip": job.chip.name,
        "num_chips": job.num_chips,
        "tokens": job.tokens,
        "train_flops": job.flops,
        "model_flops_utilization": job.utilization,
        "utilization_is_predicted": args.mfu is None and args.step_seconds is None,
        "days_without_failures": job.work_seconds * slower / DAY_SECONDS,
        "job_mtbf_hours": job.reliability.job_mtbf_seconds / HOUR_SECONDS,
        "save_interval_seconds": best,
        "goodput": job.goodput,
        "days": job.seconds * slower / DAY_SECONDS,
        "chip_hours": hours,
        "dollars_per_chip_hour": job.dollars_per_chip_hour,
        "rental_dollars": train_cost.rental_dollars(hours, job.dollars_per_chip_hour),
        "amortized_dollars": None,
        "energy_kwh": power.energy_kwh(hours) if power else None,
        "energy_dollars": power.energy_kwh(hours) * power.dollars_per_kwh if power else None,
        "carbon_kg": power.carbon_kg(hours) if power else None,
        "spare_chips": goodput.spare_chips(job.num_chips, job.chip_mtbf_hours, args.repair_hours, SPARE_RISK),
        "ramp": stages,
    }
    if args.chip_dollars is not None:
        document["amortized_dollars"] = train_cost.amortized_dollars(hours, args.chip_dollars)
    return document, format_cost


def format_cost(document: dict) -> str:
    """Returns the document of `plan cost` as lines to read."""
    run = document
    said = ", as predicted of the layout" if run["utilization_is_predicted"] else ""
    lines = [
        f"{run['shape']} on {run['num_chips']:,} x {run['chip']}: {run['tokens']:.4g} tokens, "
        f"{run['train_flops']:.4g} FLOPs",
        f"time        {run['days']:.1f} days at {run['model_flops_utilization']:.1%} of the peak{said}; "
        f"{run['days_without_failures']:.1f} without failures",
        f"failures    one in {run['job_mtbf_hours']:.2f} h, a save every {run['save_interval_seconds']:,.0f} s: "
        f"goodput {run['goodput']:.3f}; {run['spare_chips']:,} spare chips",
        f"chip-hours  {scaled(run['chip_hours'])}",
        f"rented      ${scaled(run['rental_dollars']).strip()} at ${run['dollars_per_chip_hour']:g} an hour",
    ]
    if run["amortized_dollars"] is not None:
        used_up, energy = (scaled(run[name] or 0).strip() for name in ("amortized_dollars", "energy_dollars"))
        lines.append(f"owned       ${used_up} of the chips' value and ${energy} of electricity")
    if run["energy_kwh"] is not None:
        lines.append(f"energy      {scaled(1000 * run['energy_kwh'])}Wh, {run['carbon_kg'] / 1000:,.4g} t of CO2")
    for stage in run["ramp"]:
        lines.append(
            f"ramp        from {stage['from_tokens']:.4g} tokens: {stage['batch_tokens']:.4g} a batch, "
            f"chips busy {stage['busy_share']:.1%}, {stage['days']:.2f} days"
        )
    return "\n".join(lines)


def _utilization(args: argparse.Namespace, shape: Shape, chip: Chip, length: int) -> float:
    """Of --mfu, or what a step of --step_seconds means, or what is predicted of the layout."""
    given = (args.mfu is not None, args.step_seconds is not None)
    require(sum(given) < 2, "--mfu", args.mfu, "must be given, or --step_seconds with --batch_tokens, not both")
    if args.mfu is not None:
        return args.mfu
    mend = "or give --mfu"
    require(
        args.batch_tokens is not None, "--batch_tokens", None, "must be given, with a layout or --step_seconds", mend
    )
    if args.step_seconds is None:
        layout, (stack, _) = layout_from(args, shape), stack_from(args, chip)
        batch = whole_batch(layout, args.batch_tokens, length)
        return step_losses(shape, layout, chip, batch, length, stack=stack, num_chips=args.num_chips).utilization
    for name in ("step_seconds", "batch_tokens", "num_chips"):
        require_positive(f"--{name}", getattr(args, name))
    needed = flops.train_flops_per_token(shape) * args.batch_tokens
    least = needed / (args.num_chips * chip.peak_flops)
    limit = f"must be at least {least:.4g}, what the chips need at their peak"
    require(args.step_seconds >= least, "--step_seconds", args.step_seconds, limit)
    return least / args.step_seconds


def _power(args: argparse.Namespace, job: TrainingJob) -> Power | None:
    """None where the chip's table does not say what it draws."""
    if job.chip.watts is None:
        return None
    return Power(job.chip.watts, dollars_per_kwh=args.kwh_price, carbon_free=args.carbon_free)


def _ramp(args: argparse.Namespace, job: TrainingJob, length: int) -> tuple[float, list[dict]]:
    """How many times longer the run takes for its small batches, and its parts; --mfu is that of the last batch."""
    if not args.ramp:
        return 1.0, []
    layout = layout_from(args, job.shape)
    layout.check(job.shape)
    parts = _parts(args.ramp, job.tokens, length)
    shares = {batch: _busy(layout, batch, length) for _, batch in args.ramp}
    last = shares[args.ramp[-1][1]]
    full_rate = job.tokens / job.seconds

    def rate(batch_tokens: float) -> float:
        return full_rate * shares[batch_tokens] / last

    documents = [
        {"from_tokens": start, **dataclasses.asdict(part), "busy_share": shares[part.batch_tokens]}
        | {"days": train_cost.ramp_seconds([part], rate) / DAY_SECONDS}
        for (start, _), part in zip(args.ramp, parts, strict=True)
    ]
    return train_cost.ramp_seconds(parts, rate) / job.seconds, documents


def _busy(layout: Layout, batch_tokens: float, sequence_length: int) -> float:
    rows = max(round(batch_tokens / sequence_length), 1)
    return train_cost.busy_share(rows, layout.data, layout.microbatch_rows, layout.stage, layout.virtual_stages)


def _parts(ramp: Sequence[tuple[float, float]], tokens: float, sequence_length: int) -> list[RampStage]:
    starts = [start for start, _ in ramp]
    for _, batch in ramp:
        least = f"must hold at least one sequence ({sequence_length:,} tokens) in every batch, not {batch:g} tokens"
        require(math.isfinite(batch) and batch >= sequence_length, "--ramp", list(ramp), least)
    rising = starts[0] == 0 and all(a < b for a, b in zip(starts, [*starts[1:], tokens], strict=True))
    require(rising, "--ramp", list(ramp), f"must start at 0 tokens and rise to less than --tokens ({tokens:g})")
    ends = [*starts[1:], tokens]
    return [RampStage(end - start, batch) for (start, batch), end in zip(ramp, ends, strict=True)]
