"""The words after `gpt4moe plan` and their flags; knows neither JAX nor gin, so that --help answers at once."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

DEFAULT_WORD = "search"


@dataclasses.dataclass(frozen=True)
class Word:
    """One word after `gpt4moe plan`: what its help says, its own flags, and whether it reads gin files."""

    summary: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    reads_gin: bool = False


def with_default_word(argv: list[str]) -> list[str]:
    """Returns the command line with the word that `gpt4moe plan` means when none is given."""
    if argv[:1] != ["plan"] or (len(argv) > 1 and (not argv[1].startswith("-") or argv[1] in ("-h", "--help"))):
        return argv
    return ["plan", DEFAULT_WORD, *argv[1:]]


def add_words(parser: argparse.ArgumentParser, add_gin_flags: Callable[[argparse.ArgumentParser], None]) -> None:
    """Gives `gpt4moe plan` its words; `add_gin_flags` are those that every command with a configuration has."""
    subparsers = parser.add_subparsers(dest="word", required=True, metavar="WORD")
    for name, word in WORDS.items():
        summary = f"gpt4moe plan {name}: {word.summary}."
        subparser = subparsers.add_parser(name, help=word.summary, description=summary, allow_abbrev=False)
        subparser.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else")
        if word.reads_gin:
            add_gin_flags(subparser)
        word.add_flags(subparser)


def _article_flags(parser: argparse.ArgumentParser) -> None:
    premise = "move a premise or a width of the model, e.g. gpu_memory_gb=80, num_experts=64; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=premise)
    page = "also write the audit with its figures as one HTML page"
    parser.add_argument("--report", metavar="FILE.html", help=page)


WORDS: dict[str, Word] = {
    "article": Word("audit the reference article, claim by claim", _article_flags, reads_gin=True),
}
