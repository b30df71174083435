"""What the report and the page of coloured text show of choices that are made up here, token by token."""

import base64
import html.parser
import json
import re

import numpy as np
import pytest

from gpt4moe.analysis.capture import Capture
from gpt4moe.analysis.choice_figures import choice_figures, choices
from gpt4moe.analysis.expert_colours import expert_colours
from gpt4moe.analysis.expert_page import GATE_UNIT, NO_EXPERT, expert_page
from gpt4moe.analysis.experts import Experts, Text, format_document, to_document
from gpt4moe.analysis.text_pieces import pieces
from gpt4moe.data.tokenizer import byte_tokenizer, train_tokenizer

MALICE = '</script><script>alert(1)</script>"><img src=x onerror=alert(2)> & é'
LAYERS, CHOICES, EXPERTS = 3, 2, 5
GIVEN_TOKENS = 1 + len(MALICE.encode())  # bytes are tokens here


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def made_up(tokenizer, text, num_experts=EXPERTS, source=0):
    """Token u goes to expert (layer + u) mod (E - 1) and, one in three not at all, to the next; the last is idle."""
    token_ids = np.array([tokenizer.end_of_text, *tokenizer.encode(text)])
    place_U = np.arange(len(token_ids))
    first_LU = (np.arange(LAYERS)[:, None] + place_U) % (num_experts - 1)
    ids_LUK = np.stack([first_LU, (first_LU + 1) % (num_experts - 1)], axis=-1)
    gates_LUK = np.broadcast_to([0.75, 0.25], ids_LUK.shape).copy()
    gates_LUK[:, place_U % 3 == 0, 1], ids_LUK[:, place_U % 3 == 0, 1] = 0, -1
    return Capture(token_ids, np.full(len(token_ids), source), place_U, ids_LUK, gates_LUK, num_experts)


def joined(first, second):
    by_token = [
        np.concatenate(pair) for pair in zip(*(list(vars(c).values())[:3] for c in (first, second)), strict=True)
    ]
    ids, gates = (
        np.concatenate([getattr(c, name) for c in (first, second)], axis=1) for name in ("expert_ids_LUK", "gates_LUK")
    )
    return Capture(*by_token, ids, gates, first.num_experts)


@pytest.fixture(scope="module")
def experts(tokenizer):
    code, prose = made_up(tokenizer, "x = f(1)\n" * 9), made_up(tokenizer, "The end of it. " * 9, source=1)
    given, saturation = made_up(tokenizer, MALICE), np.array([0.2, 0.4, 0.6])
    return Experts(
        step=40,
        source_names=("code", "prose"),
        tokenizer=tokenizer,
        held_out=joined(code, prose),
        texts=(Text("a <b>name</b>", given, 900), Text("code, held out", code)),
        saturation={1000: (10, saturation), 2000: (20, saturation + 0.3)},
    )


class Page(html.parser.HTMLParser):
    """The tokens, texts and scripts of a page; counts tags left open."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.tokens, self.depth, self.scripts, self.inside = [], [], 0, [], None
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.depth += tag not in ("meta", "input")
        if tag == "span":
            self.tokens.append([dict(attrs), ""])
        self.inside = tag if tag != "i" else self.inside

    def handle_endtag(self, tag):
        self.depth -= 1
        self.inside = None if tag != "i" else self.inside

    def handle_data(self, data):
        if self.inside == "span":
            self.tokens[-1][1] += data
        elif self.inside == "script":
            self.scripts.append(data)


@pytest.fixture(scope="module")
def source(experts):
    return expert_page("a run", experts)


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def test_the_page_stands_alone_and_runs_only_its_own_script(source, page):
    assert page.depth == 0
    assert page.tags.count("script") == 2 and "img" not in page.tags and "b" not in page.tags
    assert not re.findall(r"https?:|src=\"|@import|url\(", source)
    assert re.findall(r'href="([^"]*)"', source) == ["report.html"]
    assert f"the first {GIVEN_TOKENS} of 900 tokens" in source and "$" not in source
    assert 'id="layer" type="range" min="0" max="2"' in source


def test_every_character_is_shown_once_with_its_expert(experts, page):
    text = "".join(text for _, text in page.tokens)
    assert text == "<|endoftext|>" + MALICE + "<|endoftext|>" + "x = f(1)\n" * 9
    attributes, shown = page.tokens[1]
    assert (attributes["class"], attributes["data-i"], shown) == ("x1", "1", "<")
    assert attributes["aria-label"] == "<: expert 1" and attributes["role"] == "listitem"
    joined_up = [(a["data-i"], a["data-n"], text) for a, text in page.tokens if "data-n" in a]
    assert joined_up == [(str(GIVEN_TOKENS - 2), "2", "é")]  # two bytes, two tokens, one character
    number = len(experts.texts[0].seen.token_ids_U)
    assert page.tokens[number - 1][0]["data-i"] == str(number)  # the second text goes on counting


def test_tokens_that_look_like_tags_and_quotes_are_text_in_the_page_and_in_its_labels():
    text = "x<img src=1>x<script>" + MALICE
    tokenizer = train_tokenizer([text] * 50, 500)
    seen = made_up(tokenizer, text)
    assert {"<img", "<script"} <= {tokenizer.decode([index]) for index in seen.token_ids_U}
    page = Page(expert_page("a run", Experts(1, ("x",), tokenizer, None, (Text("x", seen),), {})))
    assert "".join(shown for _, shown in page.tokens) == "<|endoftext|>" + text
    assert all(attributes["aria-label"].startswith(f"{shown}: expert") for attributes, shown in page.tokens)


def test_the_page_carries_all_choices_of_all_layers(experts, page):
    data = json.loads(page.scripts[0])
    layers, tokens, width = data["shape"]
    seen = [text.seen for text in experts.texts]
    assert (layers, width, tokens) == (LAYERS, CHOICES, sum(len(each.token_ids_U) for each in seen))
    ids, gates = (
        np.frombuffer(base64.b64decode(data[name]), "<u2").reshape(data["shape"]) for name in ("ids", "gates")
    )
    for layer in range(LAYERS):
        given = seen[0].expert_ids_LUK[layer]
        np.testing.assert_array_equal(ids[layer, : len(given)], np.where(given < 0, NO_EXPERT, given))
    np.testing.assert_allclose(gates[:, -1] / GATE_UNIT, seen[1].gates_LUK[:, -1], atol=1e-3)


def oklab(colour):
    lightness, chroma, hue = colour
    return np.array([lightness, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))])


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("num_experts", [1, 2, 8, 16, 17, 64])
def test_colours_lie_apart(num_experts, dark):
    """A difference in OKLab of 0.02 is just noticeable."""
    found = np.array([oklab(colour) for colour in expert_colours(num_experts, dark=dark)])
    apart = np.linalg.norm(found[:, None] - found[None], axis=-1) + np.eye(num_experts)
    assert apart.min() > 0.04
    assert len({round(hue) for _, _, hue in expert_colours(64, dark=dark)}) == 64
    assert expert_colours(70, dark=dark)[64:] == expert_colours(70, dark=dark)[:6]


def test_the_report_has_a_chart_of_each_kind_and_the_tokens_of_each_expert(experts):
    shown = choices(experts, has_page=True)
    titles = ["Router saturation", "Co-activation", *(f"Specialisation by {name}" for name in experts.groups())]
    assert [chart.title for chart in shown.charts] == titles
    assert all("<svg" in chart.svg for chart in shown.charts)
    assert "code (82), prose (136)" in shown.charts[2].caption
    assert shown.tables.count("<details>") == LAYERS
    assert "<code>␣</code>" in shown.tables


def test_one_checkpoint_says_so_instead_of_a_line(experts):
    alone = Experts(40, experts.source_names, experts.tokenizer, experts.held_out, (), {})
    chart = choice_figures(alone)[0]
    assert chart.svg == "" and "keep_last" in chart.caption


def test_switch_routing_has_no_pairs(experts):
    seen = experts.held_out
    one = Capture(seen.token_ids_U, seen.source_ids_U, seen.positions_U, *(
        values[..., :1] for values in (seen.expert_ids_LUK, seen.gates_LUK)
    ), EXPERTS)  # fmt: skip
    switch = Experts(40, experts.source_names, experts.tokenizer, one, (), experts.saturation)
    assert "Co-activation" not in [chart.title for chart in choice_figures(switch)]
    assert to_document(switch)["strongest_pair"] == [None] * LAYERS


def test_the_document_has_numbers_by_layer(experts):
    document = json.loads(json.dumps(to_document(experts), allow_nan=False))
    assert document["tokens"] == 82 + 136 and document["step"] == 40
    assert document["dead_experts"] == [[EXPERTS - 1]] * LAYERS
    assert document["saturation"] == {"10": [0.2, 0.4, 0.6], "20": pytest.approx([0.5, 0.7, 0.9])}
    assert document["texts"] == [{"name": "a <b>name</b>", "tokens": 900, "shown": GIVEN_TOKENS}]
    assert set(document["specialization"]) == {"source", "token class", "position"}
    assert all(0 <= number <= 1 for layers in document["specialization"].values() for number in layers)
    assert "dead experts 3" in format_document(document) and "step 20: 70.0%" in format_document(document)


def test_without_held_out_text_given_text_is_shown_all_the_same(experts):
    bare = Experts(40, experts.source_names, experts.tokenizer, None, experts.texts[:1], {})
    assert choices(bare, has_page=True).charts == ()
    assert "nothing to say" in format_document(to_document(bare))
    assert MALICE in "".join(text for _, text in Page(expert_page("bare", bare)).tokens)


def test_pieces_join_the_bytes_of_a_character_and_nothing_else(tokenizer):
    end = tokenizer.end_of_text
    ids = np.array([end, *tokenizer.encode("aé🎉"), *tokenizer.encode("é")[:1], end, *tokenizer.encode("é")[1:]])
    found = pieces(ids, np.arange(len(ids)), tokenizer)
    assert [(piece.first, piece.count, piece.text) for piece in found] == [
        (0, 1, "<|endoftext|>"), (1, 1, "a"), (2, 2, "é"), (4, 4, "🎉"),
        (8, 1, "\ufffd"), (9, 1, "<|endoftext|>"), (10, 1, "\ufffd"),
    ]  # fmt: skip
    cut = pieces(ids[4:6], np.array([7, 0]), tokenizer)  # another document begins amid the character
    assert [(piece.first, piece.count) for piece in cut] == [(0, 1), (1, 1)]
    assert [piece.special for piece in found] == [True, *[False] * 4, True, False]


def test_every_token_is_in_one_piece_of_any_text():
    tokenizer = train_tokenizer(["naïve café 日本語 🎉🎉 text"] * 30, 300)
    draw = np.random.default_rng(0)
    for _ in range(20):
        ids = draw.integers(0, tokenizer.vocab_size, 50)
        found = pieces(ids, np.arange(50), tokenizer)
        assert [piece.first for piece in found] == np.cumsum([0, *(piece.count for piece in found)])[:-1].tolist()
        assert sum(piece.count for piece in found) == 50
    ids = np.array(tokenizer.encode("naïve 日本 🎉"))
    assert "".join(piece.text for piece in pieces(ids, np.arange(len(ids)), tokenizer)) == "naïve 日本 🎉"


def test_an_expert_of_one_token_makes_no_strongest_pair(experts):
    """Layer of 4 experts: 0 and 1 share half of their tokens, the only token of 3 also went to 2."""
    ids_UK = np.array([[0, 1]] * 20 + [[0, 2]] * 20 + [[1, 2]] * 20 + [[3, 2]])
    many = len(ids_UK)
    seen = Capture(*np.zeros((3, many), int), ids_UK[None], np.ones((1, many, 2)), 4)
    given = Experts(1, experts.source_names, experts.tokenizer, seen, (), {})
    (pair,) = to_document(given)["strongest_pair"]
    assert pair["of"] != 3 and pair["share"] == pytest.approx(0.5, abs=0.02)
