"""A page of text cut into its lines: laid straight, a tile for each line or part of one, in reading order.

In: a picture of ink, dark or light, on paper of one colour. Out: tiles of one size, each line in the middle of its own.
Reading a page is then reading lines, whatever its size. Where columns stand side by side, or a frame is drawn around
the text, the rows of ink are not lines of text, and this does not help.
"""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

# Ink differs from paper by more than this share of what differs most (a percentile) and more than a scanner's noise.
INK_SHARE, MOST_INK, NOISE = 0.35, 99.5, 16.0
# A page is laid straight where it leans by at most this.
MOST_DEGREES, STEP_DEGREES = 3.0, 0.125
# Turning blurs, and a few letters differ most at some slight lean: not for less than this.
WORTH = 1.1
# Rows repeat at the first distance at which they resemble one another so much, and nearly as much as at any other.
RESEMBLANCE, OF_BEST = 0.1, 0.6
# Between two lines there is a row with less than this share of the ink of the richest row of either.
GAP = 0.12
# A row is as much of a line as any from this share of the richest row around it on: a lone brace is a line.
FULL = 0.25
# Pixels around ink that are neither ink nor paper.
SOFT = 1
# A line longer than a tile is cut where there is least ink in this last part of the tile.
CUT_WITHIN = 0.25

Box = tuple[int, int, int, int]


def line_tiles(page: Image.Image, height: int, width: int) -> list[UInt8[np.ndarray, "height width 3"]]:
    """Tiles of `height` by `width` pixels with the lines of an RGB page, in reading order; of a blank page, one.

    The page keeps its scale, but where a line is higher than a tile. All lines begin at the same column of the page, so
    that indents stay; what is beside and below a line is paper.
    """
    paper = tuple(np.median(np.asarray(page).reshape(-1, 3), axis=0).astype(int).tolist())
    ink = ink_of(np.asarray(page))
    if degrees := lean(ink):
        page = page.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=paper)
        ink = ink_of(np.asarray(page))
    tallest = max((bottom - top + 2 * SOFT for top, bottom in text_rows(ink)), default=0)
    if tallest > height:
        size = tuple(max(side * height // tallest, 1) for side in page.size)
        page = page.resize(size, Image.Resampling.BILINEAR)
        ink = ink_of(np.asarray(page))
    pixels, tiles = np.asarray(page), []
    for left, top, right, bottom in line_boxes(ink, height, width) or [(0, 0, 0, 0)]:
        tile, above = np.full((height, width, 3), paper, np.uint8), (height - bottom + top) // 2
        tile[above : above + bottom - top, : right - left] = pixels[top:bottom, left:right]
        tiles.append(tile)
    return tiles


def ink_of(pixels: UInt8[np.ndarray, "H W 3"]) -> Bool[np.ndarray, "H W"]:
    """Where there is ink: what is darker or lighter than paper, the colour of most of the page."""
    grey = pixels.mean(axis=-1, dtype=np.float32)
    differs = np.abs(grey - np.median(grey))
    return differs > max(INK_SHARE * np.percentile(differs, MOST_INK), NOISE)


def lean(ink: Bool[np.ndarray, "H W"]) -> float:
    """Degrees by which a page is to be turned, counterclockwise, so that its lines are level: then rows differ most."""
    rows, columns = np.nonzero(ink)
    if not len(rows):
        return 0.0

    def contrast(degrees: float) -> float:
        level = rows + (columns - ink.shape[1] / 2) * -np.tan(np.radians(degrees))
        counts = np.bincount(np.round(level - level.min()).astype(int)).astype(np.float64)
        return float(np.sum(np.diff(counts) ** 2))

    steps = round(MOST_DEGREES / STEP_DEGREES)
    best = max((step * STEP_DEGREES for step in range(-steps, steps + 1)), key=contrast)
    return best if contrast(best) > WORTH * contrast(0.0) else 0.0


def text_rows(ink: Bool[np.ndarray, "H W"]) -> list[tuple[int, int]]:
    """First row of each line of text, and the row behind its last."""
    profile = ink.sum(axis=1).astype(np.float64)
    inked = np.flatnonzero(profile)
    if not len(inked):
        return []
    first, profile = int(inked[0]), profile[inked[0] : inked[-1] + 1]
    smooth = _smooth(profile)
    lowest = [row for row in range(1, len(smooth) - 1) if smooth[row - 1] >= smooth[row] < smooth[row + 1]]
    lines: list[tuple[int, int]] = []
    for top, bottom in itertools.pairwise([0, *lowest, len(profile)]):
        if lines and not _apart(profile, lines[-1], (top, bottom)):
            lines[-1] = (lines[-1][0], bottom)
        elif profile[top:bottom].any():
            lines.append((top, bottom))
    trimmed = (np.flatnonzero(profile[top:bottom])[[0, -1]] + top + first for top, bottom in lines)
    return [(int(top), int(last) + 1) for top, last in trimmed]


def line_boxes(ink: Bool[np.ndarray, "H W"], height: int, width: int) -> list[Box]:
    """Left, top, right and bottom of every line of text, or of its parts where it is longer than `width`.

    A line that is still higher than `height` loses what is beyond that.
    """
    boxes, (page_height, page_width) = [], ink.shape
    inked = np.flatnonzero(ink.any(axis=0))
    margin = max(int(inked[0]) - SOFT, 0) if len(inked) else 0
    for first, last in text_rows(ink):
        top, bottom = max(first - SOFT, 0), min(last + SOFT, page_height, first - SOFT + height)
        columns = ink[top:bottom].sum(axis=0)
        left, end = margin, min(int(np.flatnonzero(columns)[-1]) + 1 + SOFT, page_width)
        while end - left > width:
            since = left + width - round(CUT_WITHIN * width)
            right = since + int(np.argmin(columns[since : left + width]))
            boxes.append((left, top, right, bottom))
            left = right
        boxes.append((left, top, end, bottom))
    return boxes


def _smooth(profile: Float[np.ndarray, " H"]) -> Float[np.ndarray, " H"]:
    """How much of a line there is around each row, alike for lines of many letters and of one."""
    half = max(_pitch(profile) // 2, 1)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(profile, half), 2 * half + 1).max(axis=-1)
    there = np.minimum(profile / np.maximum(FULL * around, 1.0), 1.0)
    return np.convolve(np.convolve(there, np.ones(half), "same"), np.ones(max(half // 2, 1)), "same")


def _pitch(profile: Float[np.ndarray, " H"]) -> int:
    """Rows from a line to the next, by how the ink of rows resembles that further down; all of them of one line."""
    centred = profile - profile.mean()
    alike = np.correlate(centred, centred, "full")[len(profile) - 1 :] / max(float(centred @ centred), 1e-9)
    negative = np.flatnonzero(alike < 0)
    since = int(negative[0]) if len(negative) else len(alike)
    enough = max(RESEMBLANCE, OF_BEST * float(alike[since:].max(initial=0.0)))
    later = range(max(since, 1), len(alike) - 1)
    found = (at for at in later if alike[at] > enough and alike[at - 1] <= alike[at] >= alike[at + 1])
    return next(found, len(profile))


def _apart(profile: Float[np.ndarray, " H"], above: tuple[int, int], below: tuple[int, int]) -> bool:
    """Whether there is a gap between what may be two lines, or parts of one."""
    gap = profile[max(above[1] - 2, 0) : below[0] + 3].min()
    richest = [profile[top:bottom].max() for top, bottom in (above, below)]
    return bool(gap <= GAP * min(richest))
