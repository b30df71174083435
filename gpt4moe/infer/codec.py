"""What generation needs of a tokenizer, and the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from gpt4moe.config.check import require
from gpt4moe.infer.pictures import split_at_images


class Codec(Protocol):
    """Text to ids and back; `gpt4moe.data.tokenizer.Tokenizer` is one.

    `token_bytes` are the bytes of every id, None where the text of an id depends on those before it.
    """

    begin_of_text: int
    end_of_text: int
    image: int | None
    token_bytes: list[bytes] | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...


def required(tokenizer: Codec | None) -> Codec:
    """The tokenizer of a work directory; `CallerError` where there is none."""
    mend = "put the tokenizer.json of the model's makers into the work directory"
    there = tokenizer is not None
    require(there, "tokenizer", None, "is missing: the work directory has no tokenizer.json", mend)
    return tokenizer


def prompt_ids(tokenizer: Codec, prompt: str, num_pictures: int = 0) -> list[int]:
    """The tokens of a prompt, which follows the token that documents begin with.

    Pictures stand where it says `<image>`, or before it. Raises `CallerError` for text that is not UTF-8, or that has
    not one marker a picture.
    """
    is_text = prompt.encode("utf-8", "ignore").decode() == prompt
    require(is_text, "prompt", prompt[:40], "holds bytes that are not UTF-8")
    before, *behind = split_at_images(prompt, num_pictures)
    ids = [tokenizer.begin_of_text, *tokenizer.encode(before)]
    for text in behind:
        ids += [tokenizer.image, *tokenizer.encode(text)]
    return ids
