"""What batching loses to uneven lengths: closed forms against drawn batches."""

import numpy as np
import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.plan.serving.batching import KINDS, Lengths, continuous_batching_gain, paged_cache_gain


def test_gains_of_the_audit():
    assert continuous_batching_gain(Lengths("uniform"), 32) == pytest.approx(1.94, abs=0.005)
    assert continuous_batching_gain(Lengths("exponential"), 32) == pytest.approx(4.06, abs=0.005)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 32])
def test_gains_are_those_of_drawn_batches(kind, rows):
    lengths = Lengths(kind, mean=2000.0, sigma=0.8)
    drawn = lengths.draw(np.random.default_rng(1), 20_000 * rows).reshape(-1, rows)
    assert drawn.mean() == pytest.approx(lengths.mean_tokens, rel=0.02)
    assert continuous_batching_gain(lengths, rows) == pytest.approx(drawn.max(axis=1).mean() / 2000, rel=0.02)


def test_a_sample_by_hand():
    """Of 1 and 3, two draws: the longest is 1 in one of four cases."""
    lengths = Lengths(sample=(3, 1))
    assert lengths.expected_longest(2) == pytest.approx(0.25 * 1 + 0.75 * 3)
    assert continuous_batching_gain(lengths, 2) == pytest.approx(2.5 / 2)
    assert set(lengths.draw(np.random.default_rng(0), 50).tolist()) == {1, 3}


@pytest.mark.parametrize("kind", KINDS)
def test_longer_batches_gain_more_and_equal_lengths_nothing(kind):
    gains = [continuous_batching_gain(Lengths(kind), rows) for rows in (1, 2, 8, 64)]
    assert gains[0] == pytest.approx(1, abs=1e-6)
    assert gains == sorted(gains)
    assert kind != "fixed" or gains[-1] == 1


def test_pages():
    assert paged_cache_gain(2048, 512) == 4
    with pytest.raises(CallerError, match="mean_length=512 must be at most max_length"):
        paged_cache_gain(100, 512)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "zipf"}, "lengths='zipf' must be in"),
        ({"mean": 0.0}, "mean length=0.0 must be a number above 0"),
        ({"sigma": -1.0}, "sigma=-1.0 must be a number of at least 0"),
        ({"sample": (3, 0)}, "a length of the sample=0 must be an integer of at least 1"),
    ],
)
def test_lengths_that_cannot_be(changes, says):
    with pytest.raises(CallerError) as caught:
        Lengths(**changes)
    assert str(caught.value).startswith(says)
