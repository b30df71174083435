"""Batches of one size, so that all of them run the same program."""

from __future__ import annotations

from collections.abc import Iterator


def batches(count: int, rows: int) -> Iterator[list[int]]:
    """Numbers 0 to `count` - 1 in lists of `rows`, or of `count` where that is less; the last number fills the last."""
    for start in range(0, count, rows):
        yield [min(row, count - 1) for row in range(start, start + min(rows, count))]
