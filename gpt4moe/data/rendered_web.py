"""A source of screenshots: small web pages made of real text, as the machine's own Chromium shows them."""

from __future__ import annotations

import html
import pathlib
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

from PIL import Image

from gpt4moe.config.check import CallerError, require
from gpt4moe.data.documents import IMAGE_MARKER, Document
from gpt4moe.data.rendered import Words, grey_png
from gpt4moe.data.sources import DocumentFunction, stdlib_text

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell", "chrome")
# Below one another in one picture, since the browser takes most of a second to start.
PAGES_A_SHOT = 16
SECONDS_A_SHOT = 60
FAMILIES = ("sans-serif", "serif", "monospace")
COLOURS = (("#fff", "#111"), ("#f4f1ea", "#222"), ("#eef", "#113"), ("#222", "#eee"))
ELEMENTS = ("p", "p", "p", "ul", "button", "table")
# A letter is hardly ever wider than this, in units of the type's size, so that no text is cut off.
LETTER_WIDTH = 0.62
PADDING = 8


def screenshots(
    count: int = 2_000,
    seed: int = 0,
    height: int = 448,
    width: int = 448,
    sizes: tuple[int, int] = (11, 18),
    texts: DocumentFunction = stdlib_text,
    paths: tuple[str, ...] = (),
    text_field: str = "text",
) -> Iterator[Document]:
    """`count` pages of headings, paragraphs, lists, buttons and tables; the transcript has one of these a line.

    `CallerError` where there is no Chromium, or where it does not give a picture.
    """
    browser = find_browser()
    rng = random.Random(f"screenshots {seed}")
    words = Words(texts, paths, text_field, rng)
    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, count, PAGES_A_SHOT):
            number = min(PAGES_A_SHOT, count - first)
            made = [_page(rng, words, height, width, rng.randint(*sizes)) for _ in range(number)]
            shot = _shot(browser, pathlib.Path(folder), "".join(body for body, _ in made), width, height * number)
            for index, (_, transcript) in enumerate(made):
                part = shot.crop((0, index * height, width, (index + 1) * height))
                yield Document(IMAGE_MARKER + transcript, images=(grey_png(part),))


def find_browser() -> str:
    """Path of a Chromium; `CallerError` where none is installed."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    require(
        found is not None, "documents", "screenshots", "needs a Chromium and finds none", "apt-get install chromium"
    )
    return found


def _page(rng: random.Random, words: Words, height: int, width: int, size: int) -> tuple[str, str]:
    """One page of `height` by `width` pixels as HTML, and its transcript."""
    paper, ink = rng.choice(COLOURS)
    letters = int((width - 2 * PADDING - 2 * size) / (LETTER_WIDTH * size))
    room = height - 2 * PADDING
    parts, transcript = [], []
    while room > 0:
        tag = rng.choice(ELEMENTS) if parts else "h1"
        body, text, lines = _element(rng, words, tag, letters)
        # Lines, and the space around an element.
        room -= (lines + 0.7) * size * 1.45
        if room > 0 or not parts:
            parts.append(body)
            transcript.append(text)
    style = f"height:{height}px;width:{width}px;overflow:hidden;box-sizing:border-box;padding:{PADDING}px;"
    style += f"background:{paper};color:{ink};font:{size}px/1.4 {rng.choice(FAMILIES)}"
    return f'<div style="{style}">{"".join(parts)}</div>', "\n".join(transcript)


def _element(rng: random.Random, words: Words, tag: str, letters: int) -> tuple[str, str, int]:
    """HTML, transcript and lines of one element whose lines have room for `letters`."""
    if tag == "h1":
        text = words.letters(letters // 2)
        return f"<h1>{html.escape(text)}</h1>", text, 2
    if tag == "p":
        lines = rng.randint(1, 4)
        text = words.letters(letters * lines * 4 // 5)
        return f"<p>{html.escape(text)}</p>", text, lines
    if tag == "button":
        text = words.letters(min(12, letters // 2))
        return f"<p><button>{html.escape(text)}</button></p>", text, 2
    cells = [words.letters(max(letters // 3, 3)) for _ in range(rng.randint(1, 3) * (2 if tag == "table" else 1))]
    if tag == "ul":
        return f"<ul>{''.join(f'<li>{html.escape(cell)}</li>' for cell in cells)}</ul>", "\n".join(cells), len(cells)
    rows = [cells[start : start + 2] for start in range(0, len(cells), 2)]
    drawn = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    text = "\n".join(" ".join(row) for row in rows)
    return f'<table border="1">{drawn}</table>', text, 2 * len(rows)


def _shot(browser: str, folder: pathlib.Path, body: str, width: int, height: int) -> Image.Image:
    page, picture = folder / "page.html", folder / "page.png"
    sizes = "h1{font-size:1.2em;margin:0 0 .4em}p,ul,table{margin:0 0 .6em}td,button{font-size:1em}"
    page.write_text(
        f"<!doctype html><meta charset=utf-8><style>body{{margin:0}}{sizes}</style>{body}", encoding="utf-8"
    )
    picture.unlink(missing_ok=True)
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-dev-shm-usage",
        "--incognito",
    )
    options += (f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}", f"--screenshot={picture}")
    try:
        done = subprocess.run(
            [browser, *options, page.as_uri()], check=False, capture_output=True, timeout=SECONDS_A_SHOT
        )
    except subprocess.TimeoutExpired:
        raise CallerError(f"browser={browser!r} gave no picture in {SECONDS_A_SHOT} s; try it by hand") from None
    if not picture.exists():
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise CallerError(f"browser={browser!r} gave no picture and said {said[-1]!r}; try it by hand")
    with Image.open(picture) as image:
        return image.convert("L")
