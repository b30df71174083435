"""The cells of a sweep: a `SweepConfig` in, one configured run for every point and seed out.

A cell's name is the hash of all settings that decide its result, so that a cell that any sweep in the same folder has
run is found again, whatever the sweep was called or how its axes were written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt4moe.config.check import CallerError, one_line
from gpt4moe.config.run import RunConfig
from gpt4moe.config.sweep import QUANTITIES, SweepConfig
from gpt4moe.sweep.hold import derive, quantity
from gpt4moe.train.resume import settings

# Builds a run from gin overrides, ["NAME=value", ...]: (RunConfig, operative gin text).
Build = Callable[[Sequence[str]], tuple[RunConfig, str]]
# Where a run keeps its tokens and what it writes on the way decide nothing.
IRRELEVANT = ("data.store", "train.sample_prompts", "train.sample_tokens", "train.log_every", "train.record_routing")
SAMPLE_SEED = 0


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    id: hash of its settings. point: values of the swept names; derived: of those that `hold` sets; seed. overrides: gin
    bindings that make it from the run file. deviations: held quantities that integers could not meet, relative.
    refused: why its configuration cannot be built, None where it can.
    """

    id: str
    point: Mapping[str, Any]
    derived: Mapping[str, Any]
    seed: int
    overrides: tuple[str, ...]
    deviations: Mapping[str, float]
    refused: str | None = None


def make_cells(config: SweepConfig, build: Build, progress: Callable[[str], None] = lambda _: None) -> list[Cell]:
    """Returns the cells of a sweep in the order of its axes, seeds innermost; what cannot be built is refused."""
    base, _ = build(())
    targets = {name: target or quantity(name, base) for name, (_, target) in config.hold}
    cells = []
    points = _points(config)
    for number, point in enumerate(points, 1):
        progress(f"configuring point {number} of {len(points)}")
        cells += _cells_of(point, config, build, targets)
    return _once_each(cells)


def _cells_of(point: Mapping[str, Any], config: SweepConfig, build: Build, targets: Mapping[str, float]) -> list[Cell]:
    try:
        bound = derive(point, config, build, targets)
        derived = {name: value for name, value in bound.items() if name not in point}
        return [_cell(point, derived, seed, config, build, targets) for seed in config.seeds]
    except CallerError as error:
        return [_refused(point, config, seed, one_line(error)) for seed in config.seeds]


def _cell(
    point: Mapping[str, Any],
    derived: Mapping[str, Any],
    seed: int,
    config: SweepConfig,
    build: Build,
    targets: Mapping[str, float],
) -> Cell:
    overrides = overrides_of({**point, **derived, **dict.fromkeys(config.seed_names, seed)})
    run, _ = build(overrides)
    off = {name: quantity(name, run) / point.get(name, target) - 1 for name, target in targets.items()}
    return Cell(address(run), point, derived, seed, overrides, off)


def overrides_of(bound: Mapping[str, Any]) -> tuple[str, ...]:
    """Gin bindings of these values; quantities that are held are none."""
    return tuple(f"{name}={_literal(value)}" for name, value in bound.items() if name not in QUANTITIES)


def address(run: RunConfig) -> str:
    """Returns the hash of the settings that decide what a run gives."""
    deciding = {name: value for name, value in settings(run).items() if not name.startswith(IRRELEVANT)}
    return hashlib.blake2b(json.dumps(deciding, sort_keys=True).encode(), digest_size=8).hexdigest()


def _points(config: SweepConfig) -> list[dict[str, Any]]:
    """All combinations of the axes, each with every random draw; a draw is the same whatever else is swept."""
    draw = random.Random(SAMPLE_SEED)
    samples = [
        {name: _sample(draw, *distribution) for name, distribution in config.random} for _ in range(config.num_samples)
    ]
    columns = [[_bound(names, value) for value in values] for names, values in config.axes]
    grid = [dict(itertools.chain.from_iterable(part.items() for part in row)) for row in itertools.product(*columns)]
    return [point | sample for point in grid for sample in (samples if config.random else [{}])]


def _bound(names: str, value: Any) -> dict[str, Any]:
    split = names.split(",")
    return dict(zip(split, value, strict=True)) if len(split) > 1 else {names: value}


def _sample(draw: random.Random, kind: str, span: tuple) -> Any:
    if kind == "choice":
        return draw.choice(span)
    if kind == "uniform":
        return draw.uniform(*span)
    return math.exp(draw.uniform(*(math.log(end) for end in span)))


def _literal(value: Any) -> str:
    """A value as gin reads it; text that begins with @ or % is a reference."""
    is_reference = isinstance(value, str) and value.startswith(("@", "%"))
    return value if is_reference else repr(list(value) if isinstance(value, tuple) else value)


def _refused(point: Mapping[str, Any], config: SweepConfig, seed: int, reason: str) -> Cell:
    overrides = overrides_of({**point, **dict.fromkeys(config.seed_names, seed)})
    digest = hashlib.blake2b("\n".join(overrides).encode(), digest_size=8).hexdigest()
    return Cell(digest, point, {}, seed, overrides, {}, reason)


def _once_each(cells: list[Cell]) -> list[Cell]:
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.id, cell)
    return list(first.values())
