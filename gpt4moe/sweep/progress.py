"""A live table of a sweep: how many cells are done, which are running and how far, which have failed and why."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gpt4moe.sweep.cells import Cell
from gpt4moe.sweep.worker import run_folder, state_of

MOST_ROWS = 30
TAIL_BYTES = 65_536
ORDER = ("running", "failed", "stopped", "waiting", "done")


@contextlib.contextmanager
def table(cells: Sequence[Cell], folder: pathlib.Path, *, enabled: bool) -> Iterator[Callable[[], None]]:
    """Yields a function that redraws the table on stderr; no terminal: a line for each cell that ends."""
    console = Console(stderr=True)
    if not enabled:
        yield lambda: None
        return
    clock = Clock(time.time(), _num_ended(_states(cells, folder)))
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2, transient=False) as live:
            yield lambda: live.update(drawn(cells, folder, clock))
    else:
        ended: set[str] = set()
        yield lambda: _say_ended(console, cells, folder, ended, clock)


@dataclasses.dataclass(frozen=True)
class Clock:
    """When a sweep went on, and how many of its cells had ended then."""

    began: float
    num_ended: int

    def said(self, states: Sequence[dict], now: float) -> str:
        """How long it has gone on, and how long it will by the cells that have ended meanwhile."""
        text = f"{_minutes(now - self.began)} so far"
        ended = _num_ended(states) - self.num_ended
        running = sum(state["state"] == "running" for state in states)
        left = len(states) - _num_ended(states) - running / 2  # on average they are half done
        return f"{text}, about {_minutes((now - self.began) / ended * left)} left" if ended and left else text


def drawn(cells: Sequence[Cell], folder: pathlib.Path, clock: Clock) -> Group:
    """The table: a line of totals, then cells, those that run or have failed first."""
    states = _states(cells, folder)
    now = time.time()
    names = _telling(cells)
    rows = Table(box=None, pad_edge=False)
    for name in names:
        rows.add_column(name.rsplit(".", 1)[-1].replace("_", "\n"), overflow="fold")
    for title in ("state", "tokens", "loss", "held out", "time"):
        left = {"justify": "left", "min_width": len("waiting")}
        rows.add_column(title, **left if title == "state" else {"justify": "right", "no_wrap": True})
    shown = sorted(zip(cells, states, strict=True), key=lambda pair: ORDER.index(pair[1]["state"]))
    for cell, state in shown[:MOST_ROWS]:
        work = run_folder(folder, cell.id)
        last = _last_row(work)
        tokens = f"{last['tokens']:,}" if "tokens" in last else ""
        values = _values(cell)
        rows.add_row(
            *(_short(values.get(name)) for name in names),
            state.get("reason") or state["state"],
            *(tokens, _number(last.get("loss")), _number(_held_out(last)), _spent(work, state, now)),
        )
    rest = len(cells) - MOST_ROWS
    counts = collections.Counter(state["state"] for state in states)
    said = ", ".join(f"{counts[state]} {state}" for state in reversed(ORDER) if counts[state])
    top = Text(f"{len(cells)} cells: {said}; {clock.said(states, now)}")
    return Group(top, rows, *([Text(f"and {rest} more")] if rest > 0 else []))


def _say_ended(console: Console, cells: Sequence[Cell], folder: pathlib.Path, ended: set[str], clock: Clock) -> None:
    states = _states(cells, folder)
    for cell, state in zip(cells, states, strict=True):
        if cell.id not in ended and state["state"] in ("done", "failed"):
            ended.add(cell.id)
            line = f"{len(ended)} of {len(cells)}: {_named(cell)}: {state['state']}"
            if state.get("reason"):
                line = f"{line} ({state['reason']})"
            elif (held_out := _held_out(_last_row(run_folder(folder, cell.id)))) is not None:
                line = f"{line}, held-out loss {held_out:.4f}"
            console.print(f"{line}; {clock.said(states, time.time())}", highlight=False, soft_wrap=True)


def _states(cells: Sequence[Cell], folder: pathlib.Path) -> list[dict]:
    return [state_of(run_folder(folder, cell.id)) for cell in cells]


def _num_ended(states: Sequence[dict]) -> int:
    return sum(state["state"] in ("done", "failed") for state in states)


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
    """The mean held-out loss of the sources that are trained on: those have a training loss."""
    losses = [value for key, value in last.items() if key.startswith("eval/") and key.endswith("/loss")
              and f"loss/{key.split('/')[1]}" in last and value is not None]  # fmt: skip
    return sum(losses) / len(losses) if losses else None


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
