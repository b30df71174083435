"""Sources that are drawn: documents the same each time, transcripts of what is there to be read."""

import functools
import html
import importlib
import io
import itertools
import os
import re
import shutil
import string
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gpt4moe.config.check import CallerError
from gpt4moe.config.data import DataConfig, ImageConfig, SourceConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.data import rendered, rendered_formulas, rendered_web
from gpt4moe.data.documents import Document
from gpt4moe.data.fonts import font, font_files
from gpt4moe.data.images import image_problem
from gpt4moe.data.pipeline import TrainRows, open_store
from gpt4moe.data.rendered_formulas import formulas
from gpt4moe.data.rendered_web import find_browser, screenshots

WORDS = ["the quick brown fox jumps over the lazy dog, twice & once", "caf\u00e9 <image> " + "w" * 90]
PROSE = ["The quick brown fox jumps over the lazy dog, twice & once; then Mary had 27 little lambs (or more)."]
SOURCES = {
    "digits": rendered.digits,
    "lines": functools.partial(rendered.lines, texts=WORDS.copy),
    "pages": functools.partial(rendered.pages, texts=WORDS.copy, height=96, width=128),
    "clips": rendered.clips,
    "formulas": formulas,
}


def opened(data):
    return Image.open(io.BytesIO(data))


def test_pages_have_as_few_lines_as_they_may_and_some_end_early():
    draw = functools.partial(rendered.pages, count=60, texts=PROSE.copy, height=128, width=448, sizes=(14, 14))
    full = [document.text.removeprefix("<image>").split("\n") for document in draw()]
    ragged = [document.text.removeprefix("<image>").split("\n") for document in draw(min_lines=2)]
    (most,) = {len(lines) for lines in full}
    assert {len(lines) for lines in ragged} == set(range(2, most + 1))
    short = [sum(len(line) < 25 for lines in pages for line in lines) for pages in (full, ragged)]
    share = short[1] / sum(map(len, ragged))
    assert short[0] == 0 and 0.02 < share < 0.3
    assert {len(document.text.split("\n")) for document in draw(min_lines=100)} == {most}
    with pytest.raises(CallerError, match=r"pages.min_lines=0 must be"):
        list(draw(min_lines=0))


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_seed_gives_the_same_documents_of_image_and_transcript(name):
    first = list(SOURCES[name](count=6, seed=3))
    assert first == list(SOURCES[name](count=6, seed=3)) != list(SOURCES[name](count=6, seed=4))
    for document in first:
        (image,) = document.images
        assert document.text.startswith("<image>") and document.text.count("<image>") == 1 and len(document.text) > 7
        assert image_problem(image, 10**6) is None
        frames = (image,) if isinstance(image, bytes) else image
        assert all(np.ptp(np.asarray(opened(frame))) > 100 for frame in frames), "something is drawn"


def test_digits_are_of_the_lengths_and_size_asked_for():
    documents = list(rendered.digits(count=300, min_digits=2, max_digits=4, height=20, width=40))
    lengths = {len(document.text) - len("<image>") for document in documents}
    assert lengths == {2, 3, 4} and all(document.text[7:].isdigit() for document in documents)
    assert {opened(document.images[0]).size for document in documents} == {(40, 20)}
    assert len({document.images for document in documents}) == 300
    for document in rendered.digits(count=50, min_digits=5):
        (columns,) = np.nonzero(np.ptp(np.asarray(opened(document.images[0])), axis=0) > 30)
        assert np.ptp(columns) > 2 * 48 / 5, "digits stand beside one another"
    with pytest.raises(ValueError, match=r"digits.width=4 and height=16 are too small for \d digits"):
        list(rendered.digits(count=1, width=4))
    with pytest.raises(ValueError, match="max_digits=2 must be an integer of at least 3"):
        list(rendered.digits(count=1, max_digits=2))


def test_digits_at_every_size_are_whole_and_told_apart():
    for file in font_files(string.digits):
        for glyphs in rendered._fitting(file, 5, 16, 48):
            assert glyphs.height <= 16 and 5 * glyphs.advance <= 48
            assert len({mask.tobytes() for mask in glyphs.masks}) == 10, file


def test_lines_fit_and_leave_no_word_out():
    documents = list(rendered.lines(count=30, width=200, texts=WORDS.copy))
    words = " ".join(document.text.removeprefix("<image>") for document in documents).split()
    readable = [word for text in WORDS for word in text.split() if word.isascii() and word != "<image>"]
    long = {word for word in words if set(word) == {"w"}}
    assert set(words) - long == set(readable) - {"w" * 90} and max(map(len, long)) < 90, "a word too long is cut"
    for document in documents:
        edge = np.asarray(opened(document.images[0]))[:, -1]
        assert edge.min() > 100, f"{document.text} is cut off"


def test_a_clip_says_when_a_word_is_first_seen():
    for document in rendered.clips(count=20, frames=4, seconds=0.5):
        times, words = zip(*(line.split() for line in document.text.removeprefix("<image>").split("\n")), strict=True)
        assert times[0] == "0" and list(map(float, times)) == sorted(set(map(float, times)))
        assert len(document.images[0]) == 4 and set(words) <= set(rendered.CLIP_WORDS)
        assert all(one != other for one, other in itertools.pairwise(words))


def test_pages_without_distortion_are_what_was_drawn():
    (plain,) = rendered.pages(count=1, texts=WORDS.copy, distortion=0, height=96, width=128)
    (scanned,) = rendered.pages(count=1, texts=WORDS.copy, height=96, width=128)
    assert plain.text == scanned.text and plain.images != scanned.images
    assert plain.text.count("\n") >= 2


def test_the_users_own_text_is_drawn(tmp_path):
    (tmp_path / "a.txt").write_text("mine alone")
    (document,) = rendered.lines(count=1, paths=(str(tmp_path),))
    assert set(document.text.removeprefix("<image>").split()) <= {"mine", "alone"}
    with pytest.raises(ValueError, match="has no words of ASCII"):
        list(rendered.lines(count=1, texts=lambda: ["\u00e9"]))


def test_held_out_digits_are_never_drawn_in_training(tmp_path):
    digits = functools.partial(rendered.digits, count=300, min_digits=2, max_digits=2)
    config = DataConfig(
        (SourceConfig("digits", documents=digits, max_epochs=1),),
        32,
        TokenizerConfig(byte_level_only=True),
        held_out_fraction=0.2,
        images=ImageConfig(height=16, width=48, per_row=8),
    )
    store = open_store(config, tmp_path)
    assert store.report.sources[0].images + store.report.sources[0].held_out_images == 300

    def strings(split):
        stream, offsets = store.stream("digits", split), store.offsets("digits", split)
        return {store.tokenizer.decode(stream[start + 2 : start + 4]) for start in offsets[:-1]}

    assert strings("train").isdisjoint(strings("held_out")) and len(strings("held_out")) > 5
    batch = next(TrainRows(store, config, microbatch_rows=4))
    assert batch.image_valid.mean() > 0.7 and batch.images[batch.image_valid].std() > 20


def test_without_a_browser_the_package_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"^documents='screenshots' needs a Chromium [^\n]*apt-get install chromium$"):
        next(screenshots(count=1))


def test_a_browser_that_fails_is_a_one_line_error(monkeypatch):
    monkeypatch.setattr(rendered_web, "find_browser", lambda: shutil.which("false"))
    with pytest.raises(ValueError, match=r"^browser='[^\n]*false' gave no picture and said 'nothing'; try it by hand$"):
        next(screenshots(count=1, texts=WORDS.copy))


@pytest.mark.skipif(not any(map(shutil.which, rendered_web.BROWSERS)), reason="needs a Chromium")
def test_screenshots_of_pages():
    assert find_browser()
    documents = list(screenshots(count=2, height=120, width=200, texts=WORDS.copy))
    assert len(documents) == 2 and all(isinstance(document, Document) for document in documents)
    for document in documents:
        image = opened(document.images[0])
        assert image.size == (200, 120) and np.ptp(np.asarray(image)) > 100


@pytest.fixture
def one_font(monkeypatch):
    """All is drawn in one font, whose file this is."""
    file = next(file for file in font_files(string.printable.strip()) if file.endswith("DejaVuSans.ttf"))
    monkeypatch.setattr(rendered, "font_files", lambda characters: (file,))
    return file


def ink_of(image):
    """Darkness of the smallest part of a picture that holds all its ink, 0 to 1."""
    pixels = np.asarray(image.convert("L")).astype(float)
    dark = (pixels.max() - pixels) / max(np.ptp(pixels), 1)
    rows, columns = (np.flatnonzero((dark > 0.3).any(axis)) for axis in (1, 0))
    return dark[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def likeness(image, text, file):
    """Correlation of a picture's ink with that of `text` drawn anew, large, and laid over it."""
    seen, type_ = ink_of(image), font(file, 40)
    size = type_.getbbox(text)[2:]
    page = Image.new("L", (size[0] + 8, size[1] + 8), 255)
    ImageDraw.Draw(page).text((4, 4), text, font=type_, fill=0)
    drawn = Image.fromarray((ink_of(page) * 255).astype(np.uint8)).resize(seen.shape[::-1], Image.Resampling.BOX)
    return np.corrcoef(seen.ravel(), np.asarray(drawn).ravel())[0, 1]


def read_as(image, texts, file):
    """The one of `texts` that a picture looks like most."""
    return max(texts, key=lambda text: likeness(image, text, file))


def test_digits_stand_in_the_order_of_the_transcript(one_font):
    for document in rendered.digits(count=12, height=32, width=160):
        text = document.text.removeprefix("<image>")
        another = text[:-1] + str((int(text[-1]) + 5) % 10)
        assert read_as(opened(document.images[0]), [text, text[::-1], another], one_font) == text
        assert likeness(opened(document.images[0]), text, one_font) > 0.6


def test_a_line_reads_as_its_transcript(one_font):
    for document in rendered.lines(count=8, width=200, texts=PROSE.copy):
        text = document.text.removeprefix("<image>")
        assert likeness(opened(document.images[0]), text, one_font) > 0.5
        assert read_as(opened(document.images[0]), [text[::-1], text], one_font) == text


def test_lines_of_a_page_stand_one_below_the_other(one_font):
    sizes, step = (16, 16), round(16 * rendered.LINE_SPACING)
    (document,) = rendered.pages(count=1, texts=PROSE.copy, sizes=sizes, distortion=0, height=160, width=200)
    page, lines = opened(document.images[0]), document.text.removeprefix("<image>").split("\n")
    assert len(lines) == (160 - 16) // step and len(set(lines)) > 4
    for row, text in enumerate(lines):
        band = page.crop((0, 8 + row * step, 200, 8 + (row + 1) * step))
        assert read_as(band, sorted(set(lines)), one_font) == text


@pytest.mark.parametrize(("side", "distortion"), [(1344, 1.0), (448, 3.0)])
def test_no_letter_leaves_a_page_that_lies_askew(side, distortion):
    given = {"height": side, "width": side, "sizes": (12, 16), "distortion": distortion}
    for document in rendered.pages(count=3, texts=PROSE.copy, **given):
        pixels = np.asarray(opened(document.images[0])).astype(int)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edge < np.median(edge) - 60).sum() <= 3, "grain at most"


def test_a_page_without_room_for_a_line_is_a_one_line_error():
    with pytest.raises(
        ValueError, match=r"^pages.height=30 and width=448 have no room for a line in a margin of 8 pix"
    ):
        next(rendered.pages(count=1, texts=WORDS.copy, height=30))
    with pytest.raises(ValueError, match=r"^pages.distortion=-1 must be a number of at least 0"):
        next(rendered.pages(count=1, texts=WORDS.copy, distortion=-1))


def test_every_frame_of_a_clip_shows_the_word_of_its_second(one_font):
    for document in rendered.clips(count=6, frames=5, height=64, width=200, seconds=0.5):
        said = dict(line.split() for line in document.text.removeprefix("<image>").split("\n"))
        words = {float(second) / 0.5: word for second, word in said.items()}
        for index, frame in enumerate(document.images[0]):
            word = words[max(first for first in words if first <= index)]
            assert read_as(opened(frame), rendered.CLIP_WORDS, one_font) == word


def test_a_formula_is_drawn_from_its_transcript():
    from matplotlib import mathtext
    from matplotlib.font_manager import FontProperties

    parser, margin, sources = mathtext.MathTextParser("agg"), 3, []
    for document in formulas(count=12, margin=margin):
        source = document.text.removeprefix("<image>")
        ink = 255 - np.asarray(opened(document.images[0]))[margin:-margin, margin:-margin]
        drawn = (
            np.asarray(parser.parse(f"${source}$", 100, FontProperties(size=14, math_fontfamily=family)).image)
            for family in rendered_formulas.FONT_SETS
        )
        assert any(np.array_equal(ink, one) for one in drawn), source
        sources.append(source)
    assert any("frac" in source for source in sources)


BROWSER = """#!{python}
import sys
from PIL import Image
given = dict(one[2:].split("=", 1) for one in sys.argv if one.startswith("--") and "=" in one)
width, height = map(int, given["window-size"].split(","))
shot = Image.new("L", (width, height))
for page in range(height // 50):
    shot.paste(10 * page, (0, 50 * page, width, 50 * page + 50))
shot.save(given["screenshot"])
"""


def test_every_page_of_a_shot_is_cut_out_with_its_transcript(tmp_path, monkeypatch):
    """By a browser that makes the pages of a shot 0, 10, 20, ... of grey, one below the other."""
    (tmp_path / "chromium").write_text(BROWSER.format(python=sys.executable))
    (tmp_path / "chromium").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    bodies, shoot = [], rendered_web._shot
    monkeypatch.setattr(rendered_web, "_shot", lambda *given: bodies.append(given[2]) or shoot(*given))
    count = rendered_web.PAGES_A_SHOT + 2
    documents = list(screenshots(count=count, height=50, width=300, texts=WORDS.copy))
    greys = [np.unique(opened(document.images[0])).tolist() for document in documents]
    assert greys == [[10 * (index % rendered_web.PAGES_A_SHOT)] for index in range(count)]
    headings = [html.unescape(one) for body in bodies for one in re.findall("<h1>(.*?)</h1>", body)]
    assert headings == [document.text.removeprefix("<image>").split("\n")[0] for document in documents]


TALKING = """
import os
print("a module that talks when it is imported")
os.write(1, b"and below Python too")
def words():
    print("and when it is asked")
    return ["some words of text here"] * 3
"""


def module_of(tmp_path, monkeypatch, name, text):
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name)


def test_a_text_function_may_print(tmp_path, monkeypatch, capfd):
    talking = module_of(tmp_path, monkeypatch, "talking_text", TALKING)
    draw = functools.partial(rendered.lines, count=1100, height=24, width=40, texts=talking.words)
    documents = drawn_of(monkeypatch, 2, draw)
    assert len(documents) == 1100
    assert "talks when it is imported" in capfd.readouterr().err


@pytest.mark.parametrize("cut", [0, 10, 5000])
def test_a_drawing_process_that_dies_is_told_however_much_it_had_written(tmp_path, monkeypatch, cut):
    """Instead of this Python one that hears what is to be drawn, writes so many bytes of some documents and ends."""
    half = tmp_path / "python"
    half.write_text(
        f"#!{sys.executable}\nimport pickle, sys\nsys.stdin.buffer.read()\n"
        f"sys.stdout.buffer.write(pickle.dumps([b'x' * 9000])[:{cut}])\n"
    )
    half.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(half))
    with pytest.raises(RuntimeError, match="a process that draws lines died: out of memory, or see above"):
        drawn_of(monkeypatch, 2, functools.partial(rendered.lines, count=1100, width=40, texts=WORDS.copy))


def drawn_of(monkeypatch, cores, draw):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    return list(draw())


@pytest.mark.parametrize("cores", [2, 3])
def test_documents_are_the_same_whatever_the_number_of_processes(monkeypatch, cores):
    draw = functools.partial(rendered.clips, count=1201, frames=2, height=12, width=32)
    started = []
    begin = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: started.append(1) or begin(*args, **kwargs))
    documents = drawn_of(monkeypatch, cores, draw)
    first = list(draw(count=500))
    assert len(documents) == 1201 and documents[:500] == first and documents[500:1000] != first
    assert len(started) == cores
    assert documents == drawn_of(monkeypatch, 1, draw)


def test_what_a_drawing_process_refuses_is_told_here(monkeypatch):
    with pytest.raises(ValueError, match="too small for"):
        drawn_of(monkeypatch, 2, functools.partial(rendered.digits, count=6000, width=4))


def test_a_function_typed_in_place_is_drawn_from_here(monkeypatch):
    texts = lambda: ["one two three"]  # noqa: E731
    documents = drawn_of(monkeypatch, 2, functools.partial(rendered.lines, count=1100, width=100, texts=texts))
    assert len(documents) == 1100
