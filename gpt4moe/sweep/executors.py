"""Where jobs of a sweep run: processes of this machine, or a Slurm cluster, both through submitit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import submitit

from gpt4moe.config.check import CallerError, one_line
from gpt4moe.sweep.worker import Job, Task, run_job

# submitit ends local jobs after five minutes unless told otherwise.
WEEK_MINUTES = 7 * 24 * 60
# How old an answer of Slurm's queue may be.
QUEUE_SECONDS = 10.0
# How long processes may take to save when a sweep is interrupted, and how often they are asked.
STOP_SECONDS, ASK_SECONDS = 120.0, 5.0


class Queue:
    """The numbers of this user's jobs that Slurm runs or has waiting.

    submitit asks the accounting database, which small clusters have not; the queue is always there.
    """

    def __init__(self) -> None:
        self._asked, self._jobs = -math.inf, None

    def lacks(self, job_id: str) -> bool:
        """Whether a job that was submitted is no longer there; False where Slurm does not answer."""
        if time.monotonic() - self._asked > QUEUE_SECONDS:
            command = ["squeue", "--noheader", "--me", "--format=%A"]
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            self._asked, self._jobs = time.monotonic(), None if answer.returncode else set(answer.stdout.split())
        return self._jobs is not None and job_id not in self._jobs


@dataclasses.dataclass(frozen=True)
class Submitted:
    """A job on its way: its cells, submitit's handle, and where a cluster's jobs are listed."""

    tasks: tuple[Task, ...]
    handle: submitit.Job
    queue: Queue | None
    since: float

    def done(self) -> bool:
        """Whether its process has ended, however."""
        if self.queue is None:
            return self.handle.done()
        listed_by_now = time.monotonic() - self.since > 2 * QUEUE_SECONDS
        return listed_by_now and self.queue.lacks(self.handle.job_id)

    def stop(self) -> None:
        """Asks its process to save and end; one that has not begun does not begin. May be repeated.

        submitit would kill a local process after a second, Slurm's own limit is half a minute.
        """
        if self.queue is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self.handle.job_id), signal.SIGTERM)  # to submitit's controller, which hands it on
        else:
            for what in ("--state=PENDING", "--signal=USR2"):
                subprocess.run(["scancel", what, self.handle.job_id], capture_output=True, check=False)


def stop_all(jobs: Sequence[Submitted], say: Callable[[str], None]) -> None:
    """Asks jobs to save and end, and returns when they have, or after `STOP_SECONDS`; says what it waits for."""
    end, asked = time.monotonic() + STOP_SECONDS, -math.inf
    left = [job for job in jobs if not job.done()]
    if left:
        say(f"interrupted: waiting for {len(left)} jobs to save their runs and end, at most {STOP_SECONDS:.0f} s")
    while left and time.monotonic() < end:
        if time.monotonic() - asked > ASK_SECONDS:
            asked = time.monotonic()
            for job in left:
                job.stop()
        time.sleep(0.2)
        left = [job for job in left if not job.done()]
    if left:
        say(f"{len(left)} jobs are still at it; the same command waits for them and goes on")


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Holds back SIGINT, and keeps it for good from processes started meanwhile: a terminal sends it to them too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Executor:
    """Starts jobs through submitit, `parallel` at a time.

    cluster: "local" or "slurm"; parameters: submitit's own (partition, gpus_per_node, timeout_min, ...), for Slurm with
    or without its prefix `slurm_`.
    """

    def __init__(self, folder: pathlib.Path, cluster: str, parallel: int, parameters: Mapping[str, Any]):
        self.parallel = parallel
        self._queue = Queue() if cluster == "slurm" else None
        self._submitit = submitit.AutoExecutor(folder=folder / "jobs", cluster=cluster)
        try:
            self._submitit.update_parameters(**{"timeout_min": WEEK_MINUTES, "name": "gpt4moe"} | dict(parameters))
        except (NameError, ValueError, TypeError) as error:
            raise CallerError(f"--job_parameters={dict(parameters)}: {one_line(error)}") from error

    def room(self, running: int) -> int:
        """How many more jobs may start."""
        return max(self.parallel - running, 0)

    def submit(self, job: Job) -> Submitted:
        """Starts a job. Raises `CallerError` where the cluster refuses it."""
        try:
            handle = self._submitit.submit(run_job, job)
        except submitit.core.utils.FailedJobError as error:
            said = str(error).strip().splitlines()[-1]
            raise CallerError(f"--executor=slurm: {said}; look at --job_parameters and at sinfo") from error
        return Submitted(tuple(job.tasks), handle, self._queue, time.monotonic())
