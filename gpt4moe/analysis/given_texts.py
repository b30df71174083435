"""Texts that a person hands to a report: prompts and files in, text by the name that the page gives it out."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence

from gpt4moe.config.check import require


def given_texts(prompts: Sequence[str], files: Sequence[str]) -> dict[str, str]:
    """The texts of `--prompt` and of the files of `--text`, of which `-` is standard input, by their names.

    Raises `CallerError` for what is empty, no file or not UTF-8.
    """
    texts = {}
    for number, prompt in enumerate(prompts, 1):
        texts[f"prompt {number}"] = _as_text("--prompt", prompt, prompt.encode(errors="surrogateescape"))
    for path in files:
        texts["standard input" if path == "-" else path] = _as_text("--text", path, _bytes_of(path))
    return texts


def _bytes_of(path: str) -> bytes:
    """A file, or standard input."""
    if path == "-":
        return sys.stdin.buffer.read()
    require(os.path.isfile(path), "--text", path, "is not a file", "name a text file, or - for standard input")
    return pathlib.Path(path).read_bytes()


def _as_text(flag: str, name: str, raw: bytes) -> str:
    require(bool(raw), flag, name, "is empty", "give some text")
    is_text = raw.decode(errors="ignore").encode() == raw
    require(is_text, flag, name, "is not UTF-8", "convert it, as with iconv -t utf-8")
    return raw.decode()
