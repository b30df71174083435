"""The class of every token of a text: its bytes, and for words what came before, in; a `Groups` out."""

from __future__ import annotations

import unicodedata

import numpy as np

from gpt4moe.analysis.specialization import Groups
from gpt4moe.data.tokenizer import Tokenizer

CODE_SYMBOLS = frozenset("{}[]<>=+*/\\|&^%$#@~_`")
CLASSES = (
    "special",
    "whitespace",
    "word start",
    "word continuation",
    "digits",
    "code symbols",
    "punctuation",
    "other symbols",
    "part of a character",
)


def by_class(token_ids_U: np.ndarray, positions_U: np.ndarray, tokenizer: Tokenizer) -> Groups:
    """Tokens by their class, only classes that occur.

    A token with letters is a word; else the first of digits, code symbols, punctuation, other symbols, whitespace that
    it holds. Letters that follow directly on a letter continue a word.
    """
    ids_G, place_U = np.unique(token_ids_U, return_inverse=True)
    texts = [_text(tokenizer, int(index)) for index in ids_G]
    class_U = np.array([CLASSES.index(_class(text)) for text in texts], np.int64)[place_U]
    begins_U = np.array([bool(text) and text[0].isalpha() for text in texts])[place_U]
    ends_U = np.array([bool(text) and text[-1].isalpha() for text in texts])[place_U]
    follows_U = np.concatenate([[False], ends_U[:-1]]) & (positions_U > 0)
    continues_U = begins_U & follows_U & (class_U == CLASSES.index("word start"))
    class_U = np.where(continues_U, CLASSES.index("word continuation"), class_U)
    return Groups(CLASSES, class_U).without_empty()


def _text(tokenizer: Tokenizer, index: int) -> str | None:
    """The text of a token, None where its bytes are no whole characters."""
    try:
        return tokenizer.decode_bytes([index]).decode()
    except UnicodeDecodeError:
        return None


def _class(text: str | None) -> str:
    if text is None:
        return "part of a character"
    if not text:
        return "special"
    tests = {
        "word start": str.isalpha,
        "digits": str.isdigit,
        "code symbols": CODE_SYMBOLS.__contains__,
        "punctuation": lambda character: unicodedata.category(character)[0] == "P",
        "other symbols": lambda character: not character.isspace(),
    }
    return next((name for name, holds in tests.items() if any(map(holds, text))), "whitespace")
