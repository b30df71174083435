"""Sources that are drawn: documents the same each time, transcripts of what is there to be read."""

import functools
import io
import itertools
import os
import shutil
import string
import subprocess

import numpy as np
import pytest
from PIL import Image

from gpt4moe.config.data import DataConfig, ImageConfig, SourceConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.data import rendered, rendered_web
from gpt4moe.data.documents import Document
from gpt4moe.data.fonts import font_files
from gpt4moe.data.images import image_problem
from gpt4moe.data.pipeline import TrainRows, open_store
from gpt4moe.data.rendered_formulas import formulas
from gpt4moe.data.rendered_web import find_browser, screenshots

WORDS = ["the quick brown fox jumps over the lazy dog, twice & once", "caf\u00e9 <image> " + "w" * 90]
SOURCES = {
    "digits": rendered.digits,
    "lines": functools.partial(rendered.lines, texts=WORDS.copy),
    "pages": functools.partial(rendered.pages, texts=WORDS.copy, height=96, width=128),
    "clips": rendered.clips,
    "formulas": formulas,
}


def opened(data):
    return Image.open(io.BytesIO(data))


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
