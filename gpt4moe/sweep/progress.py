"""A live table of a sweep: how many cells are done, which are running and how far, which have failed and why."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gpt4moe.sweep.cells import Cell
from gpt4moe.sweep.worker import is_pending, run_folder, state_of

MOST_ROWS = 30
TAIL_BYTES = 65_536
ORDER = ("running", "failed", "stopped", "waiting", "done")


@contextlib.contextmanager
def table(cells: Sequence[Cell], folder: pathlib.Path, retries: int, *, enabled: bool) -> Iterator[Callable[[], None]]:
    """Yields a function that redraws the table on stderr; no terminal: a line for each cell that ends.

    retries: how often a cell that failed is tried again before it counts as ended.
    """
    console = Console(stderr=True)
    if not enabled:
        yield lambda: None
        return
    clock = Clock(time.time(), retries, frozenset(ended_cells(states_of(cells, folder), retries)))
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2, transient=False) as live:
            yield lambda: live.update(drawn(cells, folder, clock))
    else:
        said: set[str] = set()
        yield lambda: _say_ended(console, cells, folder, said, clock)


@dataclasses.dataclass(frozen=True)
class Clock:
    """When a sweep went on, how often it tries again, and which of its cells had ended then."""

    began: float
    retries: int
    ended: Set[str]

    def said(self, states: Mapping[str, dict], now: float) -> str:
        """How long it has gone on, and how long it will by the cells that have ended meanwhile."""
        text = f"{_minutes(now - self.began)} so far"
        ended = ended_cells(states, self.retries)
        running = sum(state["state"] == "running" for state in states.values())
        left = len(states) - len(ended) - running / 2  # on average they are half done
        since = len(ended - self.ended)
        return f"{text}, about {_minutes((now - self.began) / since * left)} left" if since and left else text


def drawn(cells: Sequence[Cell], folder: pathlib.Path, clock: Clock) -> Group:
    """The table: a line of totals, then cells, those that run or have failed first."""
    states = states_of(cells, folder)
    now = time.time()
    names = _telling(cells)
    rows = Table(box=None, pad_edge=False)
    for name in names:
        rows.add_column(name.rsplit(".", 1)[-1].replace("_", "\n"), overflow="fold")
    for title in ("state", "tokens", "loss", "held out", "time"):
        left = {"justify": "left", "min_width": len("waiting")}
        rows.add_column(title, **left if title == "state" else {"justify": "right", "no_wrap": True})
    shown = sorted(((cell, states[cell.id]) for cell in cells), key=lambda pair: ORDER.index(pair[1]["state"]))
    for cell, state in shown[:MOST_ROWS]:
        work = run_folder(folder, cell.id)
        last = _last_row(work)
        tokens = f"{last['tokens']:,}" if "tokens" in last else ""
        values = _values(cell)
        rows.add_row(
            *(_short(values.get(name)) for name in names),
            _said(state),
            *(tokens, _number(last.get("loss")), _number(_held_out(last)), _spent(work, state, now)),
        )
    rest = len(cells) - MOST_ROWS
    counts = collections.Counter(state["state"] for state in states.values())
    said = ", ".join(f"{counts[state]} {state}" for state in reversed(ORDER) if counts[state])
    top = Text(f"{len(cells)} cells: {said}; {clock.said(states, now)}")
    return Group(top, rows, *([Text(f"and {rest} more")] if rest > 0 else []))


def _say_ended(console: Console, cells: Sequence[Cell], folder: pathlib.Path, said: set[str], clock: Clock) -> None:
    states = states_of(cells, folder)
    ended = ended_cells(states, clock.retries)
    for cell in cells:
        if cell.id in ended - said:
            said.add(cell.id)
            state = states[cell.id]
            line = f"{len(said)} of {len(cells)}: {_named(cell)}: {state['state']}"
            if state.get("reason"):
                line = f"{line} ({state['reason']})"
            if state["state"] == "done" and (loss := _held_out(_last_row(run_folder(folder, cell.id)))) is not None:
                line = f"{line}, held-out loss {loss:.4f}"
            console.print(f"{line}; {clock.said(states, time.time())}", highlight=False, soft_wrap=True)


def states_of(cells: Sequence[Cell], folder: pathlib.Path) -> dict[str, dict]:
    """How far each cell is, by its id."""
    return {cell.id: state_of(run_folder(folder, cell.id)) for cell in cells}


def ended_cells(states: Mapping[str, dict], retries: int) -> set[str]:
    """The cells that are done, or that are not tried again."""
    return {name for name, state in states.items() if not is_pending(state, retries)}


def _said(state: dict) -> str:
    """The reason of what failed, or the state."""
    reason = state.get("reason")
    return f"done: {reason}" if reason and state["state"] == "done" else reason or state["state"]


def _values(cell: Cell) -> dict:
    return {**cell.point, **cell.derived, "seed": cell.seed}


def _telling(cells: Sequence[Cell]) -> list[str]:
    """The names whose values differ between cells; all where there is one cell."""
    names = list(dict.fromkeys(name for cell in cells for name in _values(cell)))
    return [name for name in names if len({repr(_values(cell).get(name)) for cell in cells}) > 1] or names


def _named(cell: Cell) -> str:
    return ", ".join(f"{name.rsplit('.', 1)[-1]}={_short(value)}" for name, value in _values(cell).items())


def _short(value: object) -> str:
    if isinstance(value, str) and value.startswith("@"):
        return value.rsplit(".", 1)[-1].removeprefix("@")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _held_out(last: dict) -> float | None:
    """The held-out loss over all tokens of the sources that are trained on: those have a training loss."""
    sources = [key.removeprefix("loss/") for key in last if key.startswith("loss/")]
    losses = [last[f"eval/{source}/loss"] for source in sources if f"eval/{source}/loss" in last]
    tokens = [last[f"eval/{source}/tokens"] for source in sources if f"eval/{source}/loss" in last]
    if not losses or None in losses:
        return None
    return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)


def _spent(work: pathlib.Path, state: dict, now: float) -> str:
    """The time of all attempts; that of a running one goes on since it was written."""
    seconds = state.get("seconds")
    if state["state"] == "running":
        seconds = (seconds or 0.0) + now - (work / "cell.json").stat().st_mtime
    return "" if seconds is None else _minutes(seconds)


def _minutes(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


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
