"""Images of prompts: files in, what the model looks at out; encoded once, kept as keys and values while decoding."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from gpt4moe.config.check import CallerError, require
from gpt4moe.config.data import ImageConfig
from gpt4moe.data.documents import IMAGE_MARKER, Document, EncodedImage, marker_mismatch, texts_between
from gpt4moe.data.images import SCALE_DOWN, TooManyLines, decode_into, image_problem
from gpt4moe.infer.decode_loop import Pictures


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """One image, clip or tiled page, fitted to the model: pixels [F, height, width, 3] uint8, valid [F] bool."""

    pixels: np.ndarray
    valid: np.ndarray


def require_file(path: str, setting: str = "--image") -> None:
    """Raises `CallerError` where there is no file."""
    require(pathlib.Path(path).is_file(), setting, path, "is not a file")


def read_picture(path: str, config: ImageConfig | None, setting: str = "--image") -> Picture:
    """The image in a file; `CallerError` where it is missing, broken or larger than `config.max_pixels`.

    config: how the run's images were fitted, None of a run without any. setting: where the file was named.
    """
    mend = "give the workdir of a run that had some"
    require(config is not None, setting, path, "but the run was trained without images (DataConfig.images)", mend)
    require_file(path, setting)
    data = pathlib.Path(path).read_bytes()
    problem = image_problem(data, config.max_pixels)
    if problem:
        mend = "" if problem.endswith(SCALE_DOWN) else "; give a PNG, JPEG, WebP, GIF or BMP that opens"
        raise CallerError(f"{setting}={path!r} {problem}{mend}")
    try:
        return fitted_picture(data, config, by_lines=True)
    except TooManyLines as error:
        raise CallerError(f"{setting}={path!r} {error}") from None


def fitted_picture(image: EncodedImage, config: ImageConfig, *, by_lines: bool = False) -> Picture:
    """A compressed image that is known to be sound, as the model takes it; `by_lines` as in `decode_into`."""
    pixels = np.zeros((config.frames, config.height, config.width, 3), np.uint8)
    valid = np.zeros(config.frames, bool)
    decode_into(image, config, pixels, valid, by_lines=by_lines)
    return Picture(pixels, valid)


def split_at_images(prompt: str, num_images: int) -> tuple[str, ...]:
    """The texts before, between and behind the images of a prompt; without markers all images stand before it."""
    mismatch = marker_mismatch(prompt, num_images) if num_images else None
    mend = f"write one {IMAGE_MARKER} for each --image, or none"
    require(mismatch is None, "prompt", prompt[:40], str(mismatch), mend)
    return texts_between(Document(prompt, images=(b"",) * num_images))


def stack_pictures(pictures: Sequence[Sequence[Picture]], tokens_BT: np.ndarray, image_token: int) -> Pictures:
    """What `Transformer.look` takes for right-padded prompts whose image tokens stand for `pictures`, row by row."""
    shapes = [picture.pixels.shape for row in pictures for picture in row]
    most, rows = max(map(len, pictures)), len(tokens_BT)
    pixels, valid = np.zeros((rows, most, *shapes[0]), np.uint8), np.zeros((rows, most, shapes[0][0]), bool)
    for row, of_row in enumerate(pictures):
        for place, picture in enumerate(of_row):
            pixels[row, place], valid[row, place] = picture.pixels, picture.valid
    has_pictures = np.array([bool(row) for row in pictures] + [False] * (rows - len(pictures)))[:, None]
    index_BT = np.where(has_pictures, np.cumsum(tokens_BT == image_token, axis=1) - 1, -1).astype(np.int32)
    first_BT = np.minimum(index_BT, 0)
    return Pictures(pixels, valid, index_BT, first_BT)
