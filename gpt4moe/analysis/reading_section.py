"""The part of a report that shows what was read and where the model looked: `Reading`s in, HTML out."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from gpt4moe.analysis.reading import Reading
from gpt4moe.drawing.figure import PALETTE

STYLE = """\
.reading { display: flex; flex-wrap: wrap; gap: 8px; align-items: flex-start; margin: 12px 0 20px }
.reading figure { padding: 8px; max-width: 100% } .reading figcaption { overflow-wrap: anywhere }
.reading .seen { background: var(--picture) 0 0 / 100% 100% } .seen img { display: block; width: 100%; height: auto }
.reading b { color: var(--ink) } p + h3 { margin-top: 12px } .map img { image-rendering: pixelated }
"""
HEAT = tuple(int(PALETTE[4][at : at + 2], 16) for at in (1, 3, 5))
MOST_OPAQUE = 0.8
# Pixels of the page that a picture takes at least and at most.
LEAST_WIDE, MOST_WIDE = 180, 480
# Frames so many times as wide as high are lines, one below the other, not beside it.
LINE = 4


def reading_section(readings: Sequence[Reading]) -> str:
    """HTML: by source each image, its text, what was read, and a map for each token; empty without any."""
    if not readings:
        return ""
    blocks = [
        f"<h3>{html.escape(source)}, held out</h3>{''.join(map(_reading, group))}"
        for source, group in itertools.groupby(readings, key=lambda reading: reading.source)
    ]
    return f"<h2>Reading</h2><style>{STYLE}</style><p>{_note(readings)}</p>{''.join(blocks)}"


def _note(readings: Sequence[Reading]) -> str:
    maps = readings[0].maps
    if maps is None:
        return "With a resampler attention is over its latents, which lie nowhere in the image: no maps."
    # Of the frames that are there: the others get nothing.
    patches = [int(reading.picture.valid.sum()) * math.prod(maps.shape[2:]) for reading in readings]
    fewest, most = min(patches), max(patches)
    counts = f"{most} patches gets, which an even spread gives {1 / most:.1%}"
    if f"{1 / most:.1%}" != f"{1 / fewest:.1%}":
        counts = f"{fewest} to {most} patches gets, which an even spread gives {1 / most:.1%} to {1 / fewest:.1%}"
    return (
        "Red: what cross-attention looked at as each of the first tokens was written, the mean over heads and blocks. "
        f"Beside a token: what the reddest of {counts}."
    )


def _reading(reading: Reading) -> str:
    frames = reading.picture.pixels[reading.picture.valid]
    below = frames.shape[2] >= LINE * frames.shape[1]
    pixels = np.concatenate(frames, axis=0 if below else 1)
    height, width = pixels.shape[:2]
    shown, picture = int(np.clip(width, LEAST_WIDE, MOST_WIDE)), _data_url(pixels)
    texts = f"there <b>{html.escape(reading.text)}</b><br>read <b>{html.escape(reading.read)}</b>"
    figures = [_figure("seen", picture, shown, texts)]
    if reading.maps is not None:
        of_frames_FUYX = np.moveaxis(reading.maps[:, reading.picture.valid], 1, 0)
        maps_UYX = np.concatenate(of_frames_FUYX, axis=1 if below else 2)
        for token, map_YX in zip(reading.tokens, maps_UYX, strict=True):
            text = f"<b>{html.escape(token.replace(' ', '␣').replace(chr(10), '↵'))}</b> {map_YX.max():.1%}"
            figures.append(_figure("seen map", _data_url(_heat(map_YX)), shown, text, f"{width} / {height}"))
    return f'<div class="reading" style="--picture: url({picture})">{"".join(figures)}</div>'


def _figure(kind: str, source: str, width: int, caption: str, aspect: str = "auto") -> str:
    image = f'<img src="{source}" style="aspect-ratio: {aspect}" alt="" />'
    return (
        f'<figure><div class="{kind}" style="width: {width}px">{image}</div><figcaption>{caption}</figcaption></figure>'
    )


def _heat(map_YX: np.ndarray) -> np.ndarray:
    """A pixel a patch, RGBA uint8: the more opaque, the more attention, the most of the map at `MOST_OPAQUE`."""
    opacity_YX = map_YX / max(map_YX.max(), 1e-30) * MOST_OPAQUE * 255
    colour = np.broadcast_to(np.array(HEAT, np.uint8), (*map_YX.shape, 3))
    return np.concatenate([colour, opacity_YX.round().astype(np.uint8)[..., None]], axis=-1)


def _data_url(pixels: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
