"""Which assumption matters most: each moved up and down alone, everything else as it is; swings of the results out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from gpt4moe.config.check import require

Results = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Swing:
    """One assumption: its value, and what each result becomes with less and with more of it, relative to the base."""

    assumption: str
    value: float
    less: dict[str, float]
    more: dict[str, float]

    def width(self, result: str) -> float:
        """How far the two lie from each other."""
        return abs(self.more[result] - self.less[result])


def tornado(
    results: Callable[[Mapping[str, float]], Results], assumptions: Mapping[str, float], change: float = 0.2
) -> list[Swing]:
    """Returns a swing for every assumption, the one that moves the first result most first.

    results: what the assumptions lead to; change: 0.2 for 20 % less and 20 % more.
    """
    require(0 < change < 1, "change", change, "must lie between 0 and 1")
    base = results(assumptions)

    def relative(name: str, factor: float) -> dict[str, float]:
        moved = results({**assumptions, name: assumptions[name] * factor})
        return {result: moved[result] / base[result] - 1 for result in base}

    swings = [
        Swing(name, assumptions[name], relative(name, 1 - change), relative(name, 1 + change)) for name in assumptions
    ]
    first = next(iter(base))
    return sorted(swings, key=lambda swing: (-swing.width(first), -sum(map(swing.width, base))))


def format_swings(swings: Sequence[Swing], change: float) -> str:
    """Returns the swings as a table to read, with both ends of each result."""
    names = list(swings[0].less) if swings else []
    lines = [
        f"{'assumption, -' + format(change, '.0%') + ' and +' + format(change, '.0%'):<40}"
        + "".join(f"{name:>26}" for name in names)
    ]
    for swing in swings:
        ends = "".join(f"{swing.less[name]:>+17.1%} {swing.more[name]:>+8.1%}" for name in names)
        lines.append(f"{swing.assumption:<26}{swing.value:>14.6g}{ends}")
    return "\n".join(lines)
