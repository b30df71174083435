"""The packing plan: every token once, short documents whole, the rows of a slow best fit."""

import dataclasses

import numpy as np
import pytest

from gpt4moe.data import packing
from gpt4moe.data.packing import Plan, cached_plan, make_plan


def offsets_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


def pieces_of(plan: Plan, row: int) -> list[tuple[int, int]]:
    chosen = slice(*plan.row_offsets[row : row + 2])
    return list(zip(plan.starts[chosen].tolist(), plan.lengths[chosen].tolist(), strict=True))


def slow_rows(lengths: list[int], sequence_length: int) -> list[list[tuple[int, int]]]:
    """Cut, sort by length, and search all rows for the one with the least room that fits; latest opened on a tie."""
    pieces, start = [], 0
    for length in lengths:
        for first in range(0, length, sequence_length):
            pieces.append((start + first, min(sequence_length, length - first)))
        start += length
    rows, rooms, changed = [], [], []
    for time, (start, length) in enumerate(sorted(pieces, key=lambda piece: -piece[1])):
        fitting = [(room, -changed[row], row) for row, room in enumerate(rooms) if room >= length]
        row = min(fitting)[2] if fitting else len(rows)
        if row == len(rows):
            rows.append([])
            rooms.append(sequence_length)
            changed.append(0)
        rows[row].append((start, length))
        rooms[row] -= length
        changed[row] = time
    return [sorted(row) for row in rows]


def test_a_story_of_five_documents():
    # Rows of 10: the 23 is cut into 10 + 10 + 3; 7 + 3 and 6 + 4 fill rows of their own; 2 is left alone.
    plan = make_plan(offsets_of([7, 23, 6, 4, 2]), 10)
    rows = [pieces_of(plan, row) for row in range(plan.num_rows)]
    assert rows == [[(7, 10)], [(17, 10)], [(0, 7), (27, 3)], [(30, 6), (36, 4)], [(40, 2)]]
    assert plan.split_documents == 1
    assert plan.row_tokens.tolist() == [10, 10, 10, 10, 2]
    assert plan.num_tokens == 42
    assert plan.fill == pytest.approx(42 / 50)


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_those_of_a_slow_best_fit(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, 60).tolist()
    plan = make_plan(offsets_of(lengths), 16)
    assert [sorted(pieces_of(plan, row)) for row in range(plan.num_rows)] == slow_rows(lengths, 16)


@pytest.mark.parametrize("window", [7, 65_536])
def test_every_token_once_and_short_documents_whole(monkeypatch, window):
    monkeypatch.setattr(packing, "WINDOW_PIECES", window)
    rng = np.random.default_rng(0)
    for _ in range(20):
        sequence_length = int(rng.integers(2, 50))
        lengths = rng.integers(1, 3 * sequence_length, int(rng.integers(1, 80)))
        offsets = offsets_of(lengths)
        plan = make_plan(offsets, sequence_length)
        covered = np.concatenate(
            [np.arange(start, start + n) for start, n in zip(plan.starts, plan.lengths, strict=True)]
        )
        assert np.array_equal(np.sort(covered), np.arange(offsets[-1]))
        assert plan.row_tokens.max() <= sequence_length
        assert plan.split_documents == (lengths > sequence_length).sum()
        starts = set(plan.starts.tolist())
        assert {int(start) for start in offsets[:-1]} <= starts, "a document begins a piece"
        pieces = dict(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True))
        assert all(
            pieces[int(start)] == n for start, n in zip(offsets[:-1], lengths, strict=True) if n <= sequence_length
        )


def test_real_document_lengths_fill_the_rows():
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 5000).astype(int) + 1
    assert make_plan(offsets_of(lengths), 512).fill > 0.999


def test_a_saved_plan_is_the_plan(tmp_path):
    offsets = offsets_of([5, 9, 3, 30])
    made = cached_plan(tmp_path / "plans", "source", offsets, 8)
    saved = cached_plan(tmp_path / "plans", "source", offsets, 8)
    for field in dataclasses.fields(Plan):
        assert np.array_equal(getattr(made, field.name), getattr(saved, field.name))
    assert len(list((tmp_path / "plans").iterdir())) == 1
    assert cached_plan(tmp_path / "plans", "source", offsets, 16).num_rows != made.num_rows


def test_no_documents_make_no_rows():
    plan = make_plan(np.zeros(1, np.int64), 8)
    assert (plan.num_rows, plan.num_tokens, plan.fill) == (0, 0, 0.0)
