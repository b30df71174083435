"""What choices say of routers and of what experts specialise in: by hand, and against slow loops."""

import numpy as np
import pytest

from gpt4moe.analysis.routing import coactivation, dead_experts, load, saturation
from gpt4moe.analysis.specialization import (
    MIN_OCCURRENCES,
    Groups,
    assignments,
    by_position,
    distance,
    over_uniform,
    top_tokens,
)
from gpt4moe.analysis.token_class import by_class
from gpt4moe.data.tokenizer import byte_tokenizer, train_tokenizer

LAYERS, TOKENS, CHOICES, EXPERTS = 2, 60, 3, 7
NAN = float("nan")


@pytest.fixture(scope="module")
def random_ids():
    """Distinct experts for every token, some choices unused; the last expert idle."""
    draw = np.random.default_rng(0)
    ids = np.array([draw.permutation(EXPERTS - 1)[:CHOICES] for _ in range(LAYERS * TOKENS)])
    ids[draw.random(ids.shape) < 0.2] = -1
    return ids.reshape(LAYERS, TOKENS, CHOICES)


def test_two_tokens_by_hand():
    """One layer, experts 0-3, K = 2: token a goes to 0 and 1, token b to 0 and 2."""
    ids = np.array([[[0, 1], [2, 0]]])
    np.testing.assert_allclose(load(ids, 4), [[0.5, 0.25, 0.25, 0]])
    assert dead_experts(load(ids, 4)).tolist() == [[False, False, False, True]]
    expected = [[NAN, 0.5, 0.5, 0], [1, NAN, 0, 0], [1, 0, NAN, 0], [NAN] * 4]
    np.testing.assert_allclose(coactivation(ids, 4), [expected])
    # Earlier, a went to 1 and 0 (the same two) and b to 0 and 3 (one of two): three of four choices are settled.
    np.testing.assert_allclose(saturation(np.array([[[1, 0], [0, 3]]]), ids), [0.75])


def test_dead_is_below_a_hundredth_of_the_mean():
    load_LE = np.array([[0.0024, 0.0026, 0.495, 0.5]])
    assert dead_experts(load_LE / load_LE.sum()).tolist() == [[True, False, False, False]]


def test_load_and_coactivation_equal_slow_loops(random_ids):
    counts, together = np.zeros((LAYERS, EXPERTS)), np.zeros((LAYERS, EXPERTS, EXPERTS))
    for layer in range(LAYERS):
        for token in random_ids[layer]:
            for i in token[token >= 0]:
                counts[layer, i] += 1
                for j in token[token >= 0]:
                    together[layer, i, j] += i != j
    np.testing.assert_allclose(load(random_ids, EXPERTS), counts / counts.sum(1, keepdims=True))
    with np.errstate(invalid="ignore"):
        expected = together / counts[:, :, None]
    expected[:, range(EXPERTS), range(EXPERTS)] = NAN
    np.testing.assert_allclose(coactivation(random_ids, EXPERTS), expected, rtol=1e-6)


def test_saturation_equals_a_slow_loop_and_is_one_with_itself(random_ids):
    other = np.roll(random_ids, 1, axis=1)
    for layer in range(LAYERS):
        pairs = list(zip(random_ids[layer].tolist(), other[layer].tolist(), strict=True))
        kept = sum(len({*final} & {*earlier} - {-1}) for final, earlier in pairs)
        chosen = sum(len({*final} - {-1}) for final, _ in pairs)
        np.testing.assert_allclose(saturation(other, random_ids)[layer], kept / chosen)
    np.testing.assert_allclose(saturation(random_ids[..., ::-1], random_ids), 1)


def test_specialisation_by_hand():
    """Source x: three tokens, all to expert 0. Source y: one token, to expert 1. Nothing goes to expert 2; K = 1."""
    counts = assignments(np.array([[[0], [0], [0], [1]]]), Groups(("x", "y", "z"), np.array([0, 0, 0, 1])), 3)
    assert counts.tolist() == [[[3, 0, 0], [0, 1, 0], [0, 0, 0]]]
    np.testing.assert_allclose(over_uniform(counts), [[[3, 0, 0], [0, 3, 0], [NAN] * 3]])
    # All: (3/4, 1/4, 0). x is (1, 0, 0), 1/4 away, weight 3/4; y is (0, 1, 0), 3/4 away, weight 1/4.
    np.testing.assert_allclose(distance(counts), [0.375])


def test_specialisation_equals_a_slow_loop(random_ids):
    groups_U = np.random.default_rng(1).integers(0, 3, TOKENS)
    counts = assignments(random_ids, Groups(("a", "b", "c"), groups_U), EXPERTS)
    for layer in range(LAYERS):
        for group in range(3):
            ids = random_ids[layer][groups_U == group]
            shares = [(ids == expert).sum() / (ids >= 0).sum() * EXPERTS for expert in range(EXPERTS)]
            np.testing.assert_allclose(over_uniform(counts)[layer, group], shares)
    np.testing.assert_allclose(distance(assignments(random_ids, Groups(("all",), groups_U * 0), EXPERTS)), 0)


def test_top_tokens_of_an_expert_by_hand():
    """Id 5 goes to expert 0 nine times of ten, id 6 always to expert 1; id 7 is too rare to say anything."""
    token_ids = np.array([5] * 10 + [6] * MIN_OCCURRENCES + [7] * (MIN_OCCURRENCES - 1))
    ids_LUK = np.array([[[0]] * 9 + [[1]] + [[1]] * MIN_OCCURRENCES + [[2]] * (MIN_OCCURRENCES - 1)])
    [[first, second, third]] = top_tokens(ids_LUK, token_ids, 3, count=4)
    assert [(top.token_id, top.share, top.occurrences) for top in first] == [(5, 0.9, 10)]
    assert [(top.token_id, round(top.share, 3)) for top in second] == [(6, 1.0), (5, 0.1)]
    assert third == []
    assert [len(expert) for expert in top_tokens(ids_LUK, token_ids, 3, count=1)[0]] == [1, 1, 0]


def test_positions_fall_into_doubling_buckets():
    groups = by_position(np.array([0, 1, 2, 3, 4, 7, 8, 0, 31]))
    assert groups.names == ("0", "1", "2-3", "4-7", "8-15", "16-31")
    assert groups.groups_U.tolist() == [0, 1, 2, 2, 3, 3, 4, 0, 5]


def classes_of(tokenizer, text, positions=None):
    ids = np.array([tokenizer.end_of_text, *tokenizer.encode(text)])
    groups = by_class(ids, np.arange(len(ids)) if positions is None else positions, tokenizer)
    return [groups.names[group] for group in groups.groups_U]


def test_classes_of_single_bytes():
    expected = ["special", "word start", "word continuation", "whitespace", "word start", "punctuation", "digits"]
    assert classes_of(byte_tokenizer(), "ab c.7") == expected
    assert classes_of(byte_tokenizer(), "{é$") == [
        "special",
        "code symbols",
        *["part of a character"] * 2,
        "code symbols",
    ]


def test_classes_of_merged_tokens():
    tokenizer = train_tokenizer(["the the () ()\n ()\n the"] * 50, 290)
    ids = tokenizer.encode("the then ()\n")
    assert [tokenizer.decode([index]) for index in ids] == ["the", " the", "n", " ()\n"]
    assert classes_of(tokenizer, "the then ()\n") == [
        "special", "word start", "word start", "word continuation", "punctuation",
    ]  # fmt: skip
    # The same ids where each begins a document of its own: nothing continues a word.
    assert "word continuation" not in classes_of(tokenizer, "the then ()\n", np.zeros(5, int))
