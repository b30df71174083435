"""The mixture: which source, and which of its rows, stands at any position of the training sequence.

The sequence falls into phases that end when a source has been seen `max_epochs` times and leaves. Within a phase a
binary tree over the sources splits every stretch of positions by exact integer shares: of the first n positions of a
node, round(n * left / (left + right)) go to its left half. So a position is found in O(log sources) steps from
the position alone, no count is ever off its share by more than one position a level of the tree, and what a source
has to give is given exactly. (grain's own `mix` stops at the first exhausted source and rounds the weights.)
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import sys
from collections.abc import Sequence

from grain.transforms import DatasetSelectionMap

from gpt4moe.config.check import require

# Shares are integers, so that counts are exact at any position.
SHARE_UNITS = 2**40


@dataclasses.dataclass(frozen=True)
class MixedSource:
    """What the mixture knows of a source: rows, tokens in them, weight (in tokens) and how often it may be seen."""

    name: str
    num_rows: int
    num_tokens: int
    weight: float
    max_epochs: float | None

    @property
    def total_rows(self) -> int | None:
        """Rows it gives before it leaves, None for no end."""
        return None if self.max_epochs is None else round(self.max_epochs * self.num_rows)


@dataclasses.dataclass(frozen=True)
class _Phase:
    """Positions from `start` on: `active` sources share them, every source having given `given` rows before.

    `edges` are the running sums of the active sources' shares, from 0 on.
    """

    start: int
    active: tuple[int, ...]
    edges: tuple[int, ...]
    given: tuple[int, ...]


class Mixture(DatasetSelectionMap):
    """Position to (source, row number in that source's endless sequence); `len` is the number of positions."""

    def __init__(self, sources: Sequence[MixedSource], *, exhaust_together: bool = False) -> None:
        """`exhaust_together` makes what each source has to give its share, in the place of its weight.

        ValueError where a source has no rows, or where its cap is less than one row.
        """
        for source in sources:
            require(source.num_rows > 0, "source", source.name, "has no training rows", "lower held_out_fraction")
            small = f"of source {source.name!r} is less than one of its {source.num_rows} rows"
            require(source.total_rows != 0, "max_epochs", source.max_epochs, small)
        self._sources = tuple(sources)
        self._phases, self._length = _phases(self._sources, exhaust_together)
        self._starts = [phase.start for phase in self._phases]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> tuple[int, int]:
        if not 0 <= position < self._length:
            raise IndexError(position)
        phase = self._phase(position)
        place, number = _lookup(phase.edges, position - phase.start)
        source = phase.active[place]
        return source, phase.given[source] + number

    def rows_given(self, position: int) -> tuple[int, ...]:
        """Rows that every source has given before `position`, in the order of the sources."""
        position = min(position, self._length)
        phase = self._phase(position)
        given = list(phase.given)
        for place, source in enumerate(phase.active):
            given[source] += _count(phase.edges, place, position - phase.start)
        return tuple(given)

    def epochs(self, position: int) -> dict[str, float]:
        """How many times every source has been seen before `position`."""
        pairs = zip(self._sources, self.rows_given(position), strict=True)
        return {source.name: rows / source.num_rows for source, rows in pairs}

    def exhausted(self, position: int) -> tuple[str, ...]:
        """Sources that have given everything before `position`."""
        pairs = zip(self._sources, self.rows_given(position), strict=True)
        return tuple(source.name for source, rows in pairs if rows == source.total_rows)

    def _phase(self, position: int) -> _Phase:
        return self._phases[bisect.bisect_right(self._starts, position) - 1]


def _phases(sources: tuple[MixedSource, ...], exhaust_together: bool) -> tuple[tuple[_Phase, ...], int]:
    """All phases in order and the position where the last one ends."""
    shares = _shares(sources, exhaust_together)
    given = [0] * len(sources)
    active = tuple(range(len(sources)))
    phases, start = [], 0
    while active:
        edges = (0, *itertools.accumulate(shares[source] for source in active))
        phases.append(_Phase(start, active, edges, tuple(given)))
        lengths = [
            _position_of(edges, place, sources[source].total_rows - given[source])
            for place, source in enumerate(active)
            if sources[source].total_rows is not None
        ]
        if not lengths:
            return tuple(phases), sys.maxsize
        for place, source in enumerate(active):
            given[source] += _count(edges, place, min(lengths))
        start += min(lengths)
        active = tuple(source for source in active if given[source] != sources[source].total_rows)
    return tuple(phases), start


def _shares(sources: tuple[MixedSource, ...], exhaust_together: bool) -> list[int]:
    """Integer share of positions of every source: a weight counts tokens, a position is a row of so many tokens."""
    if exhaust_together:
        return [source.total_rows for source in sources]
    rates = [source.weight * source.num_rows / source.num_tokens for source in sources]
    return [max(round(rate / max(rates) * SHARE_UNITS), 1) for rate in rates]


def _left_count(edges: tuple[int, ...], low: int, middle: int, high: int, count: int) -> int:
    """How many of the first `count` positions of sources low..high-1 go to low..middle-1: rounded half up, exact."""
    whole = edges[high] - edges[low]
    return (2 * count * (edges[middle] - edges[low]) + whole) // (2 * whole)


def _lookup(edges: tuple[int, ...], position: int) -> tuple[int, int]:
    """The source that holds `position` of a phase, and how many positions it held before."""
    low, high = 0, len(edges) - 1
    while high - low > 1:
        middle = (low + high) // 2
        before = _left_count(edges, low, middle, high, position)
        if _left_count(edges, low, middle, high, position + 1) > before:
            high, position = middle, before
        else:
            low, position = middle, position - before
    return low, position


def _count(edges: tuple[int, ...], place: int, count: int) -> int:
    """How many of the first `count` positions of a phase are of the source at `place`."""
    low, high = 0, len(edges) - 1
    while high - low > 1:
        middle = (low + high) // 2
        left = _left_count(edges, low, middle, high, count)
        if place < middle:
            high, count = middle, left
        else:
            low, count = middle, count - left
    return count


def _position_of(edges: tuple[int, ...], place: int, rows: int) -> int:
    """The fewest positions of a phase in which the source at `place` gives `rows` rows."""
    low, high = 0, 1
    while _count(edges, place, high) < rows:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _count(edges, place, middle) < rows:
            low = middle
        else:
            high = middle
    return high
