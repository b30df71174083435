"""A live table of a sweep: how many cells are done, which are running and how far, which have failed and why."""

from __future__ import annotations

import collections
import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gpt4moe.sweep.cells import Cell
from gpt4moe.sweep.worker import run_folder, state_of

MOST_ROWS = 30
TAIL_BYTES = 16_384
ORDER = ("running", "failed", "stopped", "waiting", "done")


@contextlib.contextmanager
def table(cells: Sequence[Cell], folder: pathlib.Path, *, enabled: bool) -> Iterator[Callable[[], None]]:
    """Yields a function that redraws the table on stderr; no terminal: a line for each cell that ends."""
    console = Console(stderr=True)
    if not enabled:
        yield lambda: None
    elif console.is_terminal:
        with Live(console=console, refresh_per_second=2, transient=False) as live:
            yield lambda: live.update(_drawn(cells, folder))
    else:
        ended: set[str] = set()
        yield lambda: _say_ended(console, cells, folder, ended)


def _say_ended(console: Console, cells: Sequence[Cell], folder: pathlib.Path, ended: set[str]) -> None:
    for cell in cells:
        state = state_of(run_folder(folder, cell.id))
        if cell.id not in ended and state["state"] in ("done", "failed"):
            ended.add(cell.id)
            line = f"{len(ended)} of {len(cells)}: {_named(cell)}: {state['state']}"
            console.print(
                f"{line} ({state['reason']})" if state.get("reason") else line, highlight=False, soft_wrap=True
            )


def _drawn(cells: Sequence[Cell], folder: pathlib.Path) -> Group:
    states = {cell.id: state_of(run_folder(folder, cell.id)) for cell in cells}
    counts = collections.Counter(state["state"] for state in states.values())
    said = ", ".join(f"{counts[state]} {state}" for state in reversed(ORDER) if counts[state])
    drawn = Table(box=None, pad_edge=False)
    for title in ("cell", "state", "step", "loss", "held out", "minutes"):
        drawn.add_column(title, justify="left" if title in ("cell", "state") else "right")
    shown = sorted(cells, key=lambda cell: ORDER.index(states[cell.id]["state"]))
    for cell in shown[:MOST_ROWS]:
        state = states[cell.id]
        last = _last_row(run_folder(folder, cell.id))
        held_out = [value for key, value in last.items() if key.startswith("eval/") and key.endswith("/loss")]
        drawn.add_row(
            _named(cell),
            state.get("reason") or state["state"],
            str(last.get("step", "")),
            _number(last.get("loss")),
            _number(sum(held_out) / len(held_out) if held_out else None),
            _number(state["seconds"] / 60 if state.get("seconds") else None, ".1f"),
        )
    rest = len(cells) - MOST_ROWS
    return Group(Text(f"{len(cells)} cells: {said}"), drawn, Text(f"and {rest} more" if rest > 0 else ""))


def _named(cell: Cell) -> str:
    values = {**cell.point, **cell.derived, "seed": cell.seed}
    return ", ".join(f"{name.rsplit('.', 1)[-1]}={_short(value)}" for name, value in values.items())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def _last_row(folder: pathlib.Path) -> dict:
    """The newest values of `metrics.jsonl`, from its end."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
        lines = file.read().decode(errors="ignore").splitlines()
    last: dict = {}
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            last |= json.loads(line)
    return last
