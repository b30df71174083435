"""The small file that `plan calibrate` writes and other words read with `--calibration`: constants by stack and chip.

In: a path. Out: `Entry`s by `stack/chip`, or a `Stack` with them. An unknown stack of a known chip stays as it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os

from gpt4moe.config.check import CallerError
from gpt4moe.plan.training.stacks import Stack

FORMAT = "gpt4moe calibration 1"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Factors of predicted seconds: of all, then of what computes, moves in memory, communicates, waits.

    rows: measurements they were fitted to. left_out_error: mean error of a row after a fit to the others, None for one.
    """

    seconds_scale: float
    compute_scale: float = 1.0
    memory_scale: float = 1.0
    communication_scale: float = 1.0
    idle_scale: float = 1.0
    rows: int = 0
    left_out_error: float | None = None


SCALES = ("seconds_scale", "compute_scale", "memory_scale", "communication_scale", "idle_scale")


def read_calibration(path: str | os.PathLike) -> dict[str, Entry]:
    """Returns the entries of a file by `stack/chip`; raises `CallerError` for a file that is none."""
    mend = "write one with gpt4moe plan calibrate --out FILE"
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CallerError(f"--calibration={os.fspath(path)!r} is not JSON ({error}); {mend}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CallerError(f"--calibration={os.fspath(path)!r} has no format {FORMAT!r}; {mend}")
    return {key: _entry(path, key, given) for key, given in document["stacks"].items()}


def _entry(path: str | os.PathLike, key: str, given: dict) -> Entry:
    known = {field.name for field in dataclasses.fields(Entry)}
    entry = Entry(**{name: value for name, value in given.items() if name in known})
    for name in SCALES:
        value = getattr(entry, name)
        if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
            raise CallerError(f"{os.fspath(path)}, {key}: {name}={value!r} must be a number of at least 0")
    return entry


def calibrated(stack: Stack, chip_name: str, calibration: dict[str, Entry]) -> Stack:
    """Returns the stack with the constants of its entry for this chip, itself where there is none."""
    entry = calibration.get(f"{stack.name}/{chip_name}")
    return dataclasses.replace(stack, **{name: getattr(entry, name) for name in SCALES}) if entry else stack
