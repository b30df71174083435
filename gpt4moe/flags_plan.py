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


def _served_flags(parser: argparse.ArgumentParser) -> None:
    """What the words about serving share: the model, the chip, the layout's fixed parts, shares of the peaks."""
    add = parser.add_argument
    add("--shape", metavar="NAME", help="a published shape instead of --gin_file, such as mixtral_8x7b")
    add("--chip", default="h100", metavar="NAME", help="such as a100_40, h100, tpu_v5p; default %(default)s")
    add("--context", type=int, default=2048, metavar="TOKENS", help="mean tokens of a row's cache; default %(default)s")
    add("--matmul_efficiency", type=float, default=0.6, metavar="SHARE", help="of the peak FLOP/s; default %(default)s")
    add("--memory_efficiency", type=float, default=0.8, metavar="SHARE", help="of the bandwidth; default %(default)s")
    add("--link_efficiency", type=float, default=0.75, metavar="SHARE", help="of fast links; default %(default)s")
    for axis, meaning in (("tensor", "chips that share each matrix"), ("stage", "stages"), ("expert", "expert groups")):
        add(f"--{axis}", type=int, metavar="SIZE", help=f"fix this axis of the layout: {meaning}")


def _serve_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _served_flags(parser)
    add("--num_chips", type=int, default=128, metavar="N", help="chips there are; default %(default)s")
    add("--price", type=float, metavar="DOLLARS", help="of a chip's hour; default: on demand, from the table")
    add("--weights", default="bfloat16", metavar="FORMATS", help="of bfloat16, int8, fp8, with commas between")
    add("--cache", choices=("heads", "batch"), help="how keys and values lie over the tensor axis; default: the better")
    add("--batch", type=int, metavar="ROWS", help="rows of one pipeline microbatch; default: all that fit are tried")
    add("--prompt_tokens", type=int, default=1024, metavar="TOKENS", help="mean prompt; default %(default)s")
    add("--new_tokens", type=int, default=256, metavar="TOKENS", help="mean answer; default %(default)s")
    add("--utilization", type=float, default=1.0, metavar="SHARE", help="mean load over full load; default %(default)s")
    add("--min_speed", type=float, metavar="TOKENS", help="tokens a second that every user must get")
    add("--plot", metavar="FILE.png", help="draw the frontier")
    add("--simulate", action="store_true", help="simulate the cheapest layout (of at least --min_speed) under traffic")
    simulated = parser.add_argument_group("simulation")
    add = simulated.add_argument
    add("--requests", type=int, default=1000, metavar="N", help="how many come; default %(default)s")
    add("--requests_per_second", type=float, metavar="RATE", help="default: 70 %% of what the replicas serve")
    add("--lengths", default="exponential", metavar="KIND", help="fixed, uniform, exponential, lognormal")
    add("--batching", default="continuous", choices=("continuous", "static"), help="default %(default)s")
    add(
        "--prefill_chips",
        type=int,
        metavar="N",
        help="chips that read prompts only; default: all do, in chunks",
    )
    add("--expected_routing", action="store_true", help="steps of expected routing, not of sampled tokens")
    add("--day", metavar="RATES", help="'cosine' or 24 relative rates with commas: a day, its trough lent to training")
    add("--hour_seconds", type=float, default=120.0, metavar="S", help="of a simulated hour; default %(default)s")
    add("--seed", type=int, default=0, help="default %(default)s")


def _speculate_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _served_flags(parser)
    add("--acceptance", type=float, default=0.7, metavar="CHANCE", help="of each draft token; default %(default)s")
    add("--draft_cost", type=float, default=0.05, metavar="SHARE", help="draft step over a step; default %(default)s")
    add("--draft_tokens", type=int, default=4, metavar="N", help="draft length; default %(default)s")
    add("--batch", default="1,4,8,16,32,64,128,256", metavar="ROWS", help="with commas between; default %(default)s")
    add("--weights", default="bfloat16", metavar="FORMAT", help="bfloat16, int8 or fp8; default %(default)s")


WORDS: dict[str, Word] = {
    "serve": Word("layouts, speed and dollars of serving a model; simulates it", _serve_flags, reads_gin=True),
    "speculate": Word("what speculative decoding gains, batch by batch", _speculate_flags, reads_gin=True),
}
