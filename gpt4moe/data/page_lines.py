"""A page of text cut into its lines: laid straight, a tile for each line or part of one, in reading order.

In: a picture of ink, dark or light, on paper of one colour. Out: tiles of one size, each line in the middle of its own.
Reading a page is then reading lines, whatever its size. Where columns stand side by side, or a frame is drawn around
the text, the rows of ink are not lines of text, and this does not help.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

# Ink differs from paper by more than this share of what differs most (a percentile) and more than a scanner's noise.
INK_SHARE, MOST_INK, NOISE = 0.35, 99.5, 16.0
# A page is laid straight where it leans by at most this.
MOST_DEGREES, STEP_DEGREES = 3.0, 0.125
# So many pixels tell how a page leans; looking at every one of a scan takes seconds.
LEAN_PIXELS = 2**20
# A page of more rows is scaled down first: comparing rows with each other takes the square of their number.
MOST_ROWS = 8192
# Turning blurs, and a few letters differ most at some lean: not for less contrast, nor for fewer pixels at the sides.
WORTH, DRIFT = 1.1, 2.0
# Rows repeat at the first distance at which they resemble one another so much, and nearly as much as at any other.
RESEMBLANCE, OF_BEST = 0.1, 0.6
# Between two lines there is a row with less than this share of the ink of the richest row of either.
GAP = 0.12
# A row is as much of a line as any from this share of the richest row around it on: a lone brace is a line.
FULL = 0.25
# What is lower than this share of most lines, and no further away than that one, is a dot, an accent or an underscore.
LOW, NEAR = 0.5, 0.3
# Lines more than so many times as high as most are headings.
HEADING = 2.0
# Fewer pixels of ink are dust.
DUST = 3
# Pixels around ink that are neither ink nor paper.
SOFT = 1
# A line longer than a tile is cut in the widest gap of this last part of the tile.
CUT_WITHIN = 0.25

Rows = tuple[int, int]
Box = tuple[int, int, int, int]


def line_tiles(
    page: Image.Image, height: int, width: int, most: int | None = None
) -> list[UInt8[np.ndarray, "height width 3"]]:
    """Tiles of `height` by `width` pixels with the lines of an RGB page, in reading order; of a blank page, one.

    A line keeps its scale, but where it is higher than a tile. All begin at the same column of the page, so that
    indents stay; what is beside and below a line is paper. Light ink on dark paper becomes dark on light. Where there
    are more than `most` tiles none is made.
    """
    if page.height > MOST_ROWS:
        page = page.resize((max(page.width * MOST_ROWS // page.height, 1), MOST_ROWS), Image.Resampling.BILINEAR)
    paper = paper_of(np.asarray(page))
    ink = ink_of(np.asarray(page))
    if degrees := lean(ink):
        page = page.rotate(degrees, Image.Resampling.BILINEAR, expand=True, fillcolor=tuple(paper.tolist()))
        ink = ink_of(np.asarray(page))
    boxes = line_boxes(ink, height, width) or [((0, 0, 0, 0), 1.0)]
    if most is not None and len(boxes) > most:
        return []
    pixels, tiles = np.asarray(page), []
    for (left, top, right, bottom), scale in boxes:
        tile, line = np.full((height, width, 3), paper, np.uint8), pixels[top:bottom, left:right]
        if scale < 1.0:
            size = tuple(max(int(side * scale), 1) for side in (right - left, bottom - top))
            line = np.asarray(Image.fromarray(line).resize(size, Image.Resampling.BILINEAR))
        above = (height - len(line)) // 2
        tile[above : above + len(line), : line.shape[1]] = line
        tiles.append(tile)
    is_light = ink.any() and pixels[ink].mean() > paper.mean()
    return [255 - tile for tile in tiles] if is_light else tiles


def paper_of(pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, " 3"]:
    """The colour of most of a page."""
    return np.median(pixels.reshape(-1, 3), axis=0).astype(np.uint8)


def ink_of(pixels: UInt8[np.ndarray, "H W 3"]) -> Bool[np.ndarray, "H W"]:
    """Where there is ink: what is darker or lighter than paper, the colour of most of the page."""
    differs = np.abs(pixels - paper_of(pixels).astype(np.float32)).max(axis=-1)
    return differs > max(INK_SHARE * np.percentile(differs, MOST_INK), NOISE)


def lean(ink: Bool[np.ndarray, "H W"]) -> float:
    """Degrees by which a page is to be turned, counterclockwise, so that its lines are level: then rows differ most."""
    every = math.ceil((ink.size / LEAN_PIXELS) ** 0.5)
    ink = ink[::every, ::every]
    rows, columns = np.nonzero(ink)
    if not len(rows):
        return 0.0

    def contrast(degrees: float) -> float:
        level = rows + (columns - ink.shape[1] / 2) * -np.tan(np.radians(degrees))
        counts = np.bincount(np.round(level - level.min()).astype(int)).astype(np.float64)
        return float(np.sum(np.diff(counts) ** 2))

    steps = round(MOST_DEGREES / STEP_DEGREES)
    best = max((step * STEP_DEGREES for step in range(-steps, steps + 1)), key=contrast)
    drift = np.ptp(columns) * np.tan(np.radians(abs(best)))
    return best if drift >= DRIFT and contrast(best) > WORTH * contrast(0.0) else 0.0


def text_rows(ink: Bool[np.ndarray, "H W"]) -> list[Rows]:
    """First row of each line of text, and the row behind its last."""
    profile = ink.sum(axis=1).astype(np.float64)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], profile > 0, [0]])))
    rows = [
        (first + top, first + bottom)
        for first, end in edges.reshape(-1, 2).tolist()
        for top, bottom in _parted(profile[first:end])
    ]
    return _joined([(top, bottom) for top, bottom in rows if profile[top:bottom].sum() >= DUST])


def line_boxes(ink: Bool[np.ndarray, "H W"], height: int, width: int) -> list[tuple[Box, float]]:
    """Left, top, right and bottom of every line of text, or of its parts where it is too long, and its scale.

    The scale brings a line to at most `height`, a part to at most `width`; it is that of all lines but of headings.
    """
    boxes, (page_height, page_width) = [], ink.shape
    inked, lines = np.flatnonzero(ink.any(axis=0)), text_rows(ink)
    tall = [last - first + 2 * SOFT for first, last in lines]
    common = min((height / each for each in tall if each <= HEADING * usual_height(lines)), default=1.0)
    for first, last in lines:
        top, bottom = max(first - SOFT, 0), min(last + SOFT, page_height)
        scale = min(common, height / (bottom - top), 1.0)
        columns, room = ink[top:bottom].sum(axis=0), max(int(width / scale), 1)
        left, end = max(int(inked[0]) - SOFT, 0), min(int(np.flatnonzero(columns)[-1]) + 1 + SOFT, page_width)
        while end - left > room:
            right = left + _widest_gap(columns[left : left + room])
            boxes.append(((left, top, right, bottom), scale))
            left = right
        boxes.append(((left, top, end, bottom), scale))
    return boxes


def usual_height(lines: list[Rows]) -> int:
    """Of most lines: neither of dots between them nor of a heading."""
    heights = sorted(bottom - top for top, bottom in lines)
    return heights[len(heights) * 3 // 5] if heights else 0


def _widest_gap(columns: Int[np.ndarray, " W"]) -> int:
    """The middle of the widest stretch of least ink in the last part of a tile."""
    since = min(len(columns) - round(CUT_WITHIN * len(columns)), len(columns) - 1)
    least = columns[since:] == columns[since:].min()
    starts, ends = np.flatnonzero(np.diff(np.concatenate([[0], least, [0]]))).reshape(-1, 2).T
    widest = int(np.argmax(ends - starts))
    return max(since + int(starts[widest] + ends[widest]) // 2, 1)


def _parted(profile: Float[np.ndarray, " H"]) -> list[Rows]:
    """The lines of rows that all have ink: more than one where it leans or is noisy."""
    smooth = _smooth(profile)
    lowest = [row for row in range(1, len(smooth) - 1) if smooth[row - 1] >= smooth[row] < smooth[row + 1]]
    lines: list[Rows] = []
    for top, bottom in itertools.pairwise([0, *lowest, len(profile)]):
        if lines and not _apart(profile, lines[-1], (top, bottom)):
            lines[-1] = (lines[-1][0], bottom)
        else:
            lines.append((top, bottom))
    return lines


def _joined(lines: list[Rows]) -> list[Rows]:
    """Dots, accents and underscores go to the nearer of the lines beside them."""
    usual = usual_height(lines)
    joined: list[Rows] = []
    for index, (top, bottom) in enumerate(lines):
        above = top - joined[-1][1] if joined else math.inf
        below = lines[index + 1][0] - bottom if index + 1 < len(lines) else math.inf
        is_low = bottom - top < LOW * usual
        was_low = bool(joined) and joined[-1][1] - joined[-1][0] < LOW * usual
        if above <= NEAR * usual and (was_low or (is_low and above <= below)):
            joined[-1] = (joined[-1][0], bottom)
        else:
            joined.append((top, bottom))
    return joined


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
