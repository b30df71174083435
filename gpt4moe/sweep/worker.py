"""Runs cells one after the other in one process, and leaves what came of each in its folder.

`runs/ID/cell.json` says how far a cell is: `state` (waiting; running; stopped on request, with a checkpoint to go on
from; done; failed), the reason of a failure, attempts that failed. `runs/ID/.lock` is held by the process that runs it,
so that any number of sweeps and of cut-off workers share a folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import resource
import secrets
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax

from gpt4moe.config.check import CallerError, RunError, one_line
from gpt4moe.sweep.cells import Build

if TYPE_CHECKING:
    from gpt4moe.train.loop import TrainResult
    from gpt4moe.train.stop import StopRequest

GIGABYTE = 2**30
# What a sweep, a terminal, a cluster that wants its machine back, and submitit before a time limit send.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
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
    """Runs the cells of a job that are neither done nor being run by someone else, until asked to stop."""
    _limit_memory(job.memory_limit_gb)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(job.folder) / "compiled"))
    with _stop_request() as stop:
        for task in job.tasks:
            folder = run_folder(job.folder, task.id)
            with hold(folder) as held:
                while held and not stop.requested and is_pending(state_of(folder), job.retries):
                    _run(folder, task, job.build, stop)


@contextlib.contextmanager
def _stop_request() -> Iterator[StopRequest]:
    """Listens for a request to stop. A second one is ignored: submitit's handlers would fail a run that is saving."""
    from gpt4moe.train.stop import StopRequest

    previous = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        with StopRequest(STOP_SIGNALS) as stop:
            yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run(folder: pathlib.Path, task: Task, build: Build, stop: StopRequest) -> None:
    """One attempt at a cell, from its last checkpoint if there is one. What stops has not failed, if it got on."""
    before, started = state_of(folder), time.time()

    def leave(state: str, reason: str | None = None, *, counts: bool = True, **more: Any) -> None:
        seconds = before.get("seconds", 0.0) + time.time() - started
        attempts = before.get("attempts", 0) + counts
        document = {"state": state, "reason": reason, "attempts": attempts, "seconds": seconds, "pid": os.getpid()}
        write_json(folder / "cell.json", document | more)

    leave("running")  # before anything else: what does not survive the next line has been tried
    saved = _saved_step(folder)
    try:
        result = _train(folder, task, build, stop)
    except CallerError as error:
        leave("failed", one_line(error), mistake=True)
    except RunError as error:  # a run that diverges does so again
        leave("failed", one_line(error), final=True)
    except Exception as error:
        (folder / "error.txt").write_text(traceback.format_exc())
        leave("failed", explain(error))
    else:
        if result.stopped and result.step > saved:
            leave("stopped", "stopped on request", counts=False)
        elif result.stopped:
            leave("stopped", "stopped on request before a further step")
        else:
            leave("done", f"the data ended after {result.tokens:,} tokens" if result.data_ended else None)


def _saved_step(folder: pathlib.Path) -> int:
    """The newest checkpoint of a cell, 0 without one."""
    from gpt4moe.checkpoint import saved_steps

    return max(saved_steps(folder), default=0)


def _train(folder: pathlib.Path, task: Task, build: Build, stop: StopRequest) -> TrainResult:
    """The cell's training run, in its own work directory."""
    run, text = build((*task.overrides, f"data.DataConfig.store={task.store!r}"))
    from gpt4moe.train import loop

    return loop.train(run, folder, config_text=text, show_progress=False, stop=stop)


def run_folder(folder: str | os.PathLike, cell_id: str) -> pathlib.Path:
    """The work directory of a cell."""
    return pathlib.Path(folder) / "runs" / cell_id


def state_of(folder: pathlib.Path) -> dict[str, Any]:
    """What `cell.json` says, `{"state": "waiting"}` where there is none yet."""
    path = folder / "cell.json"
    return json.loads(path.read_text()) if path.exists() else {"state": "waiting"}


def is_pending(state: dict[str, Any], retries: int) -> bool:
    """Whether this invocation of a sweep has anything left to try.

    Call it with the cell's lock held: what then says running has died. `final` is what would fail in the same way
    again, `mistake` what the caller has to mend first.
    """
    if state["state"] == "done" or state.get("final") or state.get("mistake"):
        return False
    return state["state"] not in ("failed", "stopped") or state["attempts"] <= retries


def grant_attempts(folder: pathlib.Path) -> None:
    """Forgets how often a cell was tried, for a new invocation of its sweep; what diverged or is done stays so."""
    with hold(folder) as held:
        state = state_of(folder)
        if held and state["state"] in ("running", "failed", "stopped") and not state.get("final"):
            state |= {"state": "waiting", "reason": None, "attempts": 0}
            write_json(folder / "cell.json", {name: value for name, value in state.items() if name != "mistake"})


def refuse(folder: pathlib.Path, reason: str, **more: Any) -> None:
    """Leaves a cell failed that nothing was tried of; `more`: `final` or `mistake`."""
    with hold(folder) as held:
        if held:
            state = state_of(folder) | {"state": "failed", "reason": reason}
            write_json(folder / "cell.json", {"attempts": 0} | state | more)


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
    """Replaces a file as a whole, whoever else does so."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def explain(error: Exception) -> str:
    """What an error that nobody foresaw says, in one line."""
    said = f"{type(error).__name__}: {one_line(error)}"
    memory = isinstance(error, MemoryError) or any(word.lower() in said.lower() for word in OUT_OF_MEMORY)
    return f"out of memory: {said}" if memory else said


def _limit_memory(gigabytes: float | None) -> None:
    if gigabytes is not None:
        limit = int(gigabytes * GIGABYTE)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
