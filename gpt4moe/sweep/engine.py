"""Runs a sweep in its folder: cells in, one finished or explained run for each of them out.

The folder holds `manifest.json` (one row a cell), `runs/ID/` (a work directory each), `stores/` (tokens, one for each
data configuration), `compiled/` (programs), and at the end `results.parquet` and `results.json`. Killed at any moment,
the same command goes on: cells that are done are kept, cut ones resume from their checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpt4moe.config.check import CallerError, RunError, one_line, require
from gpt4moe.config.data import DataConfig
from gpt4moe.config.sweep import SweepConfig
from gpt4moe.data.prepare import prepare
from gpt4moe.sweep import progress, results
from gpt4moe.sweep.cells import Build, Cell, make_cells
from gpt4moe.sweep.executors import Executor, Submitted, shielded, stop_all
from gpt4moe.sweep.worker import (
    Job,
    Task,
    explain,
    grant_attempts,
    hold,
    is_pending,
    refuse,
    run_folder,
    state_of,
    write_json,
)

POLL_SECONDS = 1.0
# So many processes in a row may end without having begun with any of their cells.
MOST_FRUITLESS = 3
KILLED = "the process that ran it was killed (out of memory?)"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep ready to run: its settings, its cells, its folder, and how a run is made of a cell's bindings."""

    config: SweepConfig
    cells: tuple[Cell, ...]
    folder: pathlib.Path
    build: Build

    @property
    def store(self) -> str:
        """Where tokens are kept, a folder for each set of sources and tokenizer."""
        return str(self.folder / "stores")


def plan(config: SweepConfig, build: Build, folder: str, say: Callable[[str], None]) -> Sweep:
    """Returns the sweep of a configuration in `folder`, of which nothing is written yet.

    Raises `CallerError` where no cell can be built at all, or the folder is not a local one.
    """
    mend = "copy the folder there when the sweep has ended"
    require("://" not in folder, "--workdir", folder, "must be a local folder, whose files processes can lock", mend)
    root = pathlib.Path(folder).absolute()
    is_run = (root / "metrics.jsonl").exists() and not (root / "manifest.json").exists()
    require(not is_run, "--workdir", folder, "is that of a run, not of a sweep", "give a folder of its own")
    cells = make_cells(config, build, say)
    built = [cell for cell in cells if cell.refused is None]
    if not built:
        raise CallerError(f"SweepConfig: none of {len(cells)} cells can be built, the first since {cells[0].refused}")
    return Sweep(config, tuple(cells), root, build)


def run(sweep: Sweep, executor: Executor, say: Callable[[str], None], *, show_table: bool = True) -> list[dict]:
    """Runs every cell that is not done, shows how far they are, and returns the results, one row a cell.

    Each call tries anew what failed before, unless it would fail in the same way again.
    """
    for cell in sweep.cells:
        if cell.refused is None:
            grant_attempts(run_folder(sweep.folder, cell.id))
        else:
            refuse(run_folder(sweep.folder, cell.id), cell.refused, final=True)
    write_manifest(sweep)
    _prepare_tokens(sweep, say)
    with progress.table(sweep.cells, sweep.folder, sweep.config.retries, enabled=show_table) as refresh:
        _work_off(sweep, executor, refresh, say)
    return results.write(sweep.folder, sweep.cells, sweep.build)


def _work_off(sweep: Sweep, executor: Executor, refresh: Callable[[], None], say: Callable[[str], None]) -> None:
    """Submits jobs until no cell is waiting or running; interrupted, has them save and passes it on."""
    jobs: list[Submitted] = []
    beginnings = _Beginnings(sweep)
    try:
        while True:
            for job in [job for job in jobs if job.done()]:
                jobs.remove(job)
                beginnings.ended(job)
            waiting = _waiting(sweep, jobs)
            for tasks in _grouped(waiting, sweep.config.runs_per_job, executor.parallel)[: executor.room(len(jobs))]:
                before = beginnings.states(tasks)
                with shielded():
                    jobs.append(executor.submit(_job(sweep, tasks)))
                beginnings.submitted(jobs[-1], before)
            refresh()
            write_manifest(sweep)
            if not jobs and not waiting and not _elsewhere(sweep):
                return
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        stop_all(jobs, say)
        write_manifest(sweep)
        raise


class _Beginnings:
    """Whether jobs begin with any of their cells: a broken environment would have them submitted again for ever."""

    def __init__(self, sweep: Sweep):
        self._folder, self._limit = sweep.folder, sweep.config.memory_limit_gb
        self._before: dict[int, list[dict[str, Any]]] = {}
        self._fruitless = 0

    def states(self, tasks: Iterable[Task]) -> list[dict[str, Any]]:
        """How far cells are."""
        return [state_of(run_folder(self._folder, task.id)) for task in tasks]

    def submitted(self, job: Submitted, before: list[dict[str, Any]]) -> None:
        """Takes a job and how far its cells were before it."""
        self._before[id(job)] = before

    def ended(self, job: Submitted) -> None:
        """Counts a job that has ended. Raises `RunError` where too many in a row have not begun."""
        unchanged = self.states(job.tasks) == self._before.pop(id(job))
        self._fruitless = self._fruitless + 1 if unchanged else 0
        if self._fruitless >= MOST_FRUITLESS:
            said = f"{self._fruitless} processes in a row ended before they began a run"
            hint = f", memory_limit_gb={self._limit:g} may be too small" if self._limit else ""
            raise RunError(f"{said}{hint}; see the logs in {self._folder / 'jobs'}")


def write_manifest(sweep: Sweep) -> None:
    """Leaves `manifest` in the folder of the sweep, with the names of each axis."""
    names = [axis.split(",") for axis, _ in (*sweep.config.axes, *sweep.config.random)]
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_json(sweep.folder / "manifest.json", {"axes": names, "cells": manifest(sweep)})


def manifest(sweep: Sweep) -> list[dict[str, Any]]:
    """One row a cell, whatever its state: what it is, how far it is, and the reason where it failed."""
    rows = []
    for cell in sweep.cells:
        state: dict[str, Any] = {"state": "failed", "reason": cell.refused, "attempts": 0}
        state = state if cell.refused else state_of(run_folder(sweep.folder, cell.id))
        row = {"id": cell.id, "point": dict(cell.point), "derived": dict(cell.derived), "seed": cell.seed}
        row |= {"overrides": cell.overrides, "deviations": dict(cell.deviations)}
        rows.append(row | {name: state.get(name) for name in ("state", "reason", "attempts", "seconds")})
    return rows


def launch_list(
    sweep: Sweep, gin_files: Sequence[str], overrides: Sequence[str], search_paths: Sequence[str] = ()
) -> list[str]:
    """Returns one `gpt4moe train` command a cell, for machines that this one cannot start jobs on."""
    lines = []
    for cell in sweep.cells:
        if cell.refused is None:
            words = [f"--gin_file={path}" for path in gin_files]
            words += [f"--gin_search_paths={','.join(search_paths)}"] if search_paths else []
            words += [f"--gin.{binding}" for binding in (*_read_by(cell, overrides, sweep.build), *cell.overrides)]
            words.append(f"--workdir={run_folder(sweep.folder, cell.id)}")
            lines.append(" ".join(["gpt4moe train", *map(shlex.quote, words)]))
    return lines


def _read_by(cell: Cell, overrides: Sequence[str], build: Build) -> list[str]:
    """Those overrides of the sweep that a cell's run reads: `train` refuses others, such as those of `SweepConfig`."""

    def is_read(*several: str) -> bool:
        try:
            build((*several, *cell.overrides))
        except CallerError:
            return False
        return True

    return list(overrides) if is_read(*overrides) else list(filter(is_read, overrides))


def _waiting(sweep: Sweep, jobs: Iterable) -> list[Task]:
    """Cells that no process works on and that have attempts left; a cell whose process died is a failed attempt."""
    taken = {task.id for job in jobs for task in job.tasks}
    waiting = []
    for cell in sweep.cells:
        folder = run_folder(sweep.folder, cell.id)
        if cell.refused is not None or cell.id in taken:
            continue
        with hold(folder) as held:
            if not held:
                continue
            state = state_of(folder)
            if state["state"] == "running":
                state |= {"state": "failed", "reason": KILLED}
                write_json(folder / "cell.json", state)
            if is_pending(state, sweep.config.retries):
                waiting.append(Task(cell.id, cell.overrides, sweep.store))
    return waiting


def _elsewhere(sweep: Sweep) -> bool:
    """Whether a process that this sweep has not started, of one that was cut off perhaps, still runs a cell."""
    for cell in sweep.cells:
        with hold(run_folder(sweep.folder, cell.id)) as held:
            if not held:
                return True
    return False


def _grouped(tasks: Sequence[Task], most: int, parallel: int) -> list[list[Task]]:
    """Tasks of one process each, fewer towards the end, so that no process works on alone for long."""
    size = min(most, max(-(-len(tasks) // (2 * parallel)), 1)) if parallel > 1 else most
    return [list(tasks[start : start + size]) for start in range(0, len(tasks), size)]


def _job(sweep: Sweep, tasks: Sequence[Task]) -> Job:
    return Job(str(sweep.folder), sweep.build, tuple(tasks), sweep.config.retries, sweep.config.memory_limit_gb)


def _prepare_tokens(sweep: Sweep, say: Callable[[str], None]) -> None:
    """Tokenises what cells still need, once, before runs that share it begin; cells without it fail."""
    unreadable = functools.cache(lambda data: _why_unreadable(data, sweep.store, say))
    for cell in sweep.cells:
        folder = run_folder(sweep.folder, cell.id)
        if cell.refused is None and is_pending(state_of(folder), sweep.config.retries):
            reason = unreadable(sweep.build(cell.overrides)[0].data)
            if reason is not None:
                refuse(folder, reason, mistake=True)


def _why_unreadable(data: DataConfig, store: str, say: Callable[[str], None]) -> str | None:
    """None once the tokens are there, else what is wrong with the sources, which may be anyone's functions."""
    try:
        prepare(data, store, progress=say)
    except CallerError as error:
        return one_line(error)
    except Exception as error:
        return explain(error)
    return None
