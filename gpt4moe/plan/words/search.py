"""`gpt4moe plan search`: the best layouts of a model on a cluster, why the others lose, the best one as a run file."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from gpt4moe.accounting.chips import Chip, chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.accounting.shape import shape_of
from gpt4moe.config.check import CallerError, require, require_count, require_not_negative, require_positive
from gpt4moe.config.run import RunConfig
from gpt4moe.plan.money import goodput
from gpt4moe.plan.published import own_runs
from gpt4moe.plan.published.calibration import calibrated, read_calibration
from gpt4moe.plan.published.sources import stack_named
from gpt4moe.plan.search import gin_export, table
from gpt4moe.plan.search.layouts import OUR_SCHEDULE, SPACES, Candidate, Job, Space
from gpt4moe.plan.search.ranking import Costed, cost_all, cost_one, rank, search
from gpt4moe.plan.training.layout import DEGREES, Layout
from gpt4moe.plan.training.memory import NUMERICS
from gpt4moe.plan.training.stacks import Stack
from gpt4moe.plan.words.chosen import reliability_from, usual_stack

SHAPE_TOLERANCE = 0.05


def answer(args: argparse.Namespace, build: Any) -> tuple[dict, Callable[[dict], str]]:
    """Returns the JSON document of `plan search` and the function that makes text of it."""
    require(not (args.shape and args.gin_file), "--shape", args.shape, "goes without --gin_file", "give one of them")
    given = bool(args.shape or args.gin_file)
    require(given, "--shape", args.shape, "must be given, or a --gin_file instead", "e.g. --shape=gpt4_1p8t")
    require_count("--top", args.top)
    if args.verify is not None:
        require_count("--verify", args.verify)
    run = build.run() if args.gin_file else None
    space = SPACES[args.space or ("ours" if run else "megatron")]
    ours = run is not None and space.name == "ours"
    for flag in ("export", "verify"):
        value, constraint = getattr(args, flag), "needs a run file and what our trainer can run"
        require(not value or ours, f"--{flag}", value, constraint, "give --gin_file, without --space=megatron")
    job = _job(args, run, space)
    asked = _asked(args, job, run if ours else None, space)
    found = search(job, space, args.objective)
    document = table.to_document(found, space, args.objective, args.top, asked)
    document["is_calibrated"] = _is_calibrated(args, job)
    best = next(iter(found.ranked), None)
    if best is not None:
        document["checkpoint"] = _checkpoint(best, run)
        document["ramp"] = table.ramp_rows(best, _ramp(args, run))
    if args.export:
        document["exported"] = _export(args, run, best, document)
    if args.report:
        from gpt4moe.plan.words import search_report

        search_report.write_report(found, document, args.report)
        document["report"] = args.report
    if args.verify:
        from gpt4moe.plan.search import verify

        document["verified"] = [verify.verify(run, item) for item in found.ranked[: args.verify]]
    return document, table.format_document


def _job(args: argparse.Namespace, run: RunConfig | None, space: Space) -> Job:
    chip = chip_named(args.chip)
    if args.memory_gb is not None:
        require_positive("--memory_gb", args.memory_gb)
        chip = dataclasses.replace(chip, memory_bytes=args.memory_gb * 1e9)
    if args.price is not None:
        require_not_negative("--price", args.price)
    shape = shape_of(run.model) if run else shape_named(args.shape)
    if run:
        shape = dataclasses.replace(shape, name=pathlib.Path(args.gin_file[-1]).stem)
    length = run.data.sequence_length if run and args.sequence_length is None else args.sequence_length
    require(length is not None, "--sequence_length", None, "must be given with --shape")
    require(length > 0, "--sequence_length", length, "must be an integer of at least 1")
    ramp = [_rows("--ramp" if args.ramp else "--batch_tokens", batch, length, args) for _, batch in _ramp(args, run)]
    tolerance = args.batch_tolerance
    if tolerance is None:
        tolerance = 0.0 if run else SHAPE_TOLERANCE
    return Job(
        shape=shape,
        chip=chip,
        num_chips=_num_chips(args, run),
        batch_rows=ramp[-1],
        sequence_length=length,
        stack=_stack(args, space, chip),
        numerics=_numerics(args, space),
        tolerance=tolerance,
        ramp_rows=tuple(ramp[:-1]),
        reliability=reliability_from(args),
        most_idle=args.most_idle,
        dollars_per_hour=chip.dollars_per_hour if args.price is None else args.price,
    )


def _ramp(args: argparse.Namespace, run: RunConfig | None) -> Sequence[tuple[float, float]]:
    """Tokens seen, and batch tokens from there on; one entry where the batch is constant."""
    if args.ramp:
        return args.ramp
    if args.batch_tokens is not None:
        return ((0, args.batch_tokens),)
    require(run is not None, "--batch_tokens", None, "must be given with --shape")
    return run.train.ramp


def _rows(flag: str, batch_tokens: float, length: int, args: argparse.Namespace) -> int:
    """Sequences of a batch: whole ones, nearest to the tokens asked for where the batch has a tolerance."""
    require_positive(flag, batch_tokens)
    exact = bool(args.gin_file) and args.batch_tolerance is None
    whole = batch_tokens % length == 0
    mend = "or give a --batch_tolerance"
    require(whole or not exact, flag, batch_tokens, f"must be a multiple of the sequence length ({length})", mend)
    require(batch_tokens >= length, flag, batch_tokens, f"must be at least one sequence ({length} tokens)")
    return round(batch_tokens / length)


def _num_chips(args: argparse.Namespace, run: RunConfig | None) -> int:
    if args.num_chips is not None:
        return args.num_chips
    sizes = [size for _, size in run.mesh.axes] if run else []
    known = bool(sizes) and -1 not in sizes
    require(known, "--num_chips", None, "must be given: no run file's MESH tells it")
    return math.prod(sizes)


def _stack(args: argparse.Namespace, space: Space, chip: Chip) -> Stack:
    stack = (
        own_runs.STACK if space.name == "ours" and args.stack is None else stack_named(args.stack or usual_stack(chip))
    )
    return calibrated(stack, chip.name, read_calibration(args.calibration)) if args.calibration else stack


def _is_calibrated(args: argparse.Namespace, job: Job) -> bool:
    entries = read_calibration(args.calibration) if args.calibration else {}
    return f"{job.stack.name}/{job.chip.name}" in entries


def _numerics(args: argparse.Namespace, space: Space):
    name = args.numerics or space.numerics
    require(name in NUMERICS, "--numerics", name, f"must be in {', '.join(NUMERICS)}")
    return NUMERICS[name]


def _asked(args: argparse.Namespace, job: Job, run: RunConfig | None, space: Space) -> Costed | None:
    """The layout of --layout, or the run file's own where it has so many chips."""
    if args.layout is None:
        own = run is not None and math.prod(size for _, size in run.mesh.axes) == job.num_chips and run.mesh.axes
        same = own and run.train.ramp[-1][1] == job.batch_tokens
        return cost_one(job, gin_export.layout_of(run, job.num_chips), job.batch_rows) if same else None
    layout, has_remat = _layout(args.layout, job, space)
    layout.check(job.shape)
    batch_rows = job.rows_near(layout.data, layout.microbatch_rows)
    if batch_rows is None:
        layout.microbatches(job.batch_rows)  # says why, if it does not divide
        batch_rows = job.batch_rows
    if has_remat:
        return cost_one(job, layout, batch_rows)
    ways = cost_all(job, [Candidate(layout, batch_rows)], several_passes=space.several_passes)
    require(bool(ways), "--layout", args.layout, "fills no pipeline a whole number of times at each batch of the ramp")
    return next(iter(rank(ways)), ways[-1])


def _layout(text: str, job: Job, space: Space) -> tuple[Layout, bool]:
    """The layout of `tensor=8,stage=15`: replicas fill the chips, experts lie over tensor unless it says otherwise."""
    given: dict[str, Any] = {}
    numbers = {*DEGREES, "zero", "zero_group", "expert_zero_group"}
    for item in text.split(","):
        name, _, value = item.strip().partition("=")
        known = name in numbers or name in ("remat", "schedule")
        require(known, "--layout", text, f"has unknown {name!r}", f"known are {', '.join([*DEGREES, 'zero', 'remat'])}")
        if name in numbers and not value.isdigit():
            raise CallerError(f"--layout={text!r} needs a whole number for {name}, not {value!r}")
        require(name not in given, "--layout", text, f"has {name} twice", "give it once")
        given[name] = int(value) if name in numbers else value
        if name in DEGREES:
            require_count(f"--layout={text!r}: {name}", given[name])
    tensor, several = given.get("tensor", 1), given.get("virtual_stages", 1) > 1
    own = math.prod(given.get(name, 1) for name in ("tensor", "context", "stage"))
    require(own <= job.num_chips, "--layout", text, f"needs {own} chips, there are {job.num_chips}")
    usual = {
        "data": job.num_chips // own,
        "expert_tensor": tensor if job.shape.num_moe_layers else 1,
        "sequence_parallel": tensor > 1,
        "schedule": OUR_SCHEDULE if space.name == "ours" else "interleaved" if several else "1f1b",
    }
    return Layout(**(usual | given)), "remat" in given


def _checkpoint(best: Costed, run: RunConfig | None) -> dict:
    """Steps between saves: Young's interval for the job's failures, and no more than the run file has or the run is."""
    seconds = goodput.best_interval_seconds(best.reliability)
    every = max(round(seconds / best.step.seconds), 1)
    return {
        "job_mtbf_hours": best.reliability.job_mtbf_seconds / goodput.HOUR_SECONDS,
        "interval_seconds": seconds,
        "checkpoint_every": min(every, run.train.checkpoint_every, run.train.steps) if run else every,
        "goodput": best.goodput,
    }


def _export(args: argparse.Namespace, run: RunConfig, best: Costed | None, document: dict) -> str:
    require(best is not None, "--export", args.export, "has nothing to write: no layout fits", "take more chips")
    if args.ramp:
        ramp = tuple((int(start), rows * best.job.sequence_length) for (start, _), rows in _ramp_rows(args, best))
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, batch_tokens=ramp))
    target = pathlib.Path(args.export)
    own = any(target.exists() and os.path.exists(path) and target.samefile(path) for path in args.gin_file)
    require(not own, "--export", args.export, "is the run file itself", "give another name")
    require(target.parent.is_dir(), "--export", args.export, "must lie in a folder that is there")
    files = [_included(path) for path in args.gin_file]
    every = document["checkpoint"]["checkpoint_every"]
    text = gin_export.export_text(best, run, every, files, args.overrides)
    target.write_text(text, encoding="utf-8")
    return args.export


def _included(path: str) -> str:
    """As the file is found from any folder: those of the package by name, others by their whole path."""
    packaged = path.startswith("gin_configs/")
    return path if packaged or not os.path.exists(path) else os.path.abspath(path)


def _ramp_rows(args: argparse.Namespace, best: Costed) -> zip:
    return zip(args.ramp, (*best.job.ramp_rows, best.batch_rows), strict=True)
