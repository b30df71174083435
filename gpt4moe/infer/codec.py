"""What generation needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Codec(Protocol):
    """Text to ids and back; `gpt4moe.data.tokenizer.Tokenizer` is one.

    `token_bytes` are the bytes of every id, None where the text of an id depends on those before it.
    """

    end_of_text: int
    image: int | None
    token_bytes: list[bytes] | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...
