"""Text of tokens as they come: never half a character, nothing of what may become a stop text.

In: token ids, a few at a time. Out: text that stands, whatever comes after it.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gpt4moe.infer.codec import Codec

UNFINISHED = "\ufffd"


class TextStream:
    """The text of one continuation.

    `ended` is True once one of `stops` has appeared; the text is then all before it, and nothing more comes.
    """

    def __init__(self, tokenizer: Codec, stops: Sequence[str] = ()):
        self._pieces = _BytePieces(tokenizer) if tokenizer.token_bytes is not None else _WordPieces(tokenizer)
        self._stops, self._held = tuple(stops), ""
        self.ended = False

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids add, less what must wait."""
        return "" if self.ended else self._release(self._pieces.push(ids))

    def finish(self) -> str:
        """What waited, once no more ids come; bytes that are no character become the replacement character."""
        if self.ended:
            return ""
        text = self._release(self._pieces.finish())
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        text = self._held + text
        # The one that is whole first, so that it does not matter how many tokens come at once.
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.ended, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        split = len(text) - held
        self._held = text[split:]
        return text[:split]


class _BytePieces:
    """Every token is bytes of its own; bytes are text once their character is whole."""

    def __init__(self, tokenizer: Codec):
        self._tokenizer, self._decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WordPieces:
    """What a token adds depends on those before it (a blank between words): the difference to the text without it."""

    def __init__(self, tokenizer: Codec):
        self._tokenizer = tokenizer
        self._before, self._new, self._told = [], [], ""  # told: the text of the ids before, which has been given

    def push(self, ids: Sequence[int]) -> str:
        self._new += ids
        text = self._tokenizer.decode(self._before + self._new)
        return "" if text.endswith(UNFINISHED) else self._tell(text)

    def finish(self) -> str:
        return self._tell(self._tokenizer.decode(self._before + self._new))

    def _tell(self, text: str) -> str:
        added = text[len(self._told) :]
        self._before, self._new = self._new or self._before, []
        self._told = self._tokenizer.decode(self._before)
        return added


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
