"""What `gpt4moe plan WORD` runs: for each word the module that answers it, imported when it is asked."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from gpt4moe.config.model import ModelConfig
from gpt4moe.config.run import RunConfig

# Each module has `answer(args, build) -> (document, to_text)`.
MODULES: dict[str, str] = {
    "search": "words.search",
    "validate": "published.validate",
    "calibrate": "published.calibrate",
    "article": "words.article",
    "cost": "words.cost",
    "simulate": "words.simulate",
    "explain": "words.explain",
    "what-if": "words.what_if",
    "serve": "words.serve",
    "speculate": "words.speculate",
}


@dataclasses.dataclass(frozen=True)
class Build:
    """Makes what the gin files and overrides of the command line bind: a model, or a whole run with a model.

    saved: the run of a work directory, and its gin text.
    """

    model: Callable[[], ModelConfig]
    run: Callable[[], RunConfig]
    saved: Callable[[str], tuple[RunConfig, str]]


def answer(args: argparse.Namespace, build: Build) -> tuple[Any, Callable[[Any], str]]:
    """Returns the JSON document of one word and the function that makes text to read of it."""
    return importlib.import_module(f"gpt4moe.plan.{MODULES[args.word]}").answer(args, build)
