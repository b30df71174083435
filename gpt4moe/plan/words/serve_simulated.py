"""The simulation of `gpt4moe plan serve --simulate`: from flags and a layout to a document of what happened."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable

import numpy as np

from gpt4moe.config.check import CallerError, require, require_count, require_seed
from gpt4moe.plan.serving.batching import Lengths
from gpt4moe.plan.serving.cluster import Cluster, simulate
from gpt4moe.plan.serving.cost import Service
from gpt4moe.plan.serving.frontier import Question
from gpt4moe.plan.serving.lending import Lender, replicas_needed, requests_per_second
from gpt4moe.plan.serving.replica import Policy
from gpt4moe.plan.serving.traffic import Traffic, day_curve, day_requests, poisson_requests

DEFAULT_LOAD = 0.7
DEFAULT_REQUESTS = 1000
MOST_IN_SILENCE = 5000  # requests that are simulated in a few seconds
TARGET_LOAD = 0.8  # of the replicas that an hour keeps


def simulated(args: argparse.Namespace, question: Question, service: Service) -> dict:
    """Returns what a simulation of the chosen layout found, and what it assumed."""
    require_seed("seed", args.seed)
    together = "goes without --day, whose rate and hours tell how many come"
    require(not (args.day and args.requests is not None), "--requests", args.requests, together, "drop one of them")
    generator = np.random.default_rng(args.seed)
    cluster = _cluster(args, question, service)
    is_mixed = cluster.policy.prefill == "mixed"
    lengths = {"prompts": Lengths(args.lengths, args.prompt_tokens), "outputs": Lengths(args.lengths, args.new_tokens)}
    # Any rate will do: what a replica serves depends on the lengths alone.
    capacity = requests_per_second(service.server, service.rows, Traffic(1.0, **lengths), mixed_prefill=is_mixed)
    rate = args.requests_per_second
    rate = DEFAULT_LOAD * capacity * cluster.replicas if rate is None else rate
    traffic = Traffic(rate, hourly=_hourly(args.day), hour_seconds=args.hour_seconds, **lengths)
    lender = None
    if args.day:
        needed = replicas_needed(traffic.hour_rates(), capacity, TARGET_LOAD)
        return_seconds = min(60.0, args.hour_seconds / 10)
        lender = Lender(cluster.replicas, needed, args.hour_seconds, return_seconds)
        requests = day_requests(traffic, generator)
    else:
        requests = poisson_requests(traffic, DEFAULT_REQUESTS if args.requests is None else args.requests, generator)
    tell = _progress(len(requests)) if len(requests) > MOST_IN_SILENCE else None
    found = simulate(cluster, requests, question.dollars_per_hour, generator, lender, tell)
    return (
        dataclasses.asdict(found)
        | {
            "requests_per_second": rate,
            "replicas": cluster.replicas,
            "prefill_replicas": cluster.prefill_replicas,
            "replica_chips": service.chips,
            "layout": dataclasses.asdict(service.server.layout),
            "rows": cluster.policy.rows,
            "batching": cluster.policy.batching,
            "prefill": cluster.policy.prefill,
            "seed": args.seed,
            "full_load_tokens_per_second": capacity * cluster.replicas * args.new_tokens,
            "roofline_tokens_per_second": service.tokens_per_second * cluster.replicas,
            "capacity_requests_per_second": capacity * cluster.replicas,
        }
        | ({"needed_replicas": lender.needed, "formula_lent_fraction": lender.lent_fraction()} if lender else {})
    )


def _progress(requests: int) -> Callable[[float], None]:
    def tell(share: float) -> None:
        print(f"simulating {requests:,} requests: {share:.0%} have come", file=sys.stderr, flush=True)

    return tell


def _cluster(args: argparse.Namespace, question: Question, service: Service) -> Cluster:
    """Replicas of the layout on the chips there are; --prefill_chips of them read prompts only."""
    chips, readers = service.chips, 0
    if args.prefill_chips is not None:
        require_count("prefill_chips", args.prefill_chips)
        constraint = f"must be a multiple of the {chips} chips of a replica, and leave one to decode"
        left = question.num_chips - args.prefill_chips
        require(args.prefill_chips % chips == 0 and left >= chips, "prefill_chips", args.prefill_chips, constraint)
        readers = args.prefill_chips // chips
    policy = Policy(int(service.rows), args.batching, "elsewhere" if readers else "mixed")
    replicas = question.num_chips // chips - readers
    return Cluster(service.server, policy, replicas, readers, sample_routing=not args.expected_routing)


def _hourly(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    if text == "cosine":
        return day_curve()
    try:
        return tuple(float(item) for item in text.split(","))
    except ValueError:
        raise CallerError(f"day={text!r} must be 'cosine' or 24 numbers with commas between") from None
