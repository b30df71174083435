"""Compressed images to pixels: what is wrong with a file, and its frames as uint8 arrays of a batch's size."""

from __future__ import annotations

import io
import itertools
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps

from gpt4moe.config.data import PIECES, ImageConfig
from gpt4moe.data.documents import EncodedImage
from gpt4moe.data.page_lines import line_tiles

# Formats that Pillow decodes itself: others may start a program (EPS) or are not what a browser shows.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
JPEG_DRAFT = 8
SCALE_DOWN = "scale it down, or raise ImageConfig.max_pixels"
# EXIF's tag 0x0112 and what lays its eight values upright (1, and what it does not say, lie so).
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LYING = frozenset(UPRIGHT[value] for value in (5, 6, 7, 8))
# Where in a file its orientation may stand.
ORIENTED_BY = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
# What Pillow and the libraries below it raise for a file that is not what it says.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, TypeError, EOFError, IndexError, KeyError, OverflowError)


def frames_of(image: EncodedImage) -> tuple[bytes, ...]:
    """The compressed frames of an image: itself, or those of a clip."""
    return (image,) if isinstance(image, bytes) else tuple(image)


def image_problem(image: EncodedImage, max_pixels: int) -> str | None:
    """What keeps `image` from being decoded in training, None where nothing does.

    The size is read from the header before anything is unfolded, then every frame is decoded once (a JPEG at an eighth
    of its size, which reads all of it), so that what is stored can be trained on.
    """
    frames = frames_of(image)
    if not frames:
        return "has a clip without frames"
    for data in frames:
        problem = _file_problem(data, max_pixels)
        if problem:
            return problem
    return None


class TooManyLines(ValueError):
    """Of a page that has more lines than frames: what is wrong with it, in a line."""


def rgb_image(data: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """The picture of a compressed file as people see it: upright (EXIF), in RGB, transparent pixels white.

    Of an animated file it is the first frame; 16 bits a channel become 8. `size` (width, height) is that from which
    the caller goes on, so that a JPEG much larger is unfolded at a half, a quarter or an eighth only.
    """
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if size is not None:
        image.draft(None, size[::-1] if _turn(image) in LYING else size)
    image.load()
    return _in_rgb(_upright(image))


def decode_into(
    image: EncodedImage, config: ImageConfig, out: np.ndarray, valid: np.ndarray, *, by_lines: bool = False
) -> None:
    """Writes the fitted frames of `image` into zeroed `out` [frames, height, width, 3], which are there into `valid`.

    A clip of more frames than `config.frames` gives that many, evenly spread from its first to its last. So that a run
    goes on, a page of more lines is cut into tiles, of which a reader of lines makes nothing; `by_lines` raises
    `TooManyLines` instead.
    """
    encoded = frames_of(image)
    if config.fit in PIECES and len(encoded) == 1:
        fitted = _pieces(rgb_image(encoded[0]), config, by_lines)
    else:
        chosen = np.linspace(0, len(encoded) - 1, min(len(encoded), config.frames)).round().astype(int)
        fitted = [_fitted(encoded[index], config) for index in chosen]
    for index, frame in enumerate(fitted):
        out[index] = frame
    valid[: len(fitted)] = True


def _file_problem(data: bytes, max_pixels: int) -> str | None:
    if not data:
        return "has an image of zero bytes"
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes that `max_pixels` is there to judge.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                return f"has an image of {width} x {height} pixels, above max_pixels={max_pixels}; {SCALE_DOWN}"
            image.draft(None, (max(width // JPEG_DRAFT, 1), max(height // JPEG_DRAFT, 1)))
            image.load()
            _in_rgb(_upright(image))
    except Image.DecompressionBombError:
        return f"has an image of too many pixels, above max_pixels={max_pixels} or what Pillow opens; {SCALE_DOWN}"
    except DECODE_ERRORS as error:
        return f"has an image that cannot be decoded ({why_broken(error)})"
    return None


def why_broken(error: BaseException) -> str:
    """What an error of DECODE_ERRORS says of a file, in one line."""
    # Pillow names the buffer by its address.
    unknown = isinstance(error, Image.UnidentifiedImageError)
    return f"not one of {' '.join(FORMATS)}" if unknown else (str(error).splitlines() or [type(error).__name__])[0]


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What lays a picture upright; None where it is, and where what should say so is damaged, as viewers do."""
    # Looking for an orientation takes as long as decoding a small image.
    if not ORIENTED_BY.intersection(image.info):
        return None
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION))
    except (struct.error, *DECODE_ERRORS):
        return None


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image)
        narrow = pixels // 257 if image.mode.startswith("I;16") or pixels.max(initial=0) > 255 else pixels
        return Image.fromarray(narrow.clip(0, 255).astype(np.uint8), "L").convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layered).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _fitted(data: bytes, config: ImageConfig) -> np.ndarray:
    """One frame, [height, width, 3] uint8. A clip is never cut into pieces: its frames are padded instead."""
    size = (config.width, config.height)
    image = rgb_image(data, size)
    if image.size != size:
        if config.fit == "squash":
            image = image.resize(size, Image.Resampling.BILINEAR)
        elif config.fit == "crop":
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        else:
            image = ImageOps.pad(image, size, Image.Resampling.BILINEAR)
    return np.asarray(image)


def _pieces(image: Image.Image, config: ImageConfig, by_lines: bool) -> list[np.ndarray]:
    if config.fit != "lines":
        return _tiles(image, config)
    lines = line_tiles(image, config.height, config.width, config.frames)
    if by_lines and not lines:
        frames = f"the {config.frames} that the model was trained on (ImageConfig.frames)"
        raise TooManyLines(f"has more lines of text, or parts of long ones, than {frames}; give a part of it")
    return lines or _tiles(image, config)


def _tiles(image: Image.Image, config: ImageConfig) -> list[np.ndarray]:
    """Tiles of a page in reading order, [height, width, 3] uint8 each; black on the right and below the page."""
    rows, columns, scale = _grid(image.size, config)
    whole = (columns * config.width, rows * config.height)
    size = tuple(min(max(round(side * scale), 1), most) for side, most in zip(image.size, whole, strict=True))
    canvas = np.zeros((whole[1], whole[0], 3), np.uint8)
    canvas[: size[1], : size[0]] = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    by_tile = canvas.reshape(rows, config.height, columns, config.width, 3).swapaxes(1, 2)
    return list(by_tile.reshape(-1, config.height, config.width, 3))


def _grid(size: tuple[int, int], config: ImageConfig) -> tuple[int, int, float]:
    """Rows and columns of tiles and the page's scale: the fewest that keep every pixel, else the finest there are."""
    counts = range(1, config.frames + 1)
    choices = []
    for rows, columns in itertools.product(counts, counts):
        if rows * columns <= config.frames:
            scale = min(columns * config.width / size[0], rows * config.height / size[1])
            choices.append((min(scale, 1.0), -rows * columns, rows, columns, scale))
    _, _, rows, columns, scale = max(choices)
    return rows, columns, scale
