"""Where jobs of a sweep run: processes of this machine, or a Slurm cluster, both through submitit."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import submitit

from gpt4moe.config.check import CallerError, one_line
from gpt4moe.sweep.worker import Job, Task, run_job

# submitit ends local jobs after five minutes unless told otherwise.
WEEK_MINUTES = 7 * 24 * 60


@dataclasses.dataclass(frozen=True)
class Submitted:
    """A job on its way: its cells, and submitit's handle."""

    tasks: tuple[Task, ...]
    handle: submitit.Job

    def done(self) -> bool:
        """Whether its process has ended, however."""
        return self.handle.done()

    def stop(self) -> None:
        """Asks its process to save and end."""
        self.handle.cancel(check=False)


class Executor:
    """Starts jobs through submitit, `parallel` at a time.

    parallel: jobs at a time. cluster: "local" or "slurm"; parameters: submitit's own (partition, gpus_per_node, timeout_min, ...), for Slurm with
    or without its prefix `slurm_`.
    """

    def __init__(self, folder: pathlib.Path, cluster: str, parallel: int, parameters: Mapping[str, Any]):
        self.parallel = parallel
        self._submitit = submitit.AutoExecutor(folder=folder / "jobs", cluster=cluster)
        try:
            self._submitit.update_parameters(**{"timeout_min": WEEK_MINUTES, "name": "gpt4moe"} | dict(parameters))
        except (NameError, ValueError, TypeError) as error:
            raise CallerError(f"--job_parameters={dict(parameters)}: {one_line(error)}") from error

    def room(self, running: int) -> int:
        """How many more jobs may start."""
        return max(self.parallel - running, 0)

    def submit(self, job: Job) -> Submitted:
        """Starts a job."""
        return Submitted(tuple(job.tasks), self._submitit.submit(run_job, job))
