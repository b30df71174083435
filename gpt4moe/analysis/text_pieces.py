"""Token ids in, the pieces of text that they can be shown as out: whole characters, special tokens by name."""

from __future__ import annotations

import codecs
import dataclasses

import numpy as np

from gpt4moe.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """The text of `count` tokens from `first` on: more than one where a character is spread over them."""

    first: int
    count: int
    text: str
    special: bool = False


def pieces(token_ids_U: np.ndarray, positions_U: np.ndarray, tokenizer: Tokenizer) -> list[Piece]:
    """Every token in exactly one piece, in order; bytes that are no character become the replacement character.

    A character does not reach over a special token or into what begins at position 0.
    """
    names = {index: name for name, index in tokenizer.specials.items()}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found, first, text = [], 0, ""
    ids = token_ids_U.tolist()
    for place, index in enumerate(ids):
        if place > first and (index in names or positions_U[place] == 0):
            found.append(Piece(first, place - first, text + decoder.decode(b"", final=True)))
            first, text = place, ""
        if index in names:
            found.append(Piece(place, 1, names[index], special=True))
            first = place + 1
            continue
        text += decoder.decode(_bytes(tokenizer, ids, place))
        if not decoder.getstate()[0]:
            found.append(Piece(first, place + 1 - first, text))
            first, text = place + 1, ""
    rest = [Piece(first, len(ids) - first, text + decoder.decode(b"", final=True))] if first < len(ids) else []
    return found + rest


def _bytes(tokenizer: Tokenizer, ids: list[int], place: int) -> bytes:
    """The bytes that the token at `place` adds; a tokenizer not of bytes may join it to the one before by a space."""
    if tokenizer.token_bytes is not None or place == 0:
        return tokenizer.decode_bytes(ids[place : place + 1])
    before, both = tokenizer.decode_bytes(ids[place - 1 : place]), tokenizer.decode_bytes(ids[place - 1 : place + 1])
    return both.removeprefix(before)
