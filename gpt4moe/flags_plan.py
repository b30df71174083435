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


def _validate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", metavar="FILE", help="measurements to compare with (default: the published ones)")
    parser.add_argument("--calibration", metavar="FILE", help="constants by stack and chip, of gpt4moe plan calibrate")


def _calibrate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", metavar="FILE", help="measurements to fit to (default: the published ones)")
    parser.add_argument("--workdir", action="append", default=[], metavar="DIR", help="a run of ours; may be repeated")
    parser.add_argument("--constants", type=int, choices=(1, 2, 3, 4), help="how many a stack (default: what pays)")
    parser.add_argument("--stack", metavar="STACK/CHIP", help="this one alone")
    parser.add_argument("--out", metavar="FILE", help="write the constants here, for --calibration")


WORDS: dict[str, Word] = {
    "validate": Word("predictions beside published measurements, per source", _validate_flags),
    "calibrate": Word("constants of a stack and chip from measured steps, with left-out error", _calibrate_flags),
}
