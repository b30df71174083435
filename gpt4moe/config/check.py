"""One-line configuration errors: the setting, its value, the constraint and the mend."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class CallerError(ValueError):
    """A mistake of the caller's, told in one line: the setting, its value, the constraint, the mend (exit code 2)."""


class RunError(RuntimeError):
    """A fault of the run or of the machine, told in one line: what failed, what still stands (exit code 1)."""


def require(condition: bool, setting: str, value: object, constraint: str, mend: str = "") -> None:
    """Raises a one-line `CallerError` naming setting, value, constraint and mend unless `condition` holds."""
    if not condition:
        raise CallerError(f"{setting}={value!r} {constraint}" + (f"; {mend}" if mend else ""))


def one_line(error: BaseException) -> str:
    """Returns the first line of what an error says, its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def require_instance(setting: str, value: object, kind: type, *, optional: bool = False) -> None:
    """Raises unless `value` is a `kind`, or None where it is `optional`; a class itself is `@kind` without its `()`."""
    if isinstance(value, type):
        name = f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
        raise CallerError(f"{setting}=@{value.__name__} is a class, not one of its objects; write @{name}()")
    article = "an" if kind.__name__[0] in "AEIO" else "a"
    constraint = f"must be {article} {kind.__name__}" + (" or None" if optional else "")
    require(isinstance(value, kind) or (optional and value is None), setting, value, constraint)


def require_number(setting: str, value: int | float) -> None:
    """Raises unless `value` is a finite number."""
    require(_is_number(value), setting, value, "must be a finite number")


def near(name: str, known: Iterable[str]) -> str:
    """Returns, for a message, the known names that begin as `name` does, else the most alike, else all of them."""
    known, typed = list(known), name.lower().replace("-", "_")
    begun = [item for item in known if typed and item.startswith(typed)]
    return ", ".join(begun or difflib.get_close_matches(typed, known, n=3, cutoff=0.3) or known)


def require_positive(setting: str, value: int | float | None) -> None:
    """Raises unless `value` is a finite number above zero."""
    require(_is_number(value) and value > 0, setting, value, "must be a number above 0")


def require_not_negative(setting: str, value: int | float) -> None:
    """Raises unless `value` is a finite number of at least zero."""
    require(_is_number(value) and value >= 0, setting, value, "must be a number of at least 0")


def require_fraction(setting: str, value: float) -> None:
    """Raises unless `value` lies in [0, 1]."""
    require(_is_number(value) and 0 <= value <= 1, setting, value, "must lie between 0 and 1")


def require_count(setting: str, value: int, least: int = 1) -> None:
    """Raises unless `value` is an integer of at least `least`."""
    require(_is_integer(value) and value >= least, setting, value, f"must be an integer of at least {least}")


def require_seed(setting: str, value: int) -> None:
    """Raises unless `value` seeds a random key: 32 bits."""
    fits = _is_integer(value) and 0 <= value < 2**32
    require(fits, setting, value, "must be an integer from 0 to 2**32 - 1")


def require_flag(setting: str, value: bool) -> None:
    """Raises unless `value` is True or False; a word would count as True."""
    require(isinstance(value, bool), setting, value, "must be True or False")


def require_text(setting: str, value: str | None) -> None:
    """Raises unless `value` is text that is not empty, or None."""
    text = value is None or (isinstance(value, str) and bool(value.strip()))
    require(text, setting, value, "must be text that is not empty", "quote it")


def require_texts(setting: str, values: object) -> tuple[str, ...]:
    """Returns one text or several as a tuple; raises unless each is text that is not empty."""
    values = (values,) if isinstance(values, str) else values
    listed = isinstance(values, (tuple, list)) and all(isinstance(item, str) and item.strip() for item in values)
    require(listed, setting, values, "must be text, or a list of texts that are not empty")
    return tuple(values)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))
