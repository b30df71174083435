"""A sweep as its report sees it: `results.json` in; axes, points and their seeds out."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from gpt4moe.config.check import require

# Values from here to so many times it are spaced by their logarithm, where they are not evenly spaced.
LOG_RATIO = 8


@dataclasses.dataclass(frozen=True)
class Axis:
    """What is swept as one: names that change together, the values of the first, in order, and how each is called.

    numeric: the values are numbers that differ, and `at` gives them; else `at` numbers them. log: to be drawn so.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    labels: tuple[str, ...]
    at: tuple[float, ...]
    numeric: bool
    log: bool

    @property
    def title(self) -> str:
        """The first name, without its module."""
        return short(self.names[0])

    def value(self, at: int) -> object:
        """A value of the first name, as the results have it."""
        return json.loads(self.keys[at])[0]

    def named(self, at: int) -> str:
        """A value with the name of the axis, unless it is a name itself."""
        return self.labels[at] if isinstance(self.value(at), str) else f"{self.title} {self.labels[at]}"

    def __len__(self) -> int:
        return len(self.keys)


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of the axes: the place of its value on each, what it is called, all its rows, and those to count."""

    place: tuple[int, ...]
    label: str
    rows: tuple[dict, ...]
    done: tuple[dict, ...]

    def values(self, key: str) -> np.ndarray:
        """What the runs that are done have for a column [n]; not a number where a run has nothing."""
        return np.array([number(row, key) for row in self.done], np.float64)

    def mean(self, key: str) -> float:
        """Mean over the seeds that have the column."""
        found = self.values(key)
        found = found[np.isfinite(found)]
        return float(found.mean()) if len(found) else math.nan

    def error(self, key: str) -> float:
        """Standard error of that mean; not a number for one seed."""
        found = self.values(key)
        found = found[np.isfinite(found)]
        return float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else math.nan


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep: its folder, the rows of its results, its axes with more than one value, its points, its measure.

    metric: the column that figures compare, held-out loss where it was measured, else training loss.
    """

    folder: pathlib.Path
    rows: tuple[dict, ...]
    swept: tuple[str, ...]
    axes: tuple[Axis, ...]
    points: tuple[Point, ...]
    metric: str

    @property
    def measured(self) -> list[Point]:
        """The points at which a run is done."""
        return [point for point in self.points if point.done]

    @property
    def metric_label(self) -> str:
        """What the measure is called on an axis."""
        return "held-out loss, nats" if self.metric == "held_out_loss" else "training loss, nats"

    @property
    def size_key(self) -> str:
        """The column of what laws call total parameters, without embeddings; sweeps of former versions count all."""
        return "non_embedding_parameters" if self.has("non_embedding_parameters") else "total_parameters"

    @property
    def size_label(self) -> str:
        """What that column is called on an axis."""
        return "total parameters" + (" without embeddings" if self.size_key != "total_parameters" else "")

    @property
    def noise(self) -> float:
        """Standard deviation of a run's loss from seed to seed, pooled over points; not a number without seeds."""
        groups = [point.values(self.metric) for point in self.measured]
        freedom = sum(len(values) - 1 for values in groups)
        squares = sum(float(((values - values.mean()) ** 2).sum()) for values in groups)
        return math.sqrt(squares / freedom) if freedom else math.nan

    @property
    def pair_noise(self) -> float:
        """The same beside runs of one seed: what remains when each point and each seed has an effect of its own.

        A seed gives the same data order to every point, so that its luck falls out of differences seed by seed. Not a
        number where nothing remains, as with one seed.
        """
        return self._beside_seeds()[0]

    @property
    def pair_freedom(self) -> int:
        """The degrees of freedom of `pair_noise`."""
        return self._beside_seeds()[1]

    def _beside_seeds(self) -> tuple[float, int]:
        runs = [
            (index, row["seed"], value)
            for index, point in enumerate(self.measured)
            for row, value in zip(point.done, point.values(self.metric), strict=True)
        ]
        if not runs:
            return math.nan, 0
        points, seeds, losses = map(np.array, zip(*runs, strict=True))
        effects = np.hstack([labels[:, None] == np.unique(labels) for labels in (points, seeds)]).astype(float)
        found, _, rank, _ = np.linalg.lstsq(effects, losses, rcond=None)
        freedom = int(len(losses) - rank)
        left = float(((losses - effects @ found) ** 2).sum())
        return (math.sqrt(left / freedom) if freedom else math.nan), freedom

    def has(self, key: str) -> bool:
        """Whether any run that is done has the column."""
        return any(np.isfinite(point.values(key)).any() for point in self.measured)

    def lines(self, axis: Axis) -> dict[str, list[Point]]:
        """The points along an axis, one list for every combination of the others, named by it."""
        index = self.axes.index(axis)
        found: dict[tuple, list[Point]] = {}
        for point in sorted(self.measured, key=lambda point: point.place):
            found.setdefault((*point.place[:index], *point.place[index + 1 :]), []).append(point)
        others = [other for other in self.axes if other is not axis]
        return {
            name_of(others, place): sorted(points, key=lambda point: point.place[index])
            for place, points in found.items()
        }


def read_sweep(folder: str | pathlib.Path) -> Sweep:
    """The sweep in `folder`. Raises `ValueError` in one line where there is none or its results are not written."""
    root = pathlib.Path(folder)
    path, found = root / "results.json", (root / "manifest.json").exists() or (root / "runs").is_dir()
    again = "give the same gpt4moe sweep command again: it uses what is done, and writes it"
    require(path.exists() or not found, "sweep", str(folder), "has runs but no results.json", again)
    require(path.exists(), "sweep", str(folder), "has no results.json", "give the --workdir of a gpt4moe sweep")
    try:
        rows = json.loads(path.read_text())
    except json.JSONDecodeError:
        rows = None
    is_table = isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) and "seed" in row for row in rows)
    require(is_table, "sweep", str(path), "is not a list of runs", again)
    return make_sweep(root, rows, _manifest(root))


def make_sweep(root: pathlib.Path, rows: Sequence[dict], manifest: dict) -> Sweep:
    """The sweep of these rows; `manifest` may say which names are `axes` and which of the cells are derived."""
    metric = "held_out_loss" if any(math.isfinite(number(row, "held_out_loss")) for row in rows) else "loss"
    derived = {name for cell in manifest.get("cells", ()) for name in cell.get("derived", ())}
    columns = dict.fromkeys(name for row in rows for name in list(row)[: list(row).index("seed")])
    swept = tuple(columns)
    groups = _axes_of(manifest, rows) or _together(rows, [name for name in swept if name not in derived])
    axes = tuple(axis for axis in (_axis(tuple(names), rows) for names in groups) if len(axis) > 1)
    places: dict[tuple, list[dict]] = {}
    for row in rows:
        places.setdefault(tuple(axis.keys.index(_key(axis.names, row)) for axis in axes), []).append(row)
    points = []
    for place, members in places.items():
        done = [row for row in members if row.get("state") == "done" and math.isfinite(number(row, metric))]
        points.append(Point(place, name_of(axes, place), tuple(members), tuple(done)))
    return Sweep(root, tuple(rows), swept, axes, tuple(points), metric)


def number(row: dict, key: str) -> float:
    """The number in a column; not a number where there is none."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def short(name: str) -> str:
    """A gin name without its module."""
    return name.rsplit(".", 1)[-1]


def shown(value: object) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if 10_000 <= abs(value) < 1e9 else f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def units(value: float, form: str = ".3g") -> str:
    """A number in few signs, its thousands as k, M, G, T, P."""
    for unit, sign in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{sign}" if abs(value) < 1e18 else f"{value:.3g}"
    return format(value, form)


def name_of(axes: Sequence[Axis], place: Sequence[int]) -> str:
    """What a place on these axes is called."""
    return ", ".join(axis.named(at) for axis, at in zip(axes, place, strict=True))


def _manifest(root: pathlib.Path) -> dict:
    path = root / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _axes_of(manifest: dict, rows: Sequence[dict]) -> list[list[str]]:
    """The axes that a manifest names, none where its cells are not these: another sweep may be planned since."""
    cells = {cell["id"] for cell in manifest.get("cells", ()) if "id" in cell}
    return manifest.get("axes", []) if not cells or cells == {row.get("id") for row in rows} else []


def _key(names: Sequence[str], row: dict) -> str:
    return json.dumps([row.get(name) for name in names])


def _together(rows: Sequence[dict], names: Sequence[str]) -> list[list[str]]:
    """Names in groups that change together: each value of one goes with one value of the other."""
    groups: list[list[str]] = []
    for name in names:
        own = len({_key([name], row) for row in rows})
        for group in groups:
            first, both = (len({_key(part, row) for row in rows}) for part in (group[:1], [group[0], name]))
            if own == first == both and own > 1:
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _axis(names: tuple[str, ...], rows: Sequence[dict]) -> Axis:
    """The axis of names that change together; first the name whose values are numbers that differ, if any is."""
    found = list(dict.fromkeys(_key(names, row) for row in rows))
    values = [json.loads(key) for key in found]
    telling = [index for index in range(len(names)) if _are_numbers([value[index] for value in values])]
    if telling:
        main = telling[0]
        order = sorted(range(len(values)), key=lambda at: values[at][main])
        values, found = [values[at] for at in order], [found[at] for at in order]
        names = (names[main], *names[:main], *names[main + 1 :])
        at = tuple(float(value[main]) for value in values)
        keys = tuple(json.dumps([value[main], *value[:main], *value[main + 1 :]]) for value in values)
        labels = tuple(shown(value[main]) for value in values)
        if len(set(labels)) < len(labels):
            labels = tuple(repr(value[main]) for value in values)
        return Axis(names, keys, labels, at, numeric=True, log=_is_log(at))
    labels = tuple(_label(names, value, values) for value in values)
    return Axis(names, tuple(found), labels, tuple(map(float, range(len(values)))), numeric=False, log=False)


def _label(names: Sequence[str], value: Sequence, values: Sequence[Sequence]) -> str:
    """The value of the first name, and those of the others that tell it from values with the same first."""
    alike = [other for other in values if other[0] == value[0]]
    telling = [at for at in range(1, len(names)) if len({json.dumps(other[at]) for other in alike}) > 1]
    return ", ".join([_said(value[0]), *(f"{short(names[at])} {_said(value[at])}" for at in telling)])


def _said(value: object) -> str:
    return value.removeprefix("@") if isinstance(value, str) else "None" if value is None else shown(value)


def _are_numbers(values: Sequence[object]) -> bool:
    plain = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return plain and len(set(values)) == len(values)


def _is_log(at: Sequence[float]) -> bool:
    """Whether values are spaced by their logarithm, or span so much that they are better drawn so."""
    if min(at) <= 0 or len(at) < 2:
        return False
    if len(at) > 2:
        gaps, ratios = np.diff(at), np.diff(np.log(at))
        return bool(ratios.std() / ratios.mean() < gaps.std() / gaps.mean())
    return max(at) / min(at) >= LOG_RATIO
