"""`gpt4moe plan what-if`: how days, dollars and the price of a served token swing with each assumption.

In: a training run and a serving cluster. Out: a tornado, each assumption 20 % less and more, and the trade of more
experts between cheaper training and dearer serving.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gpt4moe.accounting.summary import scaled
from gpt4moe.plan import decode_price, expert_tradeoff, tornado
from gpt4moe.plan.decode_price import Cluster
from gpt4moe.plan.goodput import HOUR_SECONDS
from gpt4moe.plan.training_job import TrainingJob, job_from

SERVED_TOKENS = (1e11, 1e12, 1e13)


def answer(args: argparse.Namespace, build: Any) -> tuple[dict, Callable[[dict], str]]:
    """Returns the JSON document of `plan what-if` and the function that makes text of it."""
    job = job_from(args, build, args.mfu)
    cluster = Cluster(
        job.chip, args.serve_tensor, args.serve_stages, job.dollars_per_chip_hour, args.weight_bytes, args.context
    )
    swings = tornado.tornado(results_of(job, cluster), assumptions_of(job, cluster, args.sequences), args.change)
    counts = args.experts if job.shape.num_moe_layers else ()
    choices = expert_tradeoff.options(job.shape, counts, cluster, args.sequences, job.dollars, args.saving)
    document = {
        "base": results_of(job, cluster)(assumptions_of(job, cluster, args.sequences)),
        "change": args.change,
        "swings": [dataclasses.asdict(swing) for swing in swings],
        "saving": args.saving,
        "experts": [dataclasses.asdict(choice) for choice in choices],
        "cheapest": {
            f"{served:.0e}": expert_tradeoff.cheapest(choices, served).num_experts
            for served in SERVED_TOKENS
            if choices
        },
    }
    if args.plot:
        from gpt4moe.plan import pictures

        drawn = [pictures.tornado_picture(swings, args.change)]
        drawn += [pictures.experts_picture({args.saving: choices})] if choices else []
        pictures.write_png(drawn, args.plot)
    return document, format_what_if


def format_what_if(document: dict) -> str:
    """Returns the document of `plan what-if` as tables to read."""
    base = document["base"]
    lines = [
        f"base: {base['days']:.1f} days, ${scaled(base['dollars']).strip()}, "
        f"${base['dollars_per_1k_tokens']:.5f} for 1,000 generated tokens",
        "",
        tornado.format_swings([tornado.Swing(**swing) for swing in document["swings"]], document["change"]),
    ]
    return "\n".join([*lines, *_experts_table(document)])


def _experts_table(document: dict) -> list[str]:
    if not document["experts"]:
        return []
    lines = [
        "",
        f"experts, when each doubling saves {document['saving']:.0%} of the training tokens:",
        f"{'experts':>8}{'parameters':>12}{'chips':>7}{'train $':>12}{'$ per 1k':>10}{'tok/s a user':>14}",
    ]
    for choice in document["experts"]:
        mark = "" if choice["on_frontier"] else "  (another is better in both)"
        size, train = (scaled(choice[name]).strip() for name in ("parameters", "train_dollars"))
        lines.append(
            f"{choice['num_experts']:>8}{size:>12}{choice['serving_chips']:>7}{train:>12}"
            f"{choice['serve_dollars_per_1k_tokens']:>10.5f}{choice['tokens_per_second_of_a_user']:>14.2f}{mark}"
        )
    best = ", ".join(f"{count} for {served} generated tokens" for served, count in document["cheapest"].items())
    return [*lines, f"least dollars in all: {best}"]


def assumptions_of(job: TrainingJob, cluster: Cluster, sequences: float) -> dict[str, float]:
    """Returns what `results_of` can vary, by names with units."""
    return {
        "tokens": job.tokens,
        "utilization": job.utilization,
        "dollars_per_chip_hour": job.dollars_per_chip_hour,
        "peak_flops": job.chip.peak_flops,
        "chip_mtbf_hours": job.chip_mtbf_hours,
        "save_seconds": job.blocking_seconds,
        "restart_seconds": job.restart_seconds,
        "bandwidth_bytes_per_second": job.chip.bandwidth_bytes_per_second,
        "sequences_in_flight": sequences,
        "context_tokens": cluster.context_tokens,
        "weight_bytes": cluster.weight_bytes,
        "bandwidth_share": cluster.bandwidth_share,
    }


def results_of(job: TrainingJob, cluster: Cluster) -> Callable[[Mapping[str, float]], dict[str, float]]:
    """Returns a function from assumptions to days, dollars and dollars for 1,000 generated tokens."""

    def results(given: Mapping[str, float]) -> dict[str, float]:
        chip = dataclasses.replace(
            job.chip,
            peak_flops=given["peak_flops"],
            bandwidth_bytes_per_second=given["bandwidth_bytes_per_second"],
        )
        moved = dataclasses.replace(
            job,
            chip=chip,
            tokens=given["tokens"],
            utilization=given["utilization"],
            dollars_per_chip_hour=given["dollars_per_chip_hour"],
            chip_mtbf_hours=given["chip_mtbf_hours"],
            blocking_seconds=given["save_seconds"],
            restart_seconds=given["restart_seconds"],
        )
        serving = dataclasses.replace(
            cluster,
            chip=chip,
            dollars_per_chip_hour=given["dollars_per_chip_hour"],
            context_tokens=given["context_tokens"],
            weight_bytes=given["weight_bytes"],
            bandwidth_share=given["bandwidth_share"],
        )
        price = decode_price.dollars_per_1k_tokens(job.shape, serving, given["sequences_in_flight"])
        return {
            "days": moved.seconds / (24 * HOUR_SECONDS),
            "dollars": moved.dollars,
            "dollars_per_1k_tokens": price,
        }

    return results
