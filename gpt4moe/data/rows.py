"""Packed rows: one row of a packing plan as arrays, and rows stacked into a `types.Batch`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt4moe.data.image_store import StoredImages
from gpt4moe.data.packing import Plan
from gpt4moe.types import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One packed row, [T] int32 each; `num_tokens` of its positions are filled, from the left, the rest is zero.

    `images` are numbers of stored images of the row's source and split, in the order of their tokens; `seen` of the row
    says which a token sees.
    """

    source: int
    num_tokens: int
    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    images: tuple[int, ...] = ()
    seen: SeenImages | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class SeenImages:
    """The latest and the first image of its segment that every token sees, [T] int32, as `types.Batch` has them.

    Images are counted in the row; -1 for none. `is_image`: [T] bool, whether the target is an image.
    """

    image_index: np.ndarray
    first_image: np.ndarray
    is_image: np.ndarray


class PackedRows:
    """Random access to the rows of one split of one source, in plan order; what grain shuffles and repeats.

    Every piece of a document is a segment of its own: segments count from 1, positions from 0 in each, and the last
    target of a document is end-of-text. The last target of a cut document's piece is the next piece's first token.
    """

    def __init__(self, stream: np.ndarray, plan: Plan, source: int, images: StoredImages | None = None) -> None:
        self._stream, self._plan, self._source, self._images = stream, plan, source, images
        self._arange = np.arange(plan.sequence_length, dtype=np.int32)

    def __len__(self) -> int:
        return self._plan.num_rows

    def __getitem__(self, index: int) -> Row:
        plan = self._plan
        tokens, targets, positions, segment_ids = np.zeros((4, plan.sequence_length), np.int32)
        first, last = plan.row_offsets[index : index + 2].tolist()
        starts, lengths = plan.starts[first:last].tolist(), plan.lengths[first:last].tolist()
        end = 0
        for segment, (start, length) in enumerate(zip(starts, lengths, strict=True), start=1):
            begin, end = end, end + length
            tokens[begin:end] = self._stream[start : start + length]
            targets[begin:end] = self._stream[start + 1 : start + length + 1]
            positions[begin:end] = self._arange[:length]
            segment_ids[begin:end] = segment
        images, seen = self._seen(starts, lengths) if self._images is not None else ((), None)
        return Row(self._source, end, tokens, targets, positions, segment_ids, images, seen)

    def _seen(self, starts: list[int], lengths: list[int]) -> tuple[tuple[int, ...], SeenImages]:
        """The images of a row, and which a token sees: none of another segment, nor of an earlier piece."""
        length = self._plan.sequence_length
        seen = SeenImages(np.full(length, -1, np.int32), np.full(length, -1, np.int32), np.zeros(length, bool))
        images: list[int] = []
        begin = 0
        for start, count in zip(starts, lengths, strict=True):
            first, last = self._images.within(start, start + count + 1)
            places = self._images.positions[first:last] - start
            seen.is_image[begin + places[places > 0] - 1] = True
            for image, place in enumerate(places[places < count].tolist(), start=first):
                seen.image_index[begin + place : begin + count] = len(images)
                if image == first:
                    seen.first_image[begin + place : begin + count] = len(images)
                images.append(image)
            begin += count
        return tuple(images), seen


def stack_rows(rows: Sequence[Row], num_rows: int, sequence_length: int) -> Batch:
    """A [num_rows, T] numpy batch of `rows` in order; rows that are lacking are empty (segment 0, weight 0)."""

    def stacked(name: str) -> np.ndarray:
        out = np.zeros((num_rows, sequence_length), np.int32)
        for index, row in enumerate(rows):
            out[index] = getattr(row, name)
        return out

    loss_weights = np.zeros((num_rows, sequence_length), np.float32)
    source_ids = np.zeros((num_rows, sequence_length), np.int32)
    for index, row in enumerate(rows):
        loss_weights[index, : row.num_tokens] = 1
        if row.seen is not None:
            loss_weights[index, row.seen.is_image] = 0
        source_ids[index] = row.source
    fields: dict[str, Any] = {name: stacked(name) for name in ("tokens", "targets", "positions", "segment_ids")}
    return Batch(loss_weights=loss_weights, source_ids=source_ids, **fields)


def image_targets(plan: Plan, images: StoredImages) -> np.ndarray:
    """How many targets of every row are images, [rows] int64."""
    before = [np.searchsorted(images.positions, plan.starts + shift) for shift in (plan.lengths + 1, 1)]
    counted = np.concatenate([[0], np.cumsum(before[0] - before[1])])
    return np.diff(counted[plan.row_offsets])
