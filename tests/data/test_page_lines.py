"""A page cut into its lines: every line of rendered pages in its own tile, whatever the page's lean, noise and size."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gpt4moe.config.data import ImageConfig
from gpt4moe.data import rendered, sources
from gpt4moe.data.fonts import font, font_files
from gpt4moe.data.images import decode_into
from gpt4moe.data.page_lines import ink_of, lean, line_boxes, line_tiles, text_rows
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


def test_light_ink_on_dark_paper_and_the_colour_beside_it():
    dark, light = (
        line_tiles(page_of(["of any", "colour"], ink=ink, paper=paper), TALL, WIDE)
        for ink, paper in ((250, 30), (0, 240))
    )
    assert len(dark) == len(light) == 2
    assert dark[0][0, -1].tolist() == [30] * 3 and light[0][0, -1].tolist() == [240] * 3


@pytest.mark.parametrize("degrees", [-2.5, -0.75, 0.75, 2.5])
def test_what_leans_is_laid_straight(degrees):
    straight = page_of(
        ["a line that goes from side to side of it all", "and one more that does so, right below it"] * 4
    )
    leaning = straight.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(255,) * 3)
    assert lean(ink_of(np.asarray(leaning))) == pytest.approx(-degrees, abs=0.25)
    tiles = line_tiles(leaning, TALL, WIDE)
    assert len(tiles) == 8 and all(np.flatnonzero(ink_of(tile).any(axis=1)).size <= 20 for tile in tiles)


def test_a_page_without_lines_is_not_turned():
    assert lean(np.zeros((40, 40), bool)) == 0.0
    dots = np.zeros((40, 40), bool)
    dots[20, 20] = True
    assert lean(dots) == 0.0


def test_a_line_longer_than_a_tile_goes_on_in_the_next_and_is_cut_between_letters():
    text = "words of which there are too many for one tile"
    page = page_of([text, "short"], width=600)
    ink = ink_of(np.asarray(page))
    boxes = line_boxes(ink, TALL, 150)
    long, last = boxes[:-1], boxes[-1]
    assert len(long) >= 3 and last[2] - last[0] < 60 and last[1] > long[0][3] - 1
    assert [box[0] for box in long[1:]] == [box[2] for box in long[:-1]]  # nothing is left out
    assert all(box[2] - box[0] <= 150 for box in long)
    for box in long[:-1]:
        assert not ink[box[1] : box[3], box[2] - 1].any() or not ink[box[1] : box[3], box[2]].any()
    assert len(line_tiles(page, TALL, 150)) == len(boxes)


def test_type_higher_than_a_tile_is_scaled_down():
    large = page_of(["Large type", "on a page"]).resize((WIDE * 3, 600))
    tiles = line_tiles(large, TALL, WIDE)
    assert len(tiles) == 2
    assert all(np.flatnonzero(ink_of(tile).any(axis=1)).size <= TALL for tile in tiles)
    assert max(np.flatnonzero(ink_of(tile).any(axis=1)).size for tile in tiles) > TALL // 2


def test_one_line_of_letters_without_ascenders_is_one_line():
    assert [bottom - top for top, bottom in text_rows(ink_of(np.asarray(page_of(["moss on zoos === ooo"]))))] == [9]


def test_blank_paper_is_one_tile_of_it():
    (tile,) = line_tiles(Image.new("RGB", (50, 40), (200, 210, 220)), TALL, WIDE)
    assert tile.shape == (TALL, WIDE, 3) and (tile == (200, 210, 220)).all()


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
