"""Reads a work directory's records of a run: `metrics.jsonl` in, series over tokens out."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
from etils import epath

from gpt4moe.config.check import require


@dataclasses.dataclass(frozen=True)
class Series:
    """One metric over training: tokens [n] (tokens trained when it was logged) and values [n, ...], float64."""

    tokens: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class History:
    """The logged rows of a run in the order of their steps, keys as in `metrics.jsonl`."""

    rows: tuple[dict, ...]

    def series(self, key: str) -> Series:
        """The rows that hold `key`; empty where none does. A value that is null counts as not a number."""
        held = [(row["tokens"], row[key]) for row in self.rows if key in row]
        tokens = np.array([tokens for tokens, _ in held], np.float64)
        return Series(tokens, np.array([value for _, value in held], np.float64))

    def last(self, key: str):
        """The latest value of `key`, or None."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)

    def total(self, key: str) -> float:
        """Sum of `key` over all logged rows."""
        return float(np.nansum(self.series(key).values))

    def median(self, key: str) -> float | None:
        """Median of `key` without its first row, which pays for compilation; None where nothing is logged."""
        values = self.series(key).values
        values = values[1:] if len(values) > 1 else values
        return float(np.nanmedian(values)) if np.isfinite(values).any() else None

    def names(self, pattern: str) -> tuple[str, ...]:
        """What the group of `pattern` matches among the keys, sorted: `r"loss/(.+)"` gives the sources."""
        keys = {key for row in self.rows for key in row}
        return tuple(sorted(match[1] for key in keys if (match := re.fullmatch(pattern, key))))


def read_history(workdir: str | epath.Path) -> History:
    """The run logged under `workdir`, local or object store.

    A last line that a killed process left half written is passed over. Raises `ValueError` where there is no
    `metrics.jsonl` or another line of it is broken.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    require(
        path.exists(), "workdir", str(workdir), "has no metrics.jsonl", "give the directory of a run that has trained"
    )
    lines = path.read_text().splitlines()
    rows = [_parse(path, number, line, last=number == len(lines)) for number, line in enumerate(lines, 1)]
    return History(tuple(sorted((row for row in rows if row), key=lambda row: row["step"])))


def read_json(workdir: str | epath.Path, name: str):
    """What the JSON file `name` of the work directory holds, None where it does not exist."""
    path = epath.Path(workdir) / name
    return json.loads(path.read_text()) if path.exists() else None


def read_text(workdir: str | epath.Path, name: str) -> str | None:
    """The text of the file `name` of the work directory, None where it does not exist."""
    path = epath.Path(workdir) / name
    return path.read_text() if path.exists() else None


def _parse(path: epath.Path, number: int, line: str, *, last: bool) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        require(last, "metrics.jsonl", line[:40], f"is not JSON in line {number} of {path}", "remove that line")
        return None
