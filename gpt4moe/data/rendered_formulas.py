"""A source of formulas: random LaTeX of the kind that matplotlib's mathtext sets, and its picture."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from gpt4moe.config.check import require_count
from gpt4moe.data.documents import IMAGE_MARKER, Document
from gpt4moe.data.drawn import in_chunks
from gpt4moe.data.rendered import grey_png

LETTERS = (
    *"abcdefghkmnpqrstuvwxyzABCDEFGHKLMNPQRSTUVXYZ",
    r"\alpha",
    r"\beta",
    r"\gamma",
    r"\delta",
    r"\lambda",
    r"\mu",
)
LETTERS += (r"\pi", r"\rho", r"\sigma", r"\theta", r"\phi", r"\omega", r"\Gamma", r"\Delta", r"\Omega")
RELATIONS = ("=", "<", ">", r"\leq", r"\geq", r"\approx", r"\neq", r"\in", r"\subset")
OPERATORS = ("+", "-", r"\cdot", r"\times", "/")
FUNCTIONS = (r"\sin", r"\cos", r"\log", r"\exp", r"\max")
LARGE = (r"\sum", r"\int", r"\prod")
FONT_SETS = ("cm", "dejavusans", "dejavuserif", "stix", "stixsans")


@in_chunks(100)
def formulas(
    count: int = 20_000, seed: int = 0, depth: int = 1, size: int = 14, dpi: int = 100, margin: int = 4
) -> Iterator[Document]:
    """`count` equations nested up to `depth` in five sets of fonts, of any size; the transcript is the source.

    `size` is in points at `dpi`. In a batch give them `fit="pad"`, which keeps the signs in proportion.
    """
    from matplotlib import mathtext
    from matplotlib.font_manager import FontProperties

    require_count("formulas.depth", depth, least=0)
    rng = random.Random(f"formulas {seed}")
    parser = mathtext.MathTextParser("agg")
    for _ in range(count):
        source = f"{_expression(rng, depth)} {rng.choice(RELATIONS)} {_expression(rng, depth)}"
        drawn = parser.parse(f"${source}$", dpi, FontProperties(size=size, math_fontfamily=rng.choice(FONT_SETS)))
        ink = np.asarray(drawn.image)
        page = np.full((ink.shape[0] + 2 * margin, ink.shape[1] + 2 * margin), 255, np.uint8)
        page[margin : -margin or None, margin : -margin or None] -= ink
        yield Document(IMAGE_MARKER + source, images=(grey_png(Image.fromarray(page)),))


def _expression(rng: random.Random, depth: int) -> str:
    """One to three terms."""
    terms = [_term(rng, depth) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
    return "".join(f" {rng.choice(OPERATORS)} {term}" if index else term for index, term in enumerate(terms))


def _term(rng: random.Random, depth: int) -> str:
    kinds: tuple[Callable[[random.Random, int], str], ...] = (_atom, _scripted)
    if depth > 0:
        kinds += (_fraction, _root, _function, _large, _bracketed)
    return rng.choice(kinds)(rng, depth - 1)


def _atom(rng: random.Random, depth: int) -> str:
    return rng.choice((rng.choice(LETTERS), rng.choice(LETTERS), str(rng.randint(0, 99))))


def _scripted(rng: random.Random, depth: int) -> str:
    script = rng.choice(("^", "_"))
    both = rng.random() < 0.25
    other = f"{'_' if script == '^' else '^'}{{{_atom(rng, depth)}}}" if both else ""
    return f"{rng.choice(LETTERS)}{script}{{{_atom(rng, depth)}}}{other}"


def _fraction(rng: random.Random, depth: int) -> str:
    return rf"\frac{{{_expression(rng, depth)}}}{{{_expression(rng, depth)}}}"


def _root(rng: random.Random, depth: int) -> str:
    return rf"\sqrt{{{_expression(rng, depth)}}}"


def _function(rng: random.Random, depth: int) -> str:
    return f"{rng.choice(FUNCTIONS)}({_expression(rng, depth)})"


def _large(rng: random.Random, depth: int) -> str:
    letter = rng.choice("ijkn")
    return rf"{rng.choice(LARGE)}_{{{letter}=0}}^{{{_atom(rng, depth)}}} {_term(rng, depth)}"


def _bracketed(rng: random.Random, depth: int) -> str:
    return rf"\left( {_expression(rng, depth)} \right)"
