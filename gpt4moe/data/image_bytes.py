"""What images cost in bytes beside text: stored and fed to the device, a patch and a token.

The reference: about 600 bytes a patch, 14 * 14 * 3 uint8, against the 4 of a text token in int32, 147 times as many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from gpt4moe.config.data import ImageConfig
from gpt4moe.data.image_store import StoredImages
from gpt4moe.data.packing import Plan

FED_BYTES_PER_TOKEN = np.dtype(np.int32).itemsize
REFERENCE_BYTES_PER_PATCH = 600
COLOURS = 3


@dataclasses.dataclass(frozen=True)
class ImageBytes:
    """Bytes of one source's training images.

    patches: of an image, all its frames. stored_*: compressed, on disk. fed_per_patch: raw, as they reach the device.
    fed_per_token: those of all image slots of its rows, the empty ones too, by text token. slots_filled: share of the
    slots that hold an image.
    """

    images: int
    patches: int
    stored_per_image: float
    stored_per_patch: float
    stored_per_token: int
    fed_per_patch: float
    fed_per_token: float
    slots_filled: float


def image_bytes(
    config: ImageConfig, images: StoredImages, plan: Plan, patch: tuple[int, int], token_bytes: int
) -> ImageBytes:
    """Counts the images of a source whose rows are those of `plan`.

    patch: its height and width in pixels; token_bytes: what a stored token takes.
    """
    pixels = config.frames * config.height * config.width * COLOURS
    patches = config.frames * (config.height // patch[0]) * (config.width // patch[1])
    slots = plan.num_rows * config.per_row
    stored = images.num_bytes(len(images)) / max(len(images), 1)
    return ImageBytes(
        images=len(images),
        patches=patches,
        stored_per_image=stored,
        stored_per_patch=stored / max(patches, 1),
        stored_per_token=token_bytes,
        fed_per_patch=pixels / max(patches, 1),
        fed_per_token=slots * pixels / max(plan.num_tokens - len(images), 1),
        slots_filled=len(images) / max(slots, 1),
    )


def format_image_bytes(counted: Mapping[str, ImageBytes]) -> list[str]:
    """One line a source, for people."""
    text, reference = FED_BYTES_PER_TOKEN, f"{REFERENCE_BYTES_PER_PATCH} against {FED_BYTES_PER_TOKEN}"
    return [
        f"source {name}: {one.images:,} images; a patch is {one.stored_per_patch:.0f} bytes stored and "
        f"{one.fed_per_patch:.0f} fed, a text token {one.stored_per_token} and {text} (reference: {reference}); "
        f"{one.fed_per_token:,.0f} bytes of pixels a text token, {one.slots_filled:.0%} of the image slots filled"
        for name, one in counted.items()
    ]
