"""Runs cells one after the other in one process, and leaves what came of each in its folder.

`runs/ID/cell.json` says how far a cell is: `state` (running, done, failed), the reason of a failure, attempts.
`runs/ID/.lock` is held by the process that runs it, so that any number of sweeps and of cut-off workers share a folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import resource
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from gpt4moe.config.check import CallerError, RunError, one_line
from gpt4moe.sweep.cells import Build

GIGABYTE = 2**30
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "bad_alloc", "unable to allocate", "cannot allocate")


@dataclasses.dataclass(frozen=True)
class Task:
    """One cell as a worker needs it: its id, the bindings that make it, and where its tokens are."""

    id: str
    overrides: tuple[str, ...]
    store: str


@dataclasses.dataclass(frozen=True)
class Job:
    """Cells for one process. `build` makes a run of overrides; `retries` bounds the attempts at each cell."""

    folder: str
    build: Build
    tasks: Sequence[Task]
    retries: int
    memory_limit_gb: float | None = None


def run_job(job: Job) -> None:
    """Runs the cells of a job that are neither done nor being run by someone else."""
    _limit_memory(job.memory_limit_gb)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(job.folder) / "compiled"))
    for task in job.tasks:
        folder = run_folder(job.folder, task.id)
        with hold(folder) as held:
            while held and is_pending(state_of(folder), job.retries):
                _run(folder, task, job.build)


def _run(folder: pathlib.Path, task: Task, build: Build) -> None:
    """One attempt at a cell, from its last checkpoint if there is one."""
    before = state_of(folder)
    started = time.time()

    def leave(state: str, reason: str | None = None, **more: Any) -> None:
        seconds = before.get("seconds", 0.0) + time.time() - started
        attempts = before.get("attempts", 0) + (state != "stopped")
        document = {"state": state, "reason": reason, "attempts": attempts, "seconds": seconds, "pid": os.getpid()}
        write_json(folder / "cell.json", document | more)

    leave("running")
    try:
        result = _train(folder, task, build)
    except CallerError as error:
        leave("failed", one_line(error), final=True)
    except RunError as error:  # a run that diverges does so again
        leave("failed", one_line(error), final=True)
    except Exception as error:
        (folder / "error.txt").write_text(traceback.format_exc())
        leave("failed", _reason(error))
    else:
        if result.stopped:
            leave("stopped", "stopped on request")
            raise SystemExit(3)
        leave("done")


def _train(folder: pathlib.Path, task: Task, build: Build):
    """The cell's training run, in its own work directory."""
    run, text = build((*task.overrides, f"data.DataConfig.store={task.store!r}"))
    from gpt4moe.train import loop

    return loop.train(run, folder, config_text=text, show_progress=False)


def run_folder(folder: str | os.PathLike, cell_id: str) -> pathlib.Path:
    """The work directory of a cell."""
    return pathlib.Path(folder) / "runs" / cell_id


def state_of(folder: pathlib.Path) -> dict[str, Any]:
    """What `cell.json` says, `{"state": "waiting"}` where there is none yet."""
    path = folder / "cell.json"
    return json.loads(path.read_text()) if path.exists() else {"state": "waiting"}


def is_pending(state: dict[str, Any], retries: int) -> bool:
    """Whether there is anything left to try. Call it with the cell's lock held: what then says running has died."""
    if state["state"] == "done" or state.get("final"):
        return False
    return state["state"] != "failed" or state["attempts"] <= retries


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[bool]:
    """Holds the lock of a cell, if no other process does; yields whether it is held."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def write_json(path: pathlib.Path, document: Any) -> None:
    """Replaces a file as a whole."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def _reason(error: Exception) -> str:
    said = f"{type(error).__name__}: {one_line(error)}"
    memory = isinstance(error, MemoryError) or any(word.lower() in said.lower() for word in OUT_OF_MEMORY)
    return f"out of memory: {said}" if memory else said


def _limit_memory(gigabytes: float | None) -> None:
    if gigabytes is not None:
        limit = int(gigabytes * GIGABYTE)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
