"""Where a model looks as it reads: maps of attention of models made by hand, and how a report shows them."""

import base64
import dataclasses
import io
import re
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from gpt4moe.analysis.reading import Reading, attention_maps
from gpt4moe.analysis.reading_section import reading_section
from gpt4moe.config.check import CallerError
from gpt4moe.config.vision import CrossAttentionConfig, EncoderConfig, ResamplerConfig, VisionConfig
from gpt4moe.infer.pictures import Picture
from gpt4moe.model.transformer import Transformer
from tests.train import tiny

ENCODER = EncoderConfig(
    height=8, width=12, patch_size=4, dim=8, num_layers=1, num_heads=2, hidden_dim=16, class_token=True, num_registers=1
)
CROSS = CrossAttentionConfig(every=1, num_heads=2, head_dim=8, hidden_dim=24, qk_norm=False, norm="layer")
VISION = VisionConfig(ENCODER, CROSS)
IMAGE = 7
PROMPT = [0, IMAGE, 3]


def trained(vision=VISION):
    """What `attention_maps` takes of a run: a model with random parameters."""
    config = dataclasses.replace(tiny.MODEL, vision=vision)
    model = Transformer(config, rngs=nnx.Rngs(0))
    return types.SimpleNamespace(
        model=model, config=types.SimpleNamespace(model=config), tokenizer=types.SimpleNamespace(image=IMAGE)
    )


def picture(frames=2, white=(1, 1, 2)):
    """Black frames with one white patch."""
    pixels, (frame, row, column) = np.zeros((frames, 8, 12, 3), np.uint8), white
    pixels[frame, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 255
    return Picture(pixels, np.ones(frames, bool))


def looks_for_white(of, sharpness):
    """Every patch becomes what it is alone, leading tokens nothing; keys measure whiteness, queries all ask for it."""
    encoder, block = of.model.vision_encoder, of.model.cross_attention
    silent = [encoder.positions, encoder.leading, encoder.blocks.output.weight, encoder.blocks.down.weight, block.query]
    for parameter in (*silent, block.key, block.attention_norm.scale):
        parameter[...] = jnp.zeros_like(parameter[...])
    block.attention_norm.bias[...] = jnp.ones_like(block.attention_norm.bias[...])
    block.query[...] = block.query[...].at[..., 0].set(1 / tiny.MODEL.model_dim)
    features = encoder(picture(1, (0, 0, 0)).pixels)[0]
    white, black = (features[ENCODER.num_leading + at] for at in (0, 1))
    whiteness = sharpness * (white - black)[None, :, None]
    block.key[...] = block.key[...].at[..., 0].set(whiteness)
    return of


@pytest.mark.parametrize("white", [(0, 0, 1), (1, 1, 2), (1, 0, 0)])
def test_attention_falls_on_the_patch_it_is_made_for(white):
    maps = attention_maps(looks_for_white(trained(), 10.0), picture(white=white), PROMPT, [4, 5])
    assert maps.shape == (2, 2, 2, 3)
    wanted = np.zeros((2, 2, 3))
    wanted[white] = 1
    np.testing.assert_allclose(maps, np.broadcast_to(wanted, maps.shape), atol=1e-5)


def test_even_attention_is_one_over_all_features_leading_tokens_among_them():
    of, shown = looks_for_white(trained(), 0.0), picture()
    np.testing.assert_allclose(attention_maps(of, shown, PROMPT, [4]), 1 / (2 * (6 + 2)), rtol=1e-5)
    absent = Picture(shown.pixels, np.array([True, False]))
    maps = attention_maps(of, absent, PROMPT, [4])
    np.testing.assert_allclose(maps[:, 0], 1 / (6 + 2), rtol=1e-5)
    assert not maps[:, 1].any()
    plain = trained(VisionConfig(dataclasses.replace(ENCODER, class_token=False, num_registers=0), CROSS))
    np.testing.assert_allclose(attention_maps(plain, shown, PROMPT, [IMAGE, 5]).sum((1, 2, 3)), 1, rtol=1e-5)


def test_a_map_is_of_the_token_before_and_of_nothing_after():
    of, tokens = trained(), [4, 5, 6, 8]
    maps = attention_maps(of, picture(), PROMPT, tokens)
    changed = attention_maps(of, picture(), PROMPT, [4, 9, 6, 8])
    assert [np.abs(one - other).max() > 1e-5 for one, other in zip(maps, changed, strict=True)] == [0, 0, 1, 1]
    np.testing.assert_allclose(attention_maps(of, picture(), PROMPT, tokens[:1]), maps[:1], atol=1e-6)
    np.testing.assert_allclose(attention_maps(of, picture(), [*PROMPT, 4, 5], tokens[2:]), maps[2:], atol=1e-6)
    assert attention_maps(of, picture(), PROMPT, []).shape == (0, 2, 2, 3)


def test_what_has_no_map_is_refused_in_a_line():
    resampled = ResamplerConfig(num_latents=3, num_layers=1, num_heads=2, hidden_dim=16)
    for vision in (None, dataclasses.replace(VISION, resampler=resampled)):
        with pytest.raises(CallerError, match="no attention to patches; give a run that reads images without a"):
            attention_maps(trained(vision), picture(), PROMPT, [4])
    of = trained()
    with pytest.raises(CallerError, match="hold 2 image tokens instead of 1"):
        attention_maps(of, picture(), [IMAGE, IMAGE], [4])
    with pytest.raises(CallerError, match=r"must not be above context_length \(32\)"):
        attention_maps(of, picture(), PROMPT, [4] * 31)
    of.model.layout = dataclasses.replace(of.model.layout, slots=(0, 1))
    with pytest.raises(CallerError, match="keeps what tokens look at to its stages"):
        attention_maps(of, picture(), PROMPT, [4])


def images_of(section):
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)"', section)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_the_section_shows_pictures_texts_and_maps_frames_side_by_side():
    maps = np.full((2, 2, 2, 3), 0.02, np.float32)
    maps[0, 1, 1, 2], maps[1, 0, 0, 1] = 0.5, 0.25
    shown = picture()
    section = reading_section([Reading("pages", shown, "<b>1 2", "1 &", ("1", " <"), maps)])
    whole, *heats = images_of(section)
    np.testing.assert_array_equal(whole, np.concatenate(shown.pixels, axis=1))
    assert [heat.shape for heat in heats] == [(2, 6, 4)] * 2
    assert [np.unravel_index(heat[..., 3].argmax(), (2, 6)) for heat in heats] == [(1, 5), (0, 1)]
    assert "&lt;b&gt;1 2" in section and "1 &amp;" in section and "␣&lt;" in section and "pages, held out" in section
    assert "50.0%" in section and "25.0%" in section and "8.3%" in section
    absent = Reading("s", Picture(shown.pixels, np.array([True, False])), "", "", ("1",), maps[:1])
    section = reading_section([absent])
    assert images_of(section)[1].shape == (2, 3, 4)
    assert "reddest of 6 patches gets, which an even spread gives 16.7%" in section, "of the frame that is there"
    both = reading_section([absent, Reading("s", shown, "", "", ("1",), maps[:1])])
    assert "reddest of 6 to 12 patches gets, which an even spread gives 8.3% to 16.7%" in both


def test_lines_stand_below_one_another():
    lines = Picture(np.random.default_rng(0).integers(0, 256, (3, 2, 8, 3), dtype=np.uint8), np.array([True] * 3))
    maps = np.zeros((1, 3, 1, 4), np.float32)
    maps[0, 2, 0, 1] = 1.0
    whole, heat = images_of(reading_section([Reading("pages", lines, "a", "a", ("a",), maps)]))
    np.testing.assert_array_equal(whole, lines.pixels.reshape(6, 8, 3))
    assert heat.shape == (3, 4, 4) and np.unravel_index(heat[..., 3].argmax(), (3, 4)) == (2, 1)


def test_with_a_resampler_the_section_says_why_there_are_no_maps():
    section = reading_section([Reading("digits", picture(), "12", "13", ("13",), None)])
    assert len(images_of(section)) == 1 and "over its latents" in section and "13" in section
    assert reading_section([]) == ""
