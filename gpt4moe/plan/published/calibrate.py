"""`gpt4moe plan calibrate`: fits one scalar, or a few constants, per stack and chip to measured step times.

In: a CSV file of measurements, or work directories of our own runs. Out: the JSON document, and with `--out` the small
file that other words read. The error told is that of rows left out of the fit; a fit that does not lower it is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from gpt4moe.config.check import CallerError, require
from gpt4moe.plan.published import scores
from gpt4moe.plan.published.calibration import FORMAT, Entry
from gpt4moe.plan.published.comparison import Compared, compare_all
from gpt4moe.plan.published.measurements import PUBLISHED_RUNS, read_rows
from gpt4moe.plan.training.step_time import KINDS

ROWS_PER_CONSTANT = 4
# A further constant must take this share off the error of left-out rows, or it describes their noise.
LEAST_GAIN = 0.05
# A part of a step that takes so many times more or less than the whole of it does is noise told as a constant.
MOST_APART = 4.0
# Constants are drawn to the one scalar as if a further row of this weight said so: what no row tells apart stays equal.
PRIOR_WEIGHT = 0.001
MODELS = {
    1: (tuple(KINDS),),
    2: (("compute", "memory", "idle"), ("communication",)),
    3: (("compute", "idle"), ("memory",), ("communication",)),
    4: (("compute",), ("memory",), ("communication",), ("idle",)),
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One measured step: predicted seconds by kind (`step_time.KINDS`), measured seconds.

    job: the same for rows that tell one measurement in two ways.
    """

    name: str
    stack: str
    predicted_seconds: dict[str, float]
    measured_seconds: float
    job: Hashable

    @property
    def error(self) -> float:
        """Of the uncalibrated time."""
        return sum(self.predicted_seconds.values()) / self.measured_seconds - 1


def answer(args: argparse.Namespace, build: Any) -> tuple[dict, Callable[[dict], str]]:
    """Returns the document of `calibrate` and the function that makes text of it; writes `--out` where given."""
    require(not (args.csv and args.workdir), "--csv", args.csv, "goes without --workdir", "calibrate one at a time")
    skipped = []
    if args.workdir:
        from gpt4moe.plan.published import own_runs

        samples = [own_runs.read_sample(folder, build.saved(folder)[0]) for folder in args.workdir]
        source = ", ".join(args.workdir)
    else:
        source = args.csv or str(PUBLISHED_RUNS)
        compared, passed = compare_all(read_rows(source))
        samples, skipped = samples_of(compared), [dataclasses.asdict(item) for item in passed]
    document = examine(samples, args.constants, args.stack) | {"source": source, "skipped": skipped}
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "source": source, "stacks": document["stacks"]}, file, indent=2)
            file.write("\n")
        document["out"] = args.out
    return document, format_document


def samples_of(found: Sequence[Compared]) -> list[Sample]:
    """Returns the training steps among comparisons; hours of whole runs are none, for stops are in them."""
    steps = [item for item in found if item.measured_seconds and not item.is_whole_run]
    return [
        Sample(item.row.name, item.stack, _by_kind(item.setup.step.parts), item.measured_seconds, item.job)
        for item in steps
    ]


def _by_kind(parts: dict[str, float]) -> dict[str, float]:
    return {kind: sum(parts[name] for name in names) for kind, names in KINDS.items()}


def examine(samples: Sequence[Sample], constants: int | None = None, stack: str | None = None) -> dict:
    """Returns the JSON document: `stacks`, for each the constants, rows, errors before and left out, and what was
    refused and why.

    constants: how many to fit, None for as many as lower the error of left-out rows. stack: this one alone. Raises
    `CallerError` where rows are too few for what was asked.
    """
    by_stack = defaultdict(list)
    for sample in samples:
        by_stack[sample.stack].append(sample)
    if stack is not None:
        require(stack in by_stack, "--stack", stack, f"must be in {sorted(by_stack)}")
        by_stack = {stack: by_stack[stack]}
    require(bool(by_stack), "measured training steps", 0, "must be at least one; others are no matter of a stack")
    return {"stacks": {name: _fit_stack(name, members, constants) for name, members in by_stack.items()}}


def _fit_stack(name: str, samples: list[Sample], constants: int | None) -> dict:
    refused = {}
    fits = {1: _judged(samples, 1)}
    wanted = range(2, max(MODELS) + 1) if constants is None else (constants,)
    for number in wanted:
        if number == 1:
            continue
        fits[number] = None
        if len(samples) < number * ROWS_PER_CONSTANT:
            refused[number] = f"{number} constants need {number * ROWS_PER_CONSTANT} rows, {len(samples)} are there"
        else:
            fits[number] = _judged(samples, number)
            refused |= _reason(fits, number)
    if constants in refused:
        mend = "take fewer, or more measurements"
        raise CallerError(f"--constants={constants} is refused for {name}: {refused[constants]}; {mend}")
    kept = {number: fit[1] for number, fit in fits.items() if fit and number not in refused}
    chosen = constants or min(kept, key=lambda number: kept[number] if kept[number] is not None else number - 1)
    errors = [sample.error for sample in samples]
    before, left_out = scores.mape(errors), fits[chosen][1]
    if constants is None and left_out is not None and left_out >= before:
        refused[1] = f"rows left out are {left_out:.1%} off after a fit to the others, {before:.1%} without one"
        chosen, fits[0] = 0, (dict.fromkeys(KINDS, 1.0), before)
    entry = _entry(fits[chosen], len(samples))
    return dataclasses.asdict(entry) | {
        "constants": chosen,
        "error_before": before,
        "error_in_sample": scores.mape([_error(sample, fits[chosen][0]) for sample in samples]),
        "refused": {str(number): why for number, why in refused.items()},
        "rows_named": [sample.name for sample in samples],
    }


def _judged(samples: list[Sample], constants: int) -> tuple[dict[str, float], float | None]:
    """The factors by kind fitted to all rows, and the mean error of each row after a fit to other jobs."""
    fitted = _fit(samples, constants)
    if len({sample.job for sample in samples}) < 2:
        return fitted, None
    left = [abs(_error(sample, _fit(_others(samples, sample), constants))) for sample in samples]
    return fitted, sum(left) / len(left)


def _others(samples: list[Sample], left_out: Sample) -> list[Sample]:
    return [sample for sample in samples if sample.job != left_out.job]


def _reason(fits: dict, number: int) -> dict[int, str]:
    """Why a fit of several constants is not kept: it does not pay, or its constants are none."""
    factors, error = fits[number]
    if error is None:
        return {number: "all rows are of one job: none can be left out"}
    best = min(fit[1] for other, fit in fits.items() if fit and other < number)
    scalar = fits[1][0]["compute"]
    outside = {kind: value for kind, value in factors.items() if not 1 / MOST_APART <= value / scalar <= MOST_APART}
    if outside:
        kind, value = next(iter(outside.items()))
        told = f"more than {MOST_APART:g} times from the one scalar ({scalar:.3g})"
        return {number: f"{kind} would be multiplied by {value:.3g}, {told}"}
    if error > (1 - LEAST_GAIN) * best:
        return {number: f"rows left out are {error:.1%} off, {best:.1%} with fewer constants"}
    return {}


def _fit(samples: Sequence[Sample], constants: int) -> dict[str, float]:
    """Factors by kind that bring predicted to measured times, least squares of relative errors, none below zero."""
    if constants == 1:
        return dict.fromkeys(KINDS, scores.best_scale([sample.error for sample in samples]))
    import numpy as np
    from scipy.optimize import nnls

    groups = MODELS[constants]
    shares = np.array([
        [sum(sample.predicted_seconds[kind] for kind in group) / sample.measured_seconds for group in groups]
        for sample in samples
    ])  # fmt: skip
    scalar = scores.best_scale([sample.error for sample in samples])
    prior = math.sqrt(PRIOR_WEIGHT) * np.eye(len(groups))
    matrix, wanted = np.vstack([shares, prior]), np.concatenate([np.ones(len(samples)), scalar * prior.sum(axis=1)])
    factors, _ = nnls(matrix, wanted)
    return {kind: float(factor) for group, factor in zip(groups, factors, strict=True) for kind in group}


def _error(sample: Sample, factors: dict[str, float]) -> float:
    seconds = sum(sample.predicted_seconds[kind] * factor for kind, factor in factors.items())
    return seconds / sample.measured_seconds - 1


def _entry(fit: tuple[dict[str, float], float | None], rows: int) -> Entry:
    factors, error = fit
    if len(set(factors.values())) == 1:
        return Entry(factors["compute"], rows=rows, left_out_error=error)
    return Entry(1.0, **{f"{kind}_scale": value for kind, value in factors.items()}, rows=rows, left_out_error=error)


def format_document(document: dict) -> str:
    """Returns the document of `examine` as a table to read."""
    kinds = tuple(KINDS)
    head = f"{'stack and chip':<36}{'rows':>5}{'before':>9}{'left out':>10}{'all':>8}"
    lines = [f"calibrated to {document['source']}", head + "".join(f"{kind:>15}" for kind in kinds)]
    for name, found in document["stacks"].items():
        left = "-" if found["left_out_error"] is None else f"{found['left_out_error']:.1%}"
        line = f"{name:<36}{found['rows']:>5}{found['error_before']:>9.1%}{left:>10}{found['seconds_scale']:>8.3f}"
        lines.append(line + "".join(f"{found[f'{kind}_scale']:>15.3f}" for kind in kinds))
        lines += [f"    {number} refused: {why}" for number, why in sorted(found["refused"].items())[:1]]
        lines += ["    one row: what it does not tell is how far another would be off"] if found["rows"] == 1 else []
    lines += [f"skipped {item['name']}: {item['reason']}" for item in document.get("skipped", ())]
    if "out" in document:
        lines.append(f"written: {document['out']}; other words read it with --calibration {document['out']}")
    return "\n".join(lines)
