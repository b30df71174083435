"""A page cut into its lines: every line of rendered pages in its own tile, whatever the page's lean, noise and size."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gpt4moe.config.data import LEAST_SIDE, ImageConfig
from gpt4moe.data import rendered, sources
from gpt4moe.data.fonts import font, font_files
from gpt4moe.data.images import decode_into
from gpt4moe.data.page_lines import LEAN_PIXELS, MOST_ROWS, ink_of, lean, line_boxes, line_tiles, text_rows
from tests.data.image_documents import encoded

TALL, WIDE = 32, 448
TYPE = font(next(file for file in font_files(rendered.PRINTABLE) if file.endswith("DejaVuSans.ttf")), 16)


def page_of(lines, width=WIDE, height=200, step=21, ink=0, paper=255, indents=()):
    """Lines of text in DejaVu Sans of 16 pixels, `step` pixels apart."""
    page = Image.new("RGB", (width, height), (paper,) * 3)
    for row, line in enumerate(lines):
        x = 10 + (indents[row] if indents else 0)
        ImageDraw.Draw(page).text((x, 10 + row * step), line, font=TYPE, fill=(ink,) * 3)
    return page


def cropped(tile):
    """What is drawn on white."""
    rows, columns = (np.flatnonzero((tile < 255).any(axis=axes)) for axes in ((1, 2), (0, 2)))
    return tile[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def columns_of(tile):
    """The first column with ink and that behind the last."""
    found = np.flatnonzero(ink_of(tile).any(axis=0))
    return found[0], found[-1] + 1


@pytest.mark.parametrize(("sizes", "distortion"), [((10, 13), 1.0), ((14, 20), 1.0), ((10, 20), 0.0), ((14, 20), 1.9)])
def test_rendered_pages_have_as_many_tiles_as_lines(sizes, distortion):
    for height in (64, 128, 448):
        documents = rendered.pages(
            count=6, height=height, sizes=sizes, distortion=distortion, texts=sources.stdlib_manual
        )
        for document in documents:
            page = Image.open(io.BytesIO(document.images[0])).convert("RGB")
            assert len(line_tiles(page, TALL, WIDE)) == document.text.count("\n") + 1


def test_a_tile_holds_its_line_alone_in_the_middle():
    lines = ["The quick, brown fox (jumps)", "x_y = over[the] lazy", "}", "dogs & |others|"]
    tiles = line_tiles(page_of(lines), TALL, WIDE)
    assert len(tiles) == 4
    for line, tile in zip(lines, tiles, strict=True):
        (alone,) = line_tiles(page_of([line]), TALL, WIDE)
        signs, signs_alone = cropped(tile), cropped(alone)
        assert signs.shape[1] > 4 and np.array_equal(signs, signs_alone)
        above, below = (np.flatnonzero((half < 255).any(axis=(1, 2)))[0] for half in (tile, tile[::-1]))
        assert abs(above - below) <= 1


def test_indents_stay():
    tiles = line_tiles(page_of(["if ready:", "start", "end"], indents=(0, 40, 20)), TALL, WIDE)
    lefts = [columns_of(tile)[0] for tile in tiles]
    assert lefts[1] - lefts[0] == pytest.approx(40, abs=2) and lefts[2] - lefts[0] == pytest.approx(20, abs=2)


SNIPPETS = [
    ["        deep indented", "    less", "none at all"],
    ["This is a much longer line of text", "x", "y"],
    ["int main(void)", "{", "    return 0;", "}"],
    ["x = y", "_private_name_ = a_b", "==", "i, j: ...", "end"],
]


@pytest.mark.parametrize("step", [20, 21, 32])
@pytest.mark.parametrize("lines", SNIPPETS, ids=lambda lines: lines[0].strip())
def test_short_lines_among_long_ones_are_lines(lines, step):
    boxes = line_boxes(ink_of(np.asarray(page_of(lines, step=step))), TALL, WIDE)
    assert len(boxes) == len(lines)
    for row, (line, ((_, top, _, bottom), _)) in enumerate(zip(lines, boxes, strict=True)):
        _, above, _, below = TYPE.getbbox(line)
        assert top == pytest.approx(10 + row * step + above, abs=2)
        assert bottom == pytest.approx(10 + row * step + below, abs=2)


def test_light_ink_on_dark_paper_comes_out_dark_on_light():
    light, dark = (
        line_tiles(page_of(["of any", "colour"], ink=ink, paper=paper), TALL, WIDE)
        for ink, paper in ((225, 30), (30, 225))
    )
    assert len(light) == len(dark) == 2 and dark[0][0, -1].tolist() == [225] * 3
    assert all(np.abs(one.astype(int) - other).max() <= 1 for one, other in zip(light, dark, strict=True))


def test_ink_as_bright_as_its_paper_is_ink():
    page = Image.new("RGB", (WIDE, 60), (200, 80, 80))
    ImageDraw.Draw(page).text((10, 10), "red on green", font=TYPE, fill=(80, 200, 80))
    assert len(text_rows(ink_of(np.asarray(page)))) == 1


@pytest.mark.parametrize("degrees", [-2.5, -0.75, 0.75, 2.5])
def test_what_leans_is_laid_straight(degrees):
    straight = page_of(
        ["a line that goes from side to side of it all", "and one more that does so, right below it"] * 4
    )
    leaning = straight.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(255,) * 3)
    assert lean(ink_of(np.asarray(leaning))) == pytest.approx(-degrees, abs=0.25)
    tiles = line_tiles(leaning, TALL, WIDE)
    assert len(tiles) == 8 and all(np.flatnonzero(ink_of(tile).any(axis=1)).size <= 20 for tile in tiles)


def test_no_ink_is_turned_out_of_the_page():
    """Far from the middle of a strip, straight lines come to lie beside it."""
    strip = Image.new("RGB", (240, 3000), (255,) * 3)
    lines = page_of(["a line of a strip", "and one more", "below it"] * 2, width=240, height=150)
    strip.paste(lines.rotate(2, Image.Resampling.BILINEAR, fillcolor=(255,) * 3), (0, 2850))
    turned, straight = (np.stack(line_tiles(page, TALL, WIDE)) for page in (strip, lines))
    assert turned.shape == straight.shape
    ink, ink_straight = (float((255 - tiles.astype(int)).sum()) for tiles in (turned, straight))
    assert ink == pytest.approx(ink_straight, rel=0.05)


def test_a_page_without_lines_is_not_turned():
    assert lean(np.zeros((40, 40), bool)) == 0.0
    dots = np.zeros((40, 40), bool)
    dots[20, 20] = True
    assert lean(dots) == 0.0


def test_a_line_longer_than_a_tile_goes_on_in_the_next_and_is_cut_between_words():
    text = "words of which there are too many for one tile"
    page = page_of([text, "short"], width=600)
    ink = ink_of(np.asarray(page))
    boxes = [box for box, scale in line_boxes(ink, TALL, 150) if scale == 1.0]
    long, last = boxes[:-1], boxes[-1]
    assert len(long) == 3 and last[2] - last[0] < 60 and last[1] > long[0][3] - 2
    assert [box[0] for box in long[1:]] == [box[2] for box in long[:-1]]  # nothing is left out
    assert all(0 < box[2] - box[0] <= 150 for box in long)
    spaces = [10 + TYPE.getlength(text[:at]) for at, letter in enumerate(text) if letter == " "]
    for box in long[:-1]:
        assert min(abs(space + TYPE.getlength(" ") / 2 - box[2]) for space in spaces) <= 2
    assert len(line_tiles(page, TALL, 150)) == len(boxes)


def test_type_higher_than_a_tile_is_scaled_down_and_nothing_is_lost():
    small = page_of(["Heading"], height=40).resize((WIDE * 4, 160))
    page = Image.new("RGB", (WIDE * 4, 400), "white")
    page.paste(small, (0, 0))
    page.paste(page_of(["of a text", "in usual type"], height=80), (0, 200))
    tiles = line_tiles(page, TALL, WIDE)
    assert len(tiles) == 3
    tall = [np.flatnonzero((tile < 128).any(axis=(1, 2))) for tile in tiles]
    assert tall[0].size > 20 and tall[0][0] >= 1 and tall[0][-1] <= TALL - 2  # neither top nor bottom is cut off
    assert np.array_equal(cropped(tiles[1]), cropped(line_tiles(page_of(["of a text"]), TALL, WIDE)[0]))


def test_two_columns_that_run_into_one_another_keep_their_ink():
    page = page_of(["left one", "left two", "left three"], width=560, height=90)
    page.paste(page_of(["right one", "right two", "right three"], width=250, height=83), (300, 7))
    tiles, ink = line_tiles(page, TALL, WIDE), ink_of(np.asarray(page))
    boxes = [box for box, _ in line_boxes(ink, TALL, WIDE)]
    covered = np.zeros_like(ink)
    for left, top, right, bottom in boxes:
        covered[top:bottom, left:right] = True
    assert not (ink & ~covered).any() and len(tiles) == len(boxes)


def test_a_box_has_the_soft_pixels_around_its_ink():
    ink = np.zeros((40, 60), bool)
    ink[12:20, 10:30] = ink[30:36, 14:40] = True
    assert line_boxes(ink, TALL, WIDE) == [((9, 11, 31, 21), 1.0), ((9, 29, 41, 37), 1.0)]


def test_one_line_of_letters_without_ascenders_is_one_line():
    assert [bottom - top for top, bottom in text_rows(ink_of(np.asarray(page_of(["moss on zoos === ooo"]))))] == [9]


def test_blank_paper_is_one_tile_of_it():
    (tile,) = line_tiles(Image.new("RGB", (50, 40), (200, 210, 220)), TALL, WIDE)
    assert tile.shape == (TALL, WIDE, 3) and (tile == (200, 210, 220)).all()


def test_a_scan_of_many_pixels_has_the_lines_of_a_small_page():
    small = page_of(["one line of the page", "and another one below", "a third"] * 2, width=240, height=150)
    small = small.rotate(1.5, Image.Resampling.BILINEAR, fillcolor=(255,) * 3)
    wide = small.resize((2400, 1500))
    assert 3 * LEAN_PIXELS < 2400 * 1500
    assert lean(ink_of(np.asarray(wide))) == pytest.approx(-1.5, abs=0.25)
    assert len(line_tiles(wide, TALL, WIDE)) == 6
    high = Image.new("RGB", (270, MOST_ROWS * 9 // 8), (255,) * 3)
    high.paste(small, (0, MOST_ROWS // 2))
    assert len(line_tiles(high, TALL, WIDE)) == 6


def test_more_tiles_than_asked_for_are_not_made():
    page = page_of(["one", "two", "three"])
    assert len(line_tiles(page, TALL, WIDE, most=3)) == 3 and line_tiles(page, TALL, WIDE, most=2) == []


def test_tiles_of_a_few_pixels_hold_what_they_can():
    """Of noise and of a bar; a tile of fewer pixels is refused (`ImageConfig`)."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 1)).repeat(3, axis=2).astype(np.uint8)
    bar = np.full((40, 60, 3), 255, np.uint8)
    bar[5:15, 5:50] = 0
    for pixels in (noise, bar, noise[:1], noise[:, :1], noise[:1, :1]):
        tiles = line_tiles(Image.fromarray(pixels), LEAST_SIDE, LEAST_SIDE)
        assert tiles and all(tile.shape == (LEAST_SIDE, LEAST_SIDE, 3) for tile in tiles)


def test_pages_of_a_batch_and_more_lines_than_frames():
    config = ImageConfig(height=TALL, width=WIDE, per_row=1, frames=4, fit="lines")
    page = page_of(["one", "two", "three"])

    def decoded(image):
        out, valid = np.zeros((4, TALL, WIDE, 3), np.uint8), np.zeros(4, bool)
        decode_into(image, config, out, valid)
        return out, valid

    out, valid = decoded(encoded(page))
    assert valid.tolist() == [True, True, True, False] and not out[3].any()
    assert np.array_equal(out[:3], line_tiles(page, TALL, WIDE))
    # Five lines do not fit into four pieces: the page is cut into tiles, each of which has ink of several lines.
    out, valid = decoded(encoded(page_of(["1", "2", "3", "4", "5"], height=128)))
    assert valid.all() and len(text_rows(ink_of(out[1]))) > 1
    # The frames of a clip are its own.
    frame = encoded(page)
    _, valid = decoded((frame, frame))
    assert valid.tolist() == [True, True, False, False]
