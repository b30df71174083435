"""The images of the rows while they are decoded: looked at once, kept as keys and values beside the pages.

In: the pictures of a row, when it enters a slot. Out: what its tokens see of them in every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.infer.decode_weights import DecoderWeights
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.engine.inputs import StepInputs
from gpt4moe.infer.pictures import Picture
from gpt4moe.model.cross_attention import Media
from gpt4moe.types import Array


def init_media(decoder: Decoder, config: EngineConfig) -> Media | None:
    """Returns room for the images of every slot; None for a text model. Features are not kept: keys and values are."""
    if decoder.config.vision is None:
        return None
    pixels, valid = blank_pictures(decoder.config, config)
    at_11 = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    seen = jax.eval_shape(decoder.look, decoder.weights, pixels, valid, at_11, at_11)
    slots = config.slots
    return Media(
        features_BIRD=jnp.zeros((slots, *seen.valid_BIR.shape[1:], 0), decoder.dtype),
        valid_BIR=jnp.zeros((slots, *seen.valid_BIR.shape[1:]), bool),
        image_index_BT=jnp.zeros((slots, 1), jnp.int32),
        first_image_BT=jnp.zeros((slots, 1), jnp.int32),
        keys=jnp.zeros((seen.keys.shape[0], slots, *seen.keys.shape[2:]), seen.keys.dtype),
        values=jnp.zeros((seen.values.shape[0], slots, *seen.values.shape[2:]), seen.values.dtype),
    )


def blank_pictures(model: ModelConfig, config: EngineConfig) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [1, I, F, height, width, 3] uint8 and valid [1, I, F] of a row without pictures, on the host."""
    encoder = model.vision.encoder
    frames = (1, config.max_pictures, encoder.max_frames)
    return np.zeros((*frames, encoder.height, encoder.width, 3), np.uint8), np.zeros(frames, bool)


def stacked(pictures: Sequence[Picture], model: ModelConfig, config: EngineConfig) -> tuple[np.ndarray, np.ndarray]:
    """The same of a row's pictures."""
    pixels, valid = blank_pictures(model, config)
    for place, picture in enumerate(pictures):
        frames = len(picture.pixels)
        pixels[0, place, :frames], valid[0, place, :frames] = picture.pixels, picture.valid
    return pixels, valid


def look(decoder: Decoder, weights: DecoderWeights, media: Media, slot: Array, pixels: Array, valid: Array) -> Media:
    """Returns `media` (donate it) with what a row sees in a slot."""
    at_11 = jnp.zeros((1, 1), jnp.int32)
    seen = decoder.look(weights, pixels, valid, at_11, at_11)
    return dataclasses.replace(
        media,
        valid_BIR=media.valid_BIR.at[slot].set(seen.valid_BIR[0]),
        keys=media.keys.at[:, slot].set(seen.keys[:, 0]),
        values=media.values.at[:, slot].set(seen.values[:, 0]),
    )


def in_sight(media: Media | None, inputs: StepInputs, *, in_slots: bool) -> Media | None:
    """What the tokens of a step see. in_slots: every row stands in the place of its slot, so that nothing is copied."""
    if media is None:
        return None
    at = {"image_index_BT": inputs.image_index_BT, "first_image_BT": inputs.first_image_BT}
    if in_slots:
        return dataclasses.replace(media, **at)
    slot_B = jnp.minimum(inputs.slot_B, len(media.valid_BIR) - 1)
    return Media(
        features_BIRD=media.features_BIRD[slot_B],
        valid_BIR=media.valid_BIR[slot_B],
        keys=media.keys[:, slot_B],
        values=media.values[:, slot_B],
        **at,
    )
