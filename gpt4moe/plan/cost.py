"""`gpt4moe plan cost`: days, dollars, energy and goodput of a training run whose utilisation is known or assumed."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gpt4moe.accounting import flops
from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.summary import scaled
from gpt4moe.config.check import require, require_positive
from gpt4moe.plan import goodput, train_cost
from gpt4moe.plan.goodput import HOUR_SECONDS
from gpt4moe.plan.train_cost import Power, RampStage
from gpt4moe.plan.training_job import TrainingJob, job_from, shape_from

DAY_SECONDS = 24 * HOUR_SECONDS
SPARE_RISK = 0.01


def answer(args: argparse.Namespace, build: Any) -> tuple[dict, Callable[[dict], str]]:
    """Returns the JSON document of `plan cost` and the function that makes text of it."""
    job = job_from(args, build, _utilization(args, build))
    slower, stages = _ramp(args, job)
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
    lines = [
        f"{run['shape']} on {run['num_chips']:,} x {run['chip']}: {run['tokens']:.4g} tokens, "
        f"{run['train_flops']:.4g} FLOPs",
        f"time        {run['days']:.1f} days at {run['model_flops_utilization']:.1%} of the peak; "
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


def _utilization(args: argparse.Namespace, build: Any) -> float:
    """Of --mfu, or what a step of --step_seconds means."""
    both = (args.mfu is not None, args.step_seconds is not None)
    require(sum(both) == 1, "--mfu", args.mfu, "must be given, or --step_seconds with --batch_tokens instead")
    if args.mfu is not None:
        return args.mfu
    require(args.batch_tokens is not None, "--batch_tokens", None, "must be given with --step_seconds")
    for name in ("step_seconds", "batch_tokens", "num_chips"):
        require_positive(f"--{name}", getattr(args, name))
    needed = flops.train_flops_per_token(shape_from(args, build)) * args.batch_tokens
    return needed / (args.step_seconds * args.num_chips * chip_named(args.chip).peak_flops)


def _power(args: argparse.Namespace, job: TrainingJob) -> Power | None:
    """None where the chip's table does not say what it draws."""
    if job.chip.watts is None:
        return None
    return Power(job.chip.watts, dollars_per_kwh=args.kwh_price, carbon_free=args.carbon_free)


def _ramp(args: argparse.Namespace, job: TrainingJob) -> tuple[float, list[dict]]:
    """How many times longer the run takes for its small batches, and its parts; --mfu is that of the last batch."""
    if not args.ramp:
        return 1.0, []
    replicas = job.num_chips // (args.tensor * args.stages)
    shares = {batch: _busy(args, batch, replicas) for _, batch in args.ramp}
    last = shares[args.ramp[-1][1]]
    full_rate = job.tokens / job.seconds
    parts = _parts(args.ramp, job.tokens)

    def rate(batch_tokens: float) -> float:
        return full_rate * shares[batch_tokens] / last

    documents = [
        {"from_tokens": start, **dataclasses.asdict(part), "busy_share": shares[part.batch_tokens]}
        | {"days": train_cost.ramp_seconds([part], rate) / DAY_SECONDS}
        for (start, _), part in zip(args.ramp, parts, strict=True)
    ]
    return train_cost.ramp_seconds(parts, rate) / job.seconds, documents


def _busy(args: argparse.Namespace, batch_tokens: float, replicas: int) -> float:
    layout = f"needs at least tensor * stages ({args.tensor * args.stages}) chips"
    require(replicas > 0, "num_chips", args.num_chips, layout)
    rows = round(batch_tokens / args.sequence_length)
    return train_cost.busy_share(max(rows, 1), replicas, args.microbatch_rows, args.stages, args.virtual_stages)


def _parts(ramp: Sequence[tuple[float, float]], tokens: float) -> list[RampStage]:
    starts = [start for start, _ in ramp]
    rising = starts[0] == 0 and all(a < b for a, b in zip(starts, [*starts[1:], tokens], strict=True))
    require(rising, "--ramp", list(ramp), f"must start at 0 tokens and rise to less than --tokens ({tokens:g})")
    ends = [*starts[1:], tokens]
    return [RampStage(end - start, batch) for (start, batch), end in zip(ramp, ends, strict=True)]
