"""`gpt4moe plan simulate`: runs with failures drawn from a seed, beside the goodput that the formula gives."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from gpt4moe.config.check import require, require_count, require_positive
from gpt4moe.plan.money import goodput
from gpt4moe.plan.money.failure_simulation import Job, Time, expected_events, mean_goodput, simulate_many
from gpt4moe.plan.money.goodput import HOUR_SECONDS
from gpt4moe.plan.words.chosen import reliability_from

MOST_EVENTS = 1e7  # some tens of seconds
KINDS = ("work", "saving", "lost", "restarting", "waiting")


def answer(args: argparse.Namespace, build: Any) -> tuple[dict, Callable[[dict], str]]:
    """Returns the JSON document of `plan simulate` and the function that makes text of it."""
    require_positive("--days", args.days)
    reliability = reliability_from(args, args.num_chips)
    mtbf = reliability.job_mtbf_seconds
    job = Job(
        work_seconds=args.days * 24 * HOUR_SECONDS,
        reliability=reliability,
        interval_seconds=args.interval_seconds,
        spares=args.spares,
        repair_seconds=args.repair_hours * HOUR_SECONDS,
    )
    require_count("--runs", args.runs)
    events = args.runs * expected_events(job)
    most = f"means {events:.2g} saves and failures to draw, at most are {MOST_EVENTS:.0e}"
    require(events <= MOST_EVENTS, "--days", args.days, most, "take fewer days, --runs or chips")
    times = simulate_many(job, args.seed, args.runs)
    mean, error = mean_goodput(times)
    exact = None if args.write_seconds else goodput.exact_goodput(reliability, job.interval)
    return {
        "num_chips": args.num_chips,
        "work_days": args.days,
        "runs": args.runs,
        "seed": args.seed,
        "job_mtbf_hours": mtbf / HOUR_SECONDS,
        "save_interval_seconds": job.interval,
        "young_interval_seconds": goodput.young_interval_seconds(reliability),
        "daly_interval_seconds": goodput.daly_interval_seconds(reliability),
        "goodput": mean,
        "goodput_standard_error": error,
        "goodput_formula": goodput.goodput(reliability, job.interval),
        "goodput_exact": exact,
        "failures": statistics.fmean(time.failures for time in times),
        "elapsed_days": statistics.fmean(time.elapsed for time in times) / (24 * HOUR_SECONDS),
        "shares": {kind: _share(times, kind) for kind in KINDS},
        "each_run": [dataclasses.asdict(time) for time in times],
    }, format_simulation


def format_simulation(document: dict) -> str:
    """Returns the document of `plan simulate` as lines to read."""
    found = document
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in found["shares"].items())
    exact = "" if found["goodput_exact"] is None else f", exact {found['goodput_exact']:.4f}"
    return "\n".join(
        [
            f"{found['num_chips']:,} chips, {found['work_days']:g} days of work, {found['runs']} runs from seed "
            f"{found['seed']}",
            f"failures    one in {found['job_mtbf_hours']:.2f} h, {found['failures']:.0f} in a run",
            f"saves       every {found['save_interval_seconds']:,.0f} s; Young {found['young_interval_seconds']:,.0f}, "
            f"Daly {found['daly_interval_seconds']:,.0f}",
            f"goodput     {found['goodput']:.4f} ± {found['goodput_standard_error']:.4f}; "
            f"first-order formula {found['goodput_formula']:.4f}{exact}",
            f"time        {found['elapsed_days']:.1f} days: {shares}",
        ]
    )


def _share(times: list[Time], kind: str) -> float:
    return sum(getattr(time, kind) for time in times) / sum(time.elapsed for time in times)
