"""The mixture: a permutation of what the sources give, in proportion at every position, reached from anywhere."""

import collections
import itertools
import random
import sys

import pytest

from gpt4moe.data.mixture import MixedSource, Mixture


def source(name="a", rows=10, tokens=None, weight=1.0, cap=None):
    return MixedSource(name, rows, rows * 8 if tokens is None else tokens, weight, cap)


def random_sources(rng: random.Random) -> list[MixedSource]:
    return [
        source(
            str(index), rng.randint(1, 60), None, rng.choice([1, rng.random() + 0.01, 7]), rng.choice([1, 2, 4, 1.5, 3])
        )
        for index in range(rng.randint(1, 6))
    ]


def test_a_story_of_two_sources():
    # Three parts of a to one of b; a has four rows and may be seen once, then b goes on alone to its cap.
    mixture = Mixture([source("a", 4, weight=3, cap=1), source("b", 2, weight=1, cap=2)])
    assert [mixture[position] for position in range(len(mixture))] == [
        *((0, 0), (0, 1), (1, 0), (0, 2), (0, 3)),
        *((1, 1), (1, 2), (1, 3)),
    ]
    assert mixture.epochs(5) == {"a": 1.0, "b": 0.5}
    assert mixture.exhausted(4) == ()
    assert mixture.exhausted(5) == ("a",)
    assert mixture.exhausted(8) == ("a", "b")


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_every_row_comes_once_in_order_and_counts_agree_with_a_loop(seed, together):
    sources = random_sources(random.Random(seed))
    mixture = Mixture(sources, exhaust_together=together)
    seen = collections.Counter()
    for position in range(len(mixture)):
        assert mixture.rows_given(position) == tuple(seen[index] for index in range(len(sources)))
        index, number = mixture[position]
        assert number == seen[index], "rows of a source come in order, none twice, none left out"
        seen[index] += 1
    assert [seen[index] for index in range(len(sources))] == [one.total_rows for one in sources]
    assert mixture.exhausted(len(mixture)) == tuple(one.name for one in sources)


@pytest.mark.parametrize("seed", range(10))
def test_shares_in_tokens_hold_at_every_position(seed):
    rng = random.Random(seed)
    sources = [source(str(index), 10**6, rng.randint(1, 8) * 10**6, rng.random() + 0.05) for index in range(5)]
    mixture = Mixture(sources)
    rates = [one.weight * one.num_rows / one.num_tokens for one in sources]
    for position in (*range(300), 10**6, 10**9, 10**12):
        for given, rate in zip(mixture.rows_given(position), rates, strict=True):
            # Half a position of rounding a level of the tree, of which three hold five sources.
            assert abs(given - position * rate / sum(rates)) <= 1.5 + position * 1e-11
    tokens = [
        given * one.num_tokens / one.num_rows for given, one in zip(mixture.rows_given(10**9), sources, strict=True)
    ]
    weights = [one.weight for one in sources]
    assert [count / sum(tokens) for count in tokens] == pytest.approx([one / sum(weights) for one in weights], abs=1e-8)


def test_exhaust_together_ends_every_source_in_the_last_rows():
    sources = [source("text", 1000, weight=9, cap=2), source("code", 333, weight=1, cap=4), source("few", 10, cap=1.5)]
    mixture = Mixture(sources, exhaust_together=True)
    last = {mixture[position][0]: position for position in range(len(mixture))}
    assert len(mixture) == 2000 + 1332 + 15
    assert last[0] >= len(mixture) - 3 and last[1] >= len(mixture) - 4
    half = mixture.rows_given(len(mixture) // 2)
    assert half == pytest.approx((1000, 666, 7.5), abs=1.5)


def test_without_caps_there_is_no_end_and_far_positions_are_as_near_as_the_first():
    mixture = Mixture([source("a", 3), source("b", 5, weight=2, cap=7)])
    assert len(mixture) == sys.maxsize
    index, number = mixture[10**15]
    assert (index, number) == (0, 10**15 - 35)
    assert mixture.exhausted(10**15) == ("b",)


def test_one_source_is_itself():
    mixture = Mixture([source("a", 7, cap=3)])
    assert [mixture[position] for position in range(21)] == list(zip(itertools.repeat(0), range(21), strict=False))
    with pytest.raises(IndexError):
        mixture[21]


def test_a_source_without_rows_and_a_cap_below_a_row_are_one_line_errors():
    with pytest.raises(ValueError, match=r"^source='a' has no training rows[^\n]+$"):
        Mixture([source("a", 0)])
    with pytest.raises(ValueError, match=r"^max_epochs=0\.01 of source 'a' is less than one[^\n]+$"):
        Mixture([source("a", 10, cap=0.01)])
