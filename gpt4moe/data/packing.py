"""The packing plan: which pieces of which documents make up every row, worked out once and kept beside the tokens.

Best fit (Johnson 1973) over windows of documents, longest first: a piece goes into the open row with the least room
that still holds it. Documents of at most T tokens stay whole; longer ones are cut into pieces of T and a rest. Where
there are images, a row also holds at most so many of them: a piece of more is cut before the first one too many, so
that none is lost, and a piece only goes into a row with room for its images.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib

import numpy as np

WINDOW_PIECES = 65_536
# Raise when the same input gives other rows.
PLAN_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Rows of one split of one source.

    row_offsets: [rows + 1] int64, the pieces of row r are row_offsets[r] .. row_offsets[r+1]-1.
    starts: [pieces] int64, first token of a piece in the stream. lengths: [pieces] int32.
    split_documents: how many documents were longer than a row, or of more images, and cut.
    """

    sequence_length: int
    row_offsets: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    split_documents: int

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.row_offsets) - 1

    @functools.cached_property
    def row_tokens(self) -> np.ndarray:
        """Tokens of every row, without padding, [rows] int64."""
        return np.diff(np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])[self.row_offsets])

    @functools.cached_property
    def num_tokens(self) -> int:
        """Tokens of all rows: every token of the split once."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def fill(self) -> float:
        """Share of the rows' positions that hold a token."""
        return self.num_tokens / (self.num_rows * self.sequence_length) if self.num_rows else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class ImageLimit:
    """Where the tokens of images stand in the stream, ascending, and how many images a row may hold."""

    positions: np.ndarray
    per_row: int


def make_plan(offsets: np.ndarray, sequence_length: int, limit: ImageLimit | None = None) -> Plan:
    """Packs documents, document d being tokens offsets[d] .. offsets[d+1]-1 of the stream, into rows of T tokens."""
    starts, lengths = _pieces(offsets, sequence_length)
    images = np.zeros(len(starts), np.int64)
    if limit is not None:
        starts, lengths, images = _cut_at_images(starts, lengths, limit)
    rows = np.empty(len(starts), np.int64)
    packer = _BestFit(sequence_length, limit.per_row if limit else 0)
    for first in range(0, len(starts), WINDOW_PIECES):
        window = slice(first, first + WINDOW_PIECES)
        # Stable, so that the plan is the same on every platform.
        order = np.argsort(-lengths[window], kind="stable")
        rows[first + order] = packer.place(lengths[window][order].tolist(), images[window][order].tolist())
    by_row = np.argsort(rows, kind="stable")
    row_offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=packer.num_rows))])
    split_documents = int(np.count_nonzero(np.diff(np.searchsorted(starts, offsets)) > 1))
    return Plan(sequence_length, row_offsets.astype(np.int64), starts[by_row], lengths[by_row], split_documents)


def cached_plan(
    folder: pathlib.Path, key: str, offsets: np.ndarray, sequence_length: int, limit: ImageLimit | None = None
) -> Plan:
    """`make_plan`, read from `folder` where `key` (what the offsets come from) was planned before, else saved there."""
    fields = f"{PLAN_VERSION}/{key}/{sequence_length}/{len(offsets)}"
    if limit is not None:
        fields += f"/images/{limit.per_row}"
    path = folder / f"{hashlib.blake2b(fields.encode(), digest_size=8).hexdigest()}.npz"
    if path.exists():
        with np.load(path) as saved:
            return Plan(
                sequence_length, saved["row_offsets"], saved["starts"], saved["lengths"], int(saved["split_documents"])
            )
    plan = make_plan(offsets, sequence_length, limit)
    arrays = {name: getattr(plan, name) for name in ("row_offsets", "starts", "lengths", "split_documents")}
    if os.access(folder.parent, os.W_OK):
        folder.mkdir(exist_ok=True)
        scratch = folder / f"{path.stem}.writing-{os.getpid()}.npz"
        np.savez(scratch, **arrays)
        os.replace(scratch, path)
    return plan


def _pieces(offsets: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the pieces of all documents, in order, none longer than a row."""
    documents = np.diff(offsets)
    counts = -(-documents // sequence_length)
    document = np.repeat(np.arange(len(documents)), counts)
    within = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = offsets[:-1][document] + within * sequence_length
    lengths = np.minimum(documents[document] - within * sequence_length, sequence_length)
    return starts.astype(np.int64), lengths.astype(np.int32)


def _cut_at_images(
    starts: np.ndarray, lengths: np.ndarray, limit: ImageLimit
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces, none of more images than a row may hold, and how many images each has."""
    firsts, lasts = np.searchsorted(limit.positions, (starts, starts + lengths))
    crowded = np.flatnonzero(lasts - firsts > limit.per_row)
    cuts = [limit.positions[firsts[piece] + limit.per_row : lasts[piece] : limit.per_row] for piece in crowded]
    ends = np.concatenate([starts + lengths, *cuts])
    starts = np.concatenate([starts, *cuts])
    starts.sort()
    ends.sort()
    images = np.diff(np.searchsorted(limit.positions, (starts, ends)), axis=0)[0]
    return starts, (ends - starts).astype(np.int32), images


class _BestFit:
    """Open rows by the tokens and images they have room for; bit n of `rooms[i]`: there is a row of room n and i."""

    def __init__(self, sequence_length: int, per_row: int = 0) -> None:
        self._length, self._per_row = sequence_length, per_row
        self._open: list[list[list[int]]] = [[[] for _ in range(sequence_length + 1)] for _ in range(per_row + 1)]
        self._rooms = [0] * (per_row + 1)
        self.num_rows = 0

    def place(self, lengths: list[int], images: list[int]) -> list[int]:
        """The row of every piece, in order."""
        return [self._place(length, count) for length, count in zip(lengths, images, strict=True)]

    def _place(self, length: int, count: int) -> int:
        """Into the row with the least room for tokens, of those the one with the least for images."""
        room, left = self._length + 1, self._per_row
        for images in range(count, self._per_row + 1):
            fitting = self._rooms[images] >> length
            if fitting:
                least = length + (fitting & -fitting).bit_length() - 1
                if least < room:
                    room, left = least, images
        if room <= self._length:
            row = self._open[left][room].pop()
            if not self._open[left][room]:
                self._rooms[left] ^= 1 << room
        else:
            room, row = self._length, self.num_rows
            self.num_rows += 1
        if room > length:
            self._open[left - count][room - length].append(row)
            self._rooms[left - count] |= 1 << (room - length)
        return row
