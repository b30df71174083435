"""A run whose images and model do not go together is refused in one line that names the setting and the mend."""

import dataclasses

import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.config.data import ImageConfig
from gpt4moe.config.vision import CrossAttentionConfig, EncoderConfig, ResamplerConfig, VisionConfig
from tests.config.test_config import RUN

ENCODER = EncoderConfig(height=8, width=12, patch_size=4, dim=8, num_layers=1, num_heads=2, hidden_dim=8)
VISION = VisionConfig(ENCODER, CrossAttentionConfig(every=1, num_heads=2, head_dim=4, hidden_dim=8))
IMAGES = ImageConfig(height=8, width=12, per_row=2)


def run_of(vision, images):
    model = dataclasses.replace(RUN.model, vision=vision)
    return dataclasses.replace(RUN, model=model, data=dataclasses.replace(RUN.data, images=images))


def changed(config, **changes):
    return dataclasses.replace(config, **changes)


REFUSED = [
    (VISION, changed(IMAGES, height=16), "ImageConfig.height=16 must be the encoder's (8); set both from one macro"),
    (VISION, changed(IMAGES, width=8), "ImageConfig.width=8 must be the encoder's (12); set both from one macro"),
    (None, IMAGES, "needs a model that reads them (ModelConfig.vision); include gin_configs/variant/vision.gin, or"),
    (VISION, changed(IMAGES, frames=2), "ImageConfig.frames=2 must be at most max_frames of the encoder or the "
     "resampler (1); raise max_frames"),
    (changed(VISION, encoder=changed(ENCODER, max_frames=3)), changed(IMAGES, frames=4), "resampler (3); raise"),
]  # fmt: skip


@pytest.mark.parametrize(("vision", "images", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_what_does_not_go_together_is_refused_in_one_line(vision, images, message):
    with pytest.raises(CallerError) as caught:
        run_of(vision, images)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_page_in_tiles_needs_room_for_more_than_one():
    with pytest.raises(CallerError, match=r"^ImageConfig.frames=1 must be above 1 where fit is 'tile'$"):
        changed(IMAGES, fit="tile")
    assert changed(IMAGES, fit="tile", frames=2).fit == "tile"


def test_a_line_of_a_page_needs_some_pixels():
    with pytest.raises(CallerError, match=r"^ImageConfig.height, width=\(7, 12\) must be 8 or more for lines$"):
        changed(IMAGES, fit="lines", frames=2, height=7)
    with pytest.raises(CallerError, match=r"frames=1 must be above 1 where fit is 'lines'$"):
        changed(IMAGES, fit="lines")
    assert changed(IMAGES, fit="lines", frames=2).height == 8


@pytest.mark.parametrize("teller", ["encoder", "resampler"])
def test_frames_that_are_told_apart_are_taken(teller):
    if teller == "encoder":
        vision = changed(VISION, encoder=changed(ENCODER, max_frames=3))
    else:
        vision = changed(VISION, resampler=ResamplerConfig(2, num_layers=1, num_heads=2, hidden_dim=8, max_frames=3))
    assert run_of(vision, changed(IMAGES, frames=3)).data.images.frames == 3


def test_a_model_that_reads_may_be_trained_without_images():
    assert run_of(VISION, None).model.vision is VISION
