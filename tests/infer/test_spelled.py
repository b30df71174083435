"""What the encoder spells: the likeliest id of every feature, doubles and blanks taken out; also as a command."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.check import CallerError
from gpt4moe.config.vision import SpellingConfig
from gpt4moe.infer.pictures import Picture
from gpt4moe.infer.spelled import ROWS, spell
from gpt4moe.model.transformer import Transformer
from tests.model.test_cross_attention import TINY

BLANK = 2  # few classes, so that the likeliest of one feature is often that of the next


def model_of(frames):
    encoder = dataclasses.replace(TINY.vision.encoder, max_frames=frames)
    vision = dataclasses.replace(TINY.vision, encoder=encoder, spelling=SpellingConfig(num_ids=BLANK))
    return Transformer(dataclasses.replace(TINY, vision=vision), rngs=nnx.Rngs(0))


def pictures_of(count, frames):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, frames, 8, 12, 3)).astype(np.uint8)
    return [Picture(one, np.arange(frames) < rng.integers(1, frames + 1)) for one in pixels]


@pytest.mark.parametrize("frames", [1, 3])
def test_doubles_and_blanks_are_taken_out_of_the_likeliest_of_every_feature(frames):
    model, pictures = model_of(frames), pictures_of(ROWS + 3, frames)
    made = spell(model, pictures)
    doubled = blanks = 0
    for picture, ids in zip(pictures, made, strict=True):
        images, valid = picture.pixels[None, None], picture.valid[None, None]
        given = (images, valid) if frames > 1 else (images[:, :, 0], valid[:, :, 0])
        media = model.look(*given, jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32))
        path = np.asarray(jnp.argmax(model.spelling(media.features_BIRD), axis=-1))[media.valid_BIR].tolist()
        assert len(path) == 6 * picture.valid.sum()
        runs = [one for one, _ in itertools.groupby(path)]
        assert ids == [one for one in runs if one != BLANK]
        doubled, blanks = doubled + len(path) - len(runs), blanks + path.count(BLANK)
    assert doubled and blanks and len(set(map(tuple, made))) > 3


def test_an_encoder_that_has_not_learned_to_spell_is_refused():
    with pytest.raises(CallerError, match=r"^vision.spelling=None must be set for an encoder to spell; train with"):
        spell(Transformer(TINY, rngs=nnx.Rngs(0)), pictures_of(1, 1))
