"""What reads images refuses what cannot work, in one line that names the field and the mend."""

import dataclasses

import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.config.data import DataConfig, ImageConfig, SourceConfig
from gpt4moe.config.vision import (
    MOST_FEATURES,
    CrossAttentionConfig,
    EncoderConfig,
    ResamplerConfig,
    SpellingConfig,
    VisionConfig,
)
from gpt4moe.configure import build_model

ENCODER = EncoderConfig(height=8, width=8, patch_size=4, dim=8, num_layers=1, num_heads=2, hidden_dim=16)
CROSS = CrossAttentionConfig(every=1, num_heads=2, head_dim=4, hidden_dim=8)
IMAGES = ImageConfig(height=8, width=8, per_row=2)
DATA = DataConfig((SourceConfig("files", paths=("somewhere",)),), sequence_length=8, images=IMAGES)
COLOURS = "must be three numbers, of red, green and blue"
NAN, INFINITE = float("nan"), float("inf")
REFUSED = [
    (CROSS, {"gate_init": NAN}, "CrossAttentionConfig.gate_init=nan must be a finite number"),
    (CROSS, {"gate_init": INFINITE}, "CrossAttentionConfig.gate_init=inf must be a finite number"),
    (CROSS, {"gate_init": "1"}, "CrossAttentionConfig.gate_init='1' must be a finite number"),
    (ENCODER, {"pixel_mean": 0.5}, f"EncoderConfig.pixel_mean=0.5 {COLOURS}"),
    (ENCODER, {"pixel_mean": "abc"}, f"EncoderConfig.pixel_mean='abc' {COLOURS}"),
    (ENCODER, {"pixel_mean": (0.5, 0.5)}, f"EncoderConfig.pixel_mean=(0.5, 0.5) {COLOURS}"),
    (ENCODER, {"pixel_mean": (0.5, 0.5, NAN)}, "EncoderConfig.pixel_mean=nan must be a finite number"),
    (ENCODER, {"pixel_mean": (0.5, "x", 1)}, "EncoderConfig.pixel_mean='x' must be a finite number"),
    (ENCODER, {"pixel_std": None}, f"EncoderConfig.pixel_std=None {COLOURS}"),
    (ENCODER, {"pixel_std": (1, 0, 1)}, "EncoderConfig.pixel_std=0 must be a number above 0"),
    (ENCODER, {"height": 2048, "width": 2048}, "EncoderConfig.patch_size=4 cuts a frame of 2048 x 2048 pixels into "
     "262,144 features, above 65,536; raise it, or lower height and width"),
    (IMAGES, {"max_pixels": 63}, "ImageConfig.max_pixels=63 must hold what the model sees, height x width "
     "(8 x 8 pixels); raise it, or lower height and width"),
    (VisionConfig(ENCODER, CROSS), {"encoder": EncoderConfig}, "write @vision.EncoderConfig()"),
    (VisionConfig(ENCODER, CROSS), {"encoder": 3}, "encoder=3 must be an EncoderConfig"),
    (SpellingConfig(), {"weight": 0}, "SpellingConfig.weight=0 must be a number above 0"),
    (SpellingConfig(), {"num_ids": 0}, "SpellingConfig.num_ids=0 must be an integer of at least 1"),
    (VisionConfig(ENCODER, CROSS), {"spelling": True}, "spelling=True must be a SpellingConfig or None"),
    (VisionConfig(ENCODER, CROSS, ResamplerConfig(2, 1, 1, 8)), {"spelling": SpellingConfig()},
     "spells the encoder's features, not a resampler's; drop one"),
    (DATA, {"images": ImageConfig}, "images=@ImageConfig is a class, not one of its objects; write"),
    (DATA, {"images": 4}, "images=4 must be an ImageConfig or None"),
    (DATA, {"sources": (SourceConfig,)}, "write @data.SourceConfig()"),
]  # fmt: skip


@pytest.mark.parametrize(("valid", "change", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refuses_in_one_line(valid, change, message):
    with pytest.raises(CallerError) as caught:
        dataclasses.replace(valid, **change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_lies_on_the_border_is_taken():
    patches = {"height": 1024, "width": 1024, "positions": "rotary"}
    assert dataclasses.replace(ENCODER, **patches).num_features == MOST_FEATURES
    with pytest.raises(CallerError, match="patch_size"):
        dataclasses.replace(ENCODER, **patches, class_token=True)
    assert dataclasses.replace(IMAGES, max_pixels=64).max_pixels == 64
    assert dataclasses.replace(CROSS, gate_init=-1).gate_init == -1
    assert dataclasses.replace(ENCODER, pixel_mean=[0, 0.5, 1]).pixel_mean == (0, 0.5, 1)


def test_a_class_of_gin_without_its_parentheses_is_told_so():
    with pytest.raises(CallerError) as caught:
        build_model(["gin_configs/run/vision_quickstart.gin"], ["RESAMPLER = @vision.ResamplerConfig"])
    assert "resampler=@ResamplerConfig is a class, not one of its objects" in str(caught.value)
    assert str(caught.value).endswith("write @vision.ResamplerConfig()")
