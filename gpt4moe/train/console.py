"""What a person sees of a run while it goes: lines and a progress bar on stderr, of several processes the first's."""

from __future__ import annotations

import sys

import jax
import tqdm

# The progress bar's pace where stderr is a file, a job's log say.
SECONDS_BETWEEN_LOG_LINES = 30


def say(line: str) -> None:
    """Prints one line, above the progress bar where there is one."""
    if jax.process_index() == 0:
        tqdm.tqdm.write(line, file=sys.stderr)


def progress_bar(total: int, done: int, shown: bool) -> tqdm.tqdm:
    """Returns a bar over tokens, `done` of `total` so far."""
    hidden = not shown or jax.process_index() > 0
    form = "{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} tokens, {elapsed}<{remaining}{postfix}"
    every = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LOG_LINES
    return tqdm.tqdm(total=total, initial=done, unit_scale=True, disable=hidden, bar_format=form, mininterval=every)
