"""`gpt4moe plan what-if`: how days, dollars and the price of a served token swing with each assumption.

In: a training run, and a server with its demand. Out: a tornado, each assumption 20 % less and more, and the trade of
more experts between cheaper training and dearer serving.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping

from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.shape import Shape
from gpt4moe.accounting.summary import scaled
from gpt4moe.config.check import require, require_count, require_positive
from gpt4moe.plan.money import expert_tradeoff, tornado
from gpt4moe.plan.money.goodput import HOUR_SECONDS
from gpt4moe.plan.money.training_job import TrainingJob
from gpt4moe.plan.serving.cost import Demand, serve_demand
from gpt4moe.plan.serving.layout import ServeLayout
from gpt4moe.plan.serving.rooflines import Server
from gpt4moe.plan.words.chosen import chip_from, job_from, shape_from
from gpt4moe.plan.words.command import Build

SERVED_TOKENS = (1e11, 1e12, 1e13)


def answer(args: argparse.Namespace, build: Build) -> tuple[dict, Callable[[dict], str]]:
    """Returns the JSON document of `plan what-if` and the function that makes text of it."""
    for name in ("serve_tensor", "serve_stages", "sequences"):
        require_count(f"--{name}", getattr(args, name))
    require_positive("--context", args.context)
    job = job_from(args, shape_from(args, build), chip_from(args), args.mfu)
    require_positive("--price", job.dollars_per_chip_hour)
    layers = job.shape.num_layers
    most = f"must be at most the model's layers ({layers})"
    require(args.serve_stages <= layers, "--serve_stages", args.serve_stages, most)
    server = server_of(job.shape, job.chip, args.serve_tensor, args.serve_stages, args.weights)
    demand = Demand(args.sequences, args.context, job.dollars_per_chip_hour)
    results, assumptions = results_of(job, server), assumptions_of(job, server, demand)
    swings = tornado.tornado(results, assumptions, args.change)
    counts = args.experts if job.shape.num_moe_layers else ()
    choices = expert_tradeoff.options(server, counts, demand, job.dollars, args.saving)
    service = serve_demand(server, demand)
    document = {
        "base": results(assumptions),
        "serving_chips": service.chips,
        "serving_fits": service.fits,
        "tokens_per_second_of_a_user": service.user_tokens_per_second,
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
        from gpt4moe.plan.words import pictures

        drawn = [pictures.tornado_picture(swings, args.change)]
        drawn += [pictures.experts_picture({args.saving: choices})] if choices else []
        pictures.write_png(drawn, args.plot)
    return document, format_what_if


def format_what_if(document: dict) -> str:
    """Returns the document of `plan what-if` as tables to read."""
    base = document["base"]
    lines = [
        f"base: {base['days']:.1f} days, ${scaled(base['dollars']).strip()}, "
        f"${base['dollars_per_1k_tokens']:.5f} for 1,000 generated tokens on {document['serving_chips']:,} chips",
        *(
            []
            if document["serving_fits"]
            else ["these chips do not hold the weights and the cache: raise --serve_stages, or lower --sequences"]
        ),
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
        mark += "" if choice["fits"] else "  (does not fit)"
        size, train = (scaled(choice[name]).strip() for name in ("parameters", "train_dollars"))
        lines.append(
            f"{choice['num_experts']:>8}{size:>12}{choice['serving_chips']:>7}{train:>12}"
            f"{choice['serve_dollars_per_1k_tokens']:>10.5f}{choice['tokens_per_second_of_a_user']:>14.2f}{mark}"
        )
    best = ", ".join(f"{count} for {served} generated tokens" for served, count in document["cheapest"].items())
    return [*lines, f"least dollars in all: {best}"]


def server_of(shape: Shape, chip: Chip, tensor: int, stages: int, weights: str = "bfloat16") -> Server:
    """Returns a server of tensor x stages chips; key heads fewer than chips are not stored again on each."""
    heads = 1 if shape.latent else shape.num_kv_heads
    return Server(shape, chip, ServeLayout(tensor, stages, 1, weights, "batch" if heads % tensor else "heads"))


def assumptions_of(job: TrainingJob, server: Server, demand: Demand) -> dict[str, float]:
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
        "sequences_in_flight": demand.sequences,
        "context_tokens": demand.context_tokens,
        "serve_memory_efficiency": server.efficiency.memory,
        "serve_matmul_efficiency": server.efficiency.matmul,
        "serve_link_efficiency": server.efficiency.link,
    }


def results_of(job: TrainingJob, server: Server) -> Callable[[Mapping[str, float]], dict[str, float]]:
    """Returns a function from assumptions to days, dollars and dollars for 1,000 generated tokens."""

    def results(given: Mapping[str, float]) -> dict[str, float]:
        chip = _chip(job.chip, given["peak_flops"], given["bandwidth_bytes_per_second"])
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
        shares = {name: min(given[f"serve_{name}_efficiency"], 1.0) for name in ("memory", "matmul", "link")}
        efficiency = dataclasses.replace(server.efficiency, **shares)
        served = dataclasses.replace(server, chip=chip, efficiency=efficiency)
        demand = Demand(given["sequences_in_flight"], given["context_tokens"], given["dollars_per_chip_hour"])
        return {
            "days": moved.seconds / (24 * HOUR_SECONDS),
            "dollars": moved.dollars,
            "dollars_per_1k_tokens": serve_demand(served, demand).dollars_per_1k_tokens,
        }

    return results


def _chip(chip: Chip, peak_flops: float, bandwidth_bytes_per_second: float) -> Chip:
    """The chip with other rates, that of 8-bit products in proportion."""
    eight = chip.peak_8bit_ops and chip.peak_8bit_ops * peak_flops / chip.peak_flops
    return dataclasses.replace(
        chip, peak_flops=peak_flops, peak_8bit_ops=eight, bandwidth_bytes_per_second=bandwidth_bytes_per_second
    )
