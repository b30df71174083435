"""Pictures in the engine: rows with one, several and none share a batch, and each sees its own."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.check import CallerError
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.config.vision import CrossAttentionConfig, EncoderConfig, ResamplerConfig, VisionConfig
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.infer.engine.request import EngineRequest
from gpt4moe.infer.generate import generate_ids
from gpt4moe.infer.pictures import Picture
from gpt4moe.model.transformer import Transformer

from .models import make_config

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=8)
VISION = VisionConfig(
    EncoderConfig(height=8, width=12, patch_size=4, dim=8, num_layers=1, num_heads=2, hidden_dim=16, max_frames=2),
    CrossAttentionConfig(every=2, num_heads=2, head_dim=8, hidden_dim=24, gate_init=1.0),
    ResamplerConfig(num_latents=3, num_layers=1, num_heads=2, hidden_dim=16),
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    config = dataclasses.replace(make_config(tokenizer.vocab_size, 64), vision=VISION)
    definition = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]
    params = jax.jit(lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(0)))[1])()
    return nnx.merge(definition, jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 2 else leaf, params))


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    config = EngineConfig(slots=2, page_size=8, prefill_chunk=16, max_pictures=2)
    return Engine(Decoder.of(model), tokenizer, config)


def picture(seed, frames=1):
    """Of two frames, the second of which there may not be."""
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 8, 12, 3)).astype(np.uint8)
    return Picture(pixels, np.arange(2) < frames)


def test_rows_see_their_own_pictures_whoever_had_the_slot_before(model, engine, tokenizer):
    image, text = tokenizer.image, tokenizer.encode("what it says: ")
    single = Picture(picture(1).pixels[:1], np.ones(1, bool))
    asked = [
        ([0, image, *text], [picture(1)]),
        ([0, *text, image, *text[:3], image, 40], [picture(2), picture(3)]),
        ([0, *text], []),
        ([0, image, *text], [picture(4)]),  # alike in every token, not in what they show
        ([0, image, *text], [picture(1)]),
        ([0, image, *text], [picture(5, frames=2)]),
    ]
    given = [pictures if row else [single] for row, (_, pictures) in enumerate(asked)]
    pairs = zip(asked, given, strict=True)
    handles = [engine.submit(EngineRequest(ids, GREEDY, pictures)) for (ids, _), pictures in pairs]
    made = [list(handle.result()[0].token_ids) for handle in handles]
    expected = generate_ids(model, tokenizer, [ids for ids, _ in asked], GREEDY, [pictures for _, pictures in asked])
    for tokens, wanted in zip(made, expected, strict=True):
        assert tokens[: len(wanted)] == wanted and set(tokens[len(wanted) :]) <= {tokenizer.end_of_text}
    assert made[0] == made[4] and made[0] != made[3] and made[0] != made[5]
    (again,) = engine.submit(EngineRequest(asked[4][0], GREEDY, asked[4][1])).result()
    assert list(again.token_ids) == made[4]
    # A page of the prompt with the same picture, and a page of text that stands before the pictures of another.
    assert engine.metrics().cached_prompt_tokens == 8 + 8


def test_pictures_that_cannot_be_shown_are_refused_in_one_line(engine, tokenizer):
    image = tokenizer.image
    large = Picture(np.zeros((1, 9, 12, 3), np.uint8), np.ones(1, bool))
    refused = [
        ([0, 1], [picture(1)], "pictures=1 must be as many as image tokens in the prompt (0)"),
        ([0, *[image] * 3], [picture(1)] * 3, "pictures=3 must be at most 2; raise EngineConfig.max_pictures"),
        ([0, image], [large], "a picture=(1, 9, 12, 3) must be of at most 2 frames of (8, 12, 3)"),
        ([0, image], [picture(1)] * 2, "pictures=2 must be as many as image tokens in the prompt (1)"),
    ]
    for ids, pictures, message in refused:
        with pytest.raises(CallerError) as error:
            engine.submit(EngineRequest(ids, GREEDY, pictures))
        assert str(error.value) == message
