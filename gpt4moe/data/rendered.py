"""Sources of images with their transcripts, drawn on the spot in the machine's fonts: digits, lines, pages, clips.

Functions behind the contract of `gpt4moe.data.sources`; parameters come from gin or `functools.partial`:

    SourceConfig.documents = @rendered.digits
    rendered.digits.count = 200_000

A document is `<image>` and the transcript. The same seed and fonts give the same documents. The held-out split goes by
the transcript, so that held-out strings are drawn in training neither so nor otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import random
import string
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from gpt4moe.config.check import require, require_count, require_not_negative
from gpt4moe.data.documents import IMAGE_MARKER, Document
from gpt4moe.data.drawn import in_chunks
from gpt4moe.data.files import FilePart, file_identity, find_files, read_documents
from gpt4moe.data.fonts import font, font_files
from gpt4moe.data.sources import DocumentFunction, stdlib_text

PRINTABLE = string.ascii_letters + string.digits + string.punctuation
PAPER, INK = (215, 255), (0, 70)
# Of the largest size that fits.
LEAST_SCALE = 0.7
MARGIN = 8
# Of a page's rotation either way, times its distortion, and of what blur adds to a letter.
DEGREES, BLURRED = 1.5, 2
LINE_SPACING = 1.3
# The share of lines that do, where they may.
ENDS_EARLY = 0.2
CLIP_WORDS = (
    "red",
    "left",
    "stop",
    "seven",
    "open",
    "north",
    "begin",
    "blue",
    "right",
    "go",
    "four",
    "close",
    "south",
    "end",
)


@in_chunks(5000)
def digits(
    count: int = 100_000,
    seed: int = 0,
    min_digits: int = 3,
    max_digits: int = 5,
    height: int = 16,
    width: int = 48,
) -> Iterator[Document]:
    """`count` strings of digits in grey, each in some font, size, place and shade of paper and ink."""
    require_count("digits.min_digits", min_digits)
    require_count("digits.max_digits", max_digits, least=min_digits)
    rng = random.Random(f"digits {seed}")
    fonts = font_files(string.digits)
    for _ in range(count):
        text = "".join(rng.choices(string.digits, k=rng.randint(min_digits, max_digits)))
        glyphs = rng.choice(_fitting(rng.choice(fonts), len(text), height, width))
        image = Image.new("L", (width, height), rng.randint(*PAPER))
        x = rng.randint(0, width - len(text) * glyphs.advance)
        y, ink = rng.randint(0, height - glyphs.height), rng.randint(*INK)
        for digit in text:
            image.paste(ink, (x, y), glyphs.masks[int(digit)])
            x += glyphs.advance
        yield _document(text, grey_png(image))


@in_chunks(1000)
def lines(
    count: int = 20_000,
    seed: int = 0,
    height: int = 32,
    width: int = 384,
    sizes: tuple[int, int] = (14, 22),
    texts: DocumentFunction = stdlib_text,
    paths: tuple[str, ...] = (),
    text_field: str = "text",
) -> Iterator[Document]:
    """`count` lines of the text of `texts`, or of the files at `paths`: ASCII, a line as long as its type allows."""
    rng = random.Random(f"lines {seed}")
    words = Words(texts, paths, text_field, rng)
    fonts = font_files(PRINTABLE)
    for _ in range(count):
        type_ = font(rng.choice(fonts), rng.randint(*sizes))
        text = words.line(type_, width - 2)
        _, top, right, bottom = type_.getbbox(text)
        image = Image.new("L", (width, height), rng.randint(*PAPER))
        place = (rng.uniform(0, max(width - right, 0)), (height - bottom - top) / 2 + rng.uniform(-2, 2))
        ImageDraw.Draw(image).text(place, text, font=type_, fill=rng.randint(*INK))
        yield _document(text, grey_png(image))


@in_chunks(50)
def pages(
    count: int = 5_000,
    seed: int = 0,
    height: int = 448,
    width: int = 448,
    sizes: tuple[int, int] = (10, 20),
    distortion: float = 1.0,
    texts: DocumentFunction = stdlib_text,
    paths: tuple[str, ...] = (),
    text_field: str = "text",
    min_lines: int | None = None,
) -> Iterator[Document]:
    """`count` pages of that text, one font and size a page, as a scanner sees them: askew, blurred, noisy, JPEG.

    A page is full, or where `min_lines` is given has from as many lines on, of which every fifth or so ends early.
    `distortion` 1 is up to a degree and a half of rotation and 0.6 pixels of blur; 0 leaves pages as they were drawn.
    The margin is as wide as no letter leaves the page by.
    """
    require_not_negative("pages.distortion", distortion)
    if min_lines is not None:
        require_count("pages.min_lines", min_lines)
    margin = max(MARGIN, math.ceil(math.radians(DEGREES * distortion) * max(height, width) / 2 + BLURRED))
    constraint = f"and width={width} have no room for a line in a margin of {margin} pixels"
    require(min(height, width) - 2 * margin >= sizes[1] * LINE_SPACING, "pages.height", height, constraint)
    rng = random.Random(f"pages {seed}")
    noise = np.random.default_rng(list(str(seed).encode()))
    words = Words(texts, paths, text_field, rng)
    fonts = font_files(PRINTABLE)
    for _ in range(count):
        size = rng.randint(*sizes)
        type_, step = font(rng.choice(fonts), size), round(size * LINE_SPACING)
        paper = rng.randint(*PAPER)
        image = Image.new("L", (width, height), paper)
        draw, ink = ImageDraw.Draw(image), rng.randint(*INK)
        most, room = (height - 2 * margin) // step, width - 2 * margin
        lengths = [room] * most if min_lines is None else _ragged(min(min_lines, most), most, room, rng)
        rows = [words.line(type_, length) for length in lengths]
        for row, text in enumerate(rows):
            draw.text((margin, margin + row * step), text, font=type_, fill=ink)
        yield _document("\n".join(rows), _scanned(image, paper, distortion, rng, noise))


def _ragged(fewest: int, most: int, room: float, rng: random.Random) -> list[float]:
    """How long each line of a page is that need not be full."""
    return [room * (rng.random() if rng.random() < ENDS_EARLY else 1.0) for _ in range(rng.randint(fewest, most))]


@in_chunks(500)
def clips(
    count: int = 5_000, seed: int = 0, frames: int = 4, height: int = 32, width: int = 64, seconds: float = 1.0
) -> Iterator[Document]:
    """`count` clips of `frames`, `seconds` apart: words that move and change; the transcript says when each is seen.

    A line of it is the second at which a word first shows, and the word.
    """
    rng = random.Random(f"clips {seed}")
    fonts = font_files(PRINTABLE)
    for _ in range(count):
        type_, paper, ink = font(rng.choice(fonts), height // 2), rng.randint(*PAPER), rng.randint(*INK)
        shown: list[str] = []
        while len(shown) < frames:
            word = rng.choice([word for word in CLIP_WORDS if not shown or word != shown[-1]])
            shown += [word] * rng.randint(1, max(frames // 2, 1))
        shown = shown[:frames]
        changes = [index for index in range(frames) if index == 0 or shown[index] != shown[index - 1]]
        start, stop = rng.random(), rng.random()
        drawn = []
        for index, word in enumerate(shown):
            image = Image.new("L", (width, height), paper)
            along = start + (stop - start) * index / max(frames - 1, 1)
            place = (along * max(width - type_.getlength(word), 0), rng.uniform(0, height / 4))
            ImageDraw.Draw(image).text(place, word, font=type_, fill=ink)
            drawn.append(grey_png(image))
        transcript = "\n".join(f"{index * seconds:g} {shown[index]}" for index in changes)
        yield _document(transcript, tuple(drawn))


def _document(transcript: str, image: bytes | tuple[bytes, ...]) -> Document:
    return Document(IMAGE_MARKER + transcript, images=(image,))


@dataclasses.dataclass(frozen=True)
class _Glyphs:
    """The ten digits at one size of a font, drawn once: masks of `advance` by `height` pixels."""

    advance: int
    height: int
    masks: tuple[Image.Image, ...]


@functools.cache
def _fitting(file: str, length: int, height: int, width: int) -> list[_Glyphs]:
    """Digits at the sizes at which `length` of them fit, the smallest one if at none."""
    sizes = [_glyphs(file, size) for size in range(4, 2 * height)]
    fitting = [glyphs for glyphs in sizes if glyphs.height <= height and length * glyphs.advance <= width]
    require(bool(fitting), "digits.width", width, f"and height={height} are too small for {length} digits")
    return fitting[round(LEAST_SCALE * len(fitting)) :] or fitting


@functools.cache
def _glyphs(file: str, size: int) -> _Glyphs:
    type_ = font(file, size)
    boxes = [type_.getbbox(digit) for digit in string.digits]
    left, top, right, bottom = (
        pick(side) for pick, side in zip((min, min, max, max), zip(*boxes, strict=True), strict=True)
    )
    advance = max(round(max(map(type_.getlength, string.digits))), 1)
    masks = []
    for digit in string.digits:
        mask = Image.new("L", (max(advance, right - left), bottom - top))
        ImageDraw.Draw(mask).text((-left, -top), digit, font=type_, fill=255)
        masks.append(mask)
    return _Glyphs(max(advance, right - left), bottom - top, tuple(masks))


class Words:
    """Words of ASCII of the documents without end, the documents each time in another order."""

    def __init__(self, texts: DocumentFunction, paths: tuple[str, ...], text_field: str, rng: random.Random) -> None:
        files = tuple(file_identity(path) for path in find_files(paths)) if paths else ()
        self._split = list(_split_words(texts, files, text_field))
        require(bool(self._split), "texts", paths or texts, "has no words of ASCII")
        self._next, self._rng = self._endless(), rng
        self._word = next(self._next)

    def line(self, type_: ImageFont.FreeTypeFont, width: float) -> str:
        """The next words that fit into `width`, single spaces between them; a word that is longer alone is cut."""
        space = type_.getlength(" ")
        taken, used = [], -space
        while used + space + type_.getlength(self._word) <= width:
            used += space + type_.getlength(self._word)
            taken.append(self._word)
            self._word = next(self._next)
        if not taken:
            cut = next(
                end for end in range(len(self._word), 0, -1) if end == 1 or type_.getlength(self._word[:end]) <= width
            )
            taken, self._word = [self._word[:cut]], self._word[cut:] or next(self._next)
        return " ".join(taken)

    def letters(self, room: int) -> str:
        """The next words that have at most `room` letters with the spaces between them, a longer word cut."""
        text = self._word[:room]
        self._word = next(self._next)
        while len(text) + 1 + len(self._word) <= room:
            text, self._word = f"{text} {self._word}", next(self._next)
        return text

    def _endless(self) -> Iterator[str]:
        while True:
            self._rng.shuffle(self._split)
            for words in self._split:
                yield from words


@functools.lru_cache(maxsize=1)  # a process draws many chunks of the same text
def _split_words(texts: DocumentFunction, files: tuple[tuple, ...], text_field: str) -> list[list[str]]:
    """The words of every document: of `files`, named with what changes when they do, or of `texts` without any."""
    documents = _read([path for path, *_ in files], text_field) if files else list(texts())
    split = [_ascii_words(text.text if isinstance(text, Document) else text) for text in documents]
    return [words for words in split if words]


def _read(paths: list[str], text_field: str) -> list[Document]:
    parts = [FilePart(path, 0) for path in paths]
    return [one for part in parts for one in read_documents(part, text_field) if isinstance(one, Document)]


def _ascii_words(text: str) -> list[str]:
    # The marker of an image would be one in the transcript too.
    return [word for word in text.split() if word.isascii() and word.isprintable() and IMAGE_MARKER not in word]


def _scanned(
    image: Image.Image, paper: int, distortion: float, rng: random.Random, noise: np.random.Generator
) -> bytes:
    if distortion > 0:
        angle = rng.uniform(-DEGREES, DEGREES) * distortion
        image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=paper)
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.6) * distortion))
        grain = noise.normal(0, rng.uniform(0, 8) * distortion, (image.height, image.width))
        image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=rng.randint(75, 95) if distortion > 0 else 95)
    return out.getvalue()


def grey_png(image: Image.Image) -> bytes:
    """The PNG file of an image of mode L, without the row filters that take Pillow most of its time."""
    pixels = np.zeros((image.height, image.width + 1), np.uint8)  # a row begins with the number of its filter: none
    pixels[:, 1:] = image
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels, 1)), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
