"""The chat page in a real browser: it streams, stops, keeps its settings, colours tokens by expert, tells of faults."""

import json
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from gpt4moe.data.rendered_web import BROWSERS, find_browser
from gpt4moe.serve.app import PAGE

from .browser import open_page
from .conftest import MODEL

ROOT = pathlib.Path(__file__).resolve().parents[2]
needs_chromium = pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="needs a Chromium")
COLOURED = "[...document.querySelectorAll('.assistant span')].filter(span => span.style.background).length"


@pytest.fixture(scope="module")
def page(tmp_path_factory, url):
    with open_page(find_browser(), tmp_path_factory.mktemp("profile")) as page:
        page.call("Page.navigate", url=url)
        page.wait_for(f"document.querySelector('#model')?.textContent === '{MODEL}'")
        yield page


def fill(page, **values):
    for name, value in values.items():
        page.evaluate(f"document.querySelector('#{name}').value = {json.dumps(value)}")


def ask(page, text):
    fill(page, text=text)
    page.evaluate("document.querySelector('#send').click()")


@needs_chromium
def test_a_turn_is_streamed_with_the_settings_and_coloured(page, client):
    fill(page, temperature="0", max_tokens="30", seed="3", system="Be brief.")
    ask(page, "Hi <b>you</b>")
    page.wait_for("document.querySelector('#status').textContent.includes('ended: ')")
    shown = page.evaluate("document.querySelector('.assistant div').textContent")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>you</b>"}]
    expected = client.chat.completions.create(model=MODEL, messages=turns, temperature=0, max_tokens=30)
    assert shown == expected.choices[0].message.content
    assert page.evaluate("document.querySelector('.user div').textContent") == "Hi <b>you</b>"  # as text, not as HTML
    spans = page.evaluate("document.querySelectorAll('.assistant span').length")
    assert spans > 5 and page.evaluate(COLOURED) == 0
    page.evaluate(
        "const layer = document.querySelector('#layer'); layer.value = 1; layer.dispatchEvent(new Event('change'))"
    )
    assert page.evaluate("layer.options.length") == 3  # off and the two layers with experts
    assert spans - 1 <= page.evaluate(COLOURED) <= spans  # the last token has not been through the model
    experts = page.evaluate("told.map(each => each.experts && each.experts[1][0])")
    legend = page.evaluate("[...document.querySelectorAll('#legend span')].map(span => Number(span.textContent))")
    assert legend == sorted({expert for expert in experts if expert is not None}) and len(legend) > 1


@needs_chromium
def test_a_stream_that_is_stopped_frees_its_slot_and_stays_as_it_is(page, stepper):
    page.evaluate("document.querySelector('#clear').click()")
    fill(page, max_tokens="200", temperature="1", seed="1")
    with stepper.still() as engine:
        before = engine.metrics().finished["cancelled"]
        ask(page, "Go on")
        page.wait_for("running !== null")
        while page.evaluate("document.querySelectorAll('.assistant span').length") < 3:
            engine.step()
        page.evaluate("document.querySelector('#stop').click()")
        page.wait_for("running === null")
        shown = page.evaluate("document.querySelector('.assistant div').textContent")
        deadline = time.monotonic() + 60
        while engine.metrics().running and time.monotonic() < deadline:
            time.sleep(0.05)  # for the server to hear of it
            engine.step()
        assert engine.metrics().finished["cancelled"] == before + 1
    assert page.evaluate("!document.querySelector('#send').disabled && document.querySelector('#stop').disabled")
    assert page.evaluate("document.querySelector('.assistant div').textContent") == shown != ""
    assert page.evaluate("document.querySelectorAll('.fault').length") == 0


@needs_chromium
def test_a_refusal_is_shown(page):
    page.evaluate("document.querySelector('#clear').click()")
    fill(page, temperature="1000")
    ask(page, "x")
    page.wait_for("document.querySelectorAll('.fault').length === 1")
    assert "temperature: Input should be less than" in page.evaluate("document.querySelector('.fault div').textContent")


def test_the_package_that_is_built_has_the_page(tmp_path):
    words = [sys.executable, "setup.py", "--quiet", "build_py", f"--build-lib={tmp_path}"]
    subprocess.run(words, check=True, cwd=ROOT, capture_output=True)
    assert (tmp_path / "gpt4moe/serve/chat.html").read_bytes() == PAGE.read_bytes()
