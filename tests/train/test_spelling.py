"""Spelling: equal to a sum over every way of laying letters along features; what is no transcript gives nothing."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.vision import SpellingConfig
from gpt4moe.model.transformer import Transformer
from gpt4moe.train.loss import batch_loss, normalizers
from gpt4moe.train.spelling import spelling_nats, transcripts
from gpt4moe.types import Batch
from tests.model.slow import relative_difference
from tests.model.test_cross_attention import TINY

END, IMAGE, A, B, C = 0, 1, 2, 3, 4
BLANK = 5


def batch_of(tokens, image_index):
    tokens, index = np.asarray(tokens, np.int32), np.asarray(image_index, np.int32)
    same = {name: tokens for name in ("targets", "positions", "segment_ids", "source_ids")}
    return Batch(tokens=tokens, loss_weights=np.ones(tokens.shape, np.float32), image_index=index, **same)


# The first row has two images, with the text ab and cc behind them and a text without an image; the second has none.
TWO = batch_of(
    [[END, IMAGE, A, B, END, IMAGE, C, C, END, B], [END, A, B, C, A, B, C, A, B, C]],
    [[-1, 0, 0, 0, -1, 1, 1, 1, -1, -1], [-1] * 10],
)


def slow_nats(logits_RV, letters):
    """-log of the summed chances of every path of features that spells `letters`, doubles and blanks taken out."""
    chances_RV = jax.nn.softmax(logits_RV)
    total = 0.0
    for path in itertools.product(range(logits_RV.shape[1]), repeat=len(logits_RV)):
        spelled = [one for one, _ in itertools.groupby(path) if one != BLANK]
        if spelled == list(letters):
            total += jnp.prod(jnp.stack([chances_RV[place, one] for place, one in enumerate(path)]))
    return -jnp.log(total)


def test_transcripts_told_as_a_story():
    letters_BIN, counts_BI = transcripts(TWO.tokens, TWO.image_index, 3)
    assert counts_BI.tolist() == [[2, 2, 0], [0, 0, 0]]
    assert letters_BIN[0, 0, :2].tolist() == [A, B] and letters_BIN[0, 1, :2].tolist() == [C, C]


def test_nats_and_gradient_are_those_of_a_sum_over_all_paths():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 4, 6))
    valid = np.ones((2, 3, 4), bool)
    valid[0, 0, 3] = False  # padding at the end: the first image has three features

    def slow(logits):
        return slow_nats(logits[0, 0, :3], (A, B)) + slow_nats(logits[0, 1], (C, C))

    got = jax.value_and_grad(lambda logits: spelling_nats(logits, valid, TWO))(logits)
    assert relative_difference(got, jax.value_and_grad(slow)(logits)) < 1e-5


@pytest.mark.parametrize(
    ("letters", "features", "spelled"),
    [
        ((A, B), 2, True),
        ((A, B), 1, False),
        ((A, A), 2, False),
        ((A, A), 3, True),
        ((A, BLANK), 4, False),
        ((), 4, False),
    ],
)
def test_what_features_cannot_spell_gives_neither_nats_nor_gradient(letters, features, spelled):
    logits = jax.random.normal(jax.random.key(1), (1, 1, features, 6))
    batch = batch_of([[IMAGE, *letters]], [[0] * (1 + len(letters))])
    nats, gradient = jax.value_and_grad(lambda logits: spelling_nats(logits, np.ones((1, 1, features), bool), batch))(
        logits
    )
    assert (nats > 0) == spelled and bool(jnp.any(gradient != 0)) == spelled
    assert jnp.isfinite(nats) and jnp.all(jnp.isfinite(gradient))


def test_the_nats_of_a_batch_are_those_of_its_images_one_by_one():
    rng = np.random.default_rng(0)
    tokens, index = np.zeros((3, 12), np.int32), np.full((3, 12), -1, np.int32)
    images = []
    for row in range(3):
        at = 0
        for image in range(2):
            length = rng.integers(1, 5)
            letters = rng.integers(A, BLANK, length)
            tokens[row, at : at + length + 1], index[row, at : at + length + 1] = [IMAGE, *letters], image
            images.append((row, image, letters))
            at += length + 1
    logits = jnp.asarray(rng.normal(size=(3, 2, 9, 6)), jnp.float32)
    valid = np.arange(9) < rng.integers(9, 10, (3, 2, 1))
    alone = [
        spelling_nats(
            logits[row, image][None, None],
            valid[row, image][None, None],
            batch_of([[IMAGE, *letters]], [[0] * (1 + len(letters))]),
        )
        for row, image, letters in images
    ]
    assert spelling_nats(logits, valid, batch_of(tokens, index)) == pytest.approx(float(sum(alone)), rel=1e-5)


SPELLING = SpellingConfig(weight=0.7, num_ids=11)
MODEL = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, spelling=SPELLING))


def seen_batch():
    """Four rows of two images of six patches each; the last row has no image."""
    rng = np.random.default_rng(1)
    index = np.array([[-1, 0, 0, 0, 1, 1, 1, 1]] * 3 + [[-1] * 8], np.int32)
    tokens = rng.integers(2, 9, index.shape).astype(np.int32)
    ones, zeros = np.ones(index.shape, np.int32), np.zeros(index.shape, np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), index.shape)
    weights = rng.uniform(size=index.shape).astype(np.float32)
    valid = np.broadcast_to(np.array([True] * 3 + [False])[:, None], (4, 2))
    images = {"images": rng.integers(0, 256, (4, 2, 8, 12, 3)).astype(np.uint8), "image_valid": valid}
    images |= {"image_index": index, "first_image": np.minimum(index, 0)}
    return Batch(tokens, tokens, weights, positions, ones, zeros, **images)


@functools.cache
def objective_of(config, parts):
    """Objective, sums and gradients of `seen_batch` in so many parts, added up."""
    graph, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    batch = seen_batch()
    counts = normalizers(batch)

    @jax.jit
    def share(state, batch):
        def loss(state):
            return batch_loss(nnx.merge(graph, state), batch, counts, num_sources=1)

        return jax.value_and_grad(loss, has_aux=True)(state)

    rows = len(batch.tokens) // parts
    cut = [jax.tree.map(lambda leaf, at=at: leaf[at : at + rows], batch) for at in range(0, 4, rows)]
    return jax.tree.map(lambda *leaves: sum(leaves), *(share(state, part) for part in cut))


def test_the_objective_has_its_share_of_what_is_spelled():
    (objective, sums), gradients = objective_of(MODEL, 1)
    (without, plain), _ = objective_of(TINY, 1)
    weight = seen_batch().loss_weights.sum()
    assert plain.spelling is None and sums.spelling > 0
    np.testing.assert_allclose(objective - without, 0.7 * sums.spelling / weight, rtol=1e-5)
    assert jnp.any(gradients["spelling"]["weight"][...] != 0)


@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_add_up_to_the_whole(parts):
    got, want = (jax.tree.leaves(objective_of(MODEL, count)) for count in (parts, 1))
    for one, other in zip(got, want, strict=True):  # the gradient of a key's bias is rounding alone
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_batch_without_images_spells_nothing():
    text = dataclasses.replace(seen_batch(), images=None, image_valid=None, image_index=None, first_image=None)
    model = Transformer(MODEL, rngs=nnx.Rngs(0))
    assert batch_loss(model, text, normalizers(text), num_sources=1)[1].spelling == 0
