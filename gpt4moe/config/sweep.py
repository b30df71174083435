"""What a sweep is: which bindings take which values, what is held fixed, how often each cell is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gpt4moe.config.check import require, require_count, require_positive, require_seed, require_text

SPACINGS = ("linear", "log")
DISTRIBUTIONS = ("uniform", "log_uniform", "choice")
# What can be held fixed while other settings change; see gpt4moe.sweep.hold.
QUANTITIES = ("active_flops", "active_parameters", "total_parameters", "tokens", "train_flops")
GRID_FORM = "must be a dict from gin names to lists of values, or to {'log': [low, high, count]} or {'linear': ...}"
RANDOM_FORM = "must be a dict from gin names to {'uniform': [low, high]}, {'log_uniform': ...} or {'choice': [...]}"


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Cells of a sweep over the run file it stands in: every combination of `axes`, each for every seed.

    `axes` maps a gin name (macro or parameter) to its values: a list, or {"log": [low, high, count]}, or "linear".
    Names joined by commas change together, each value a list of as many. `random` maps names to distributions, of
    which `num_samples` draws are taken, the same for every point of the axes. `seeds` is how many, or which: all cells
    are run with each (paired), bound to the names of `seed_names`. `hold` maps a quantity to the integer binding that
    is derived to keep it where the run file without the axes has it, or to [binding, target], or, where a quantity
    itself is an axis ({"train_flops": [1e12, 1e13]}), where that says; derived values are multiples of
    `multiples[binding]`, 1 by default. `retries`: times that a failed run is tried again. `runs_per_job`:
    how many runs share one process. `memory_limit_gb`: of one such process; a run above it fails and is reported.
    """

    axes: Any = ()
    random: Any = ()
    num_samples: int = 1
    seeds: int | tuple[int, ...] = 1
    seed_names: tuple[str, ...] = ("SEED",)
    hold: Any = ()
    multiples: Any = ()
    retries: int = 1
    runs_per_job: int = 8
    memory_limit_gb: float | None = None

    def __post_init__(self) -> None:
        self._set("axes", _pairs("SweepConfig.axes", self.axes, GRID_FORM), _axis)
        self._set("random", _pairs("SweepConfig.random", self.random, RANDOM_FORM), _distribution)
        self._set("hold", _pairs("SweepConfig.hold", self.hold, "must be a dict from quantities to bindings"), _held)
        self._set("multiples", _pairs("SweepConfig.multiples", self.multiples, "must be a dict of integers"), _multiple)
        for name in ("num_samples", "runs_per_job"):
            require_count(name, getattr(self, name))
        require_count("retries", self.retries, least=0)
        seeds = tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)
        form = "must be a count of at least 1, or a list of distinct seeds"
        require(bool(seeds) and len(set(seeds)) == len(seeds), "seeds", self.seeds, form)
        for seed in seeds:
            require_seed("seeds", seed)
        object.__setattr__(self, "seeds", seeds)
        object.__setattr__(self, "seed_names", tuple(self.seed_names))
        if self.memory_limit_gb is not None:
            require_positive("memory_limit_gb", self.memory_limit_gb)
        nothing = not (self.axes or self.random) and len(seeds) == 1
        mend = "give axes, random or several seeds"
        require(not nothing, "SweepConfig.axes", dict(self.axes), "and one seed leave nothing to compare", mend)
        self._check_names()

    def _set(self, name: str, pairs: tuple, parse) -> None:
        object.__setattr__(self, name, tuple(parse(f"SweepConfig.{name}[{key!r}]", key, value) for key, value in pairs))

    def _check_names(self) -> None:
        swept = [name for names, _ in (*self.axes, *self.random) for name in names.split(",")]
        derived = [binding for _, (binding, _) in self.hold]
        names = [*swept, *derived, *self.seed_names]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, "SweepConfig", twice, "are set by two of axes, random, hold and seed_names")
        free = sorted(set(swept) & set(QUANTITIES) - {name for name, _ in self.hold})
        mend = "name in hold the binding that is derived, as in hold = {'train_flops': 'TRAIN_STEPS'}"
        require(not free, "SweepConfig.axes", free, "are quantities, which follow from other settings", mend)
        unknown = sorted({name for name, _ in self.multiples} - set(derived))
        require(not unknown, "SweepConfig.multiples", unknown, f"must be derived by hold ({derived})")


def _pairs(setting: str, given: object, form: str) -> tuple[tuple[str, Any], ...]:
    require(isinstance(given, (Mapping, list, tuple)), setting, given, form)
    pairs = list(given.items() if isinstance(given, Mapping) else given)
    named = all(isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs)
    require(named, setting, given, form)
    return tuple((name.replace(" ", ""), value) for name, value in pairs)


def _axis(setting: str, names: str, given: object) -> tuple[str, tuple]:
    if isinstance(given, Mapping):
        (spacing, span), *rest = given.items() or ((None, None),)
        require(not rest and spacing in SPACINGS, setting, dict(given), f"must have one key of {SPACINGS}")
        return names, spaced(f"{setting}[{spacing!r}]", spacing, span)
    values = tuple(given) if isinstance(given, (list, tuple)) else ()
    require(bool(values), setting, given, "must be a list of values that is not empty")
    count = names.count(",") + 1
    fitting = count == 1 or all(isinstance(value, (list, tuple)) and len(value) == count for value in values)
    require(fitting, setting, given, f"must hold lists of {count} values, one for each name")
    return names, values


def spaced(setting: str, spacing: str, span: object) -> tuple[float, ...]:
    """Returns `count` values from low to high, ends included, [low, high, count] given, with steps or ratios equal.

    Integers where low and high are integers and all values come out so.
    """
    numbers = isinstance(span, (list, tuple)) and len(span) == 3
    require(numbers, setting, span, "must be [low, high, count]")
    low, high, count = span
    require_count(f"{setting} count", count, least=2)
    require(low < high and (spacing == "linear" or low > 0), setting, span, "must go up, from above 0 if log")
    steps = [index / (count - 1) for index in range(count)]
    ratio = spacing == "log"
    values = tuple(float(low * (high / low) ** step if ratio else low + (high - low) * step) for step in steps)
    whole = tuple(round(value) for value in values)
    exact = all(abs(value - count) < 1e-9 * abs(high) for value, count in zip(values, whole, strict=True))
    return whole if isinstance(low, int) and isinstance(high, int) and exact else values


def _distribution(setting: str, name: str, given: object) -> tuple[str, tuple[str, tuple]]:
    one = isinstance(given, (Mapping, list, tuple)) and len(given) == (1 if isinstance(given, Mapping) else 2)
    require(one, setting, given, f"must have one key of {DISTRIBUTIONS}")
    kind, span = next(iter(given.items())) if isinstance(given, Mapping) else given
    listed = kind in DISTRIBUTIONS and isinstance(span, (list, tuple)) and bool(span)
    require(listed, setting, given, f"must have one key of {DISTRIBUTIONS}")
    if kind != "choice":
        rising = len(span) == 2 and span[0] < span[1] and (kind == "uniform" or span[0] > 0)
        require(rising, setting, given, "must be [low, high], low above 0 if log_uniform")
    return name, (kind, tuple(span))


def _held(setting: str, quantity: str, given: object) -> tuple[str, tuple[str, float | None]]:
    require(quantity in QUANTITIES, setting, quantity, f"must be one of {QUANTITIES}")
    binding, target = given if isinstance(given, (list, tuple)) and len(given) == 2 else (given, None)
    require_text(setting, binding)
    if target is not None:
        require_positive(setting, target)
    return quantity, (binding, target)


def _multiple(setting: str, name: str, given: object) -> tuple[str, int]:
    require_count(setting, given)
    return name, given
