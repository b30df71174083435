"""One-line configuration errors: the setting, its value, the constraint and the mend."""

from __future__ import annotations


class CallerError(ValueError):
    """A mistake of the caller's, told in one line: the setting, its value, the constraint, the mend (exit code 2)."""


class RunError(RuntimeError):
    """A fault of the run or of the machine, told in one line: what failed, what still stands (exit code 1)."""


def require(condition: bool, setting: str, value: object, constraint: str, mend: str = "") -> None:
    """Raises a one-line `CallerError` naming setting, value, constraint and mend unless `condition` holds."""
    if not condition:
        raise CallerError(f"{setting}={value!r} {constraint}" + (f"; {mend}" if mend else ""))


def require_positive(setting: str, value: int | float | None) -> None:
    """Raises unless `value` is a number above zero."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(number and value > 0, setting, value, "must be a number above 0")


def require_count(setting: str, value: int) -> None:
    """Raises unless `value` is an integer of at least one."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    require(integer and value >= 1, setting, value, "must be an integer of at least 1")


def require_fraction(setting: str, value: float) -> None:
    """Raises unless `value` lies in [0, 1]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(number and 0 <= value <= 1, setting, value, "must lie between 0 and 1")
