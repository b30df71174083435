"""A run with failures, second by second: what `plan.goodput` says in one formula, drawn at random from a seed.

In: a job, its reliability, its spares. Out: where the time went. A failure throws the job back to the last save that
was safe; the job then needs a spare chip, or waits for a repaired one, and starts again, which can fail too.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import random
import statistics
from collections.abc import Sequence

from gpt4moe.config.check import require, require_count, require_not_negative, require_positive
from gpt4moe.plan.money.goodput import Reliability, best_interval_seconds

# Failures one after the other without a save between them: where that many are likely, a run gets nowhere.
MAX_FAILURES_IN_VAIN = 10_000


@dataclasses.dataclass(frozen=True)
class Job:
    """work_seconds: of a run without failures and saves. spares None: a chip to replace is always there."""

    work_seconds: float
    reliability: Reliability
    interval_seconds: float | None = None
    spares: int | None = None
    repair_seconds: float = 0.0

    def __post_init__(self) -> None:
        require_positive("work_seconds", self.work_seconds)
        require_not_negative("repair_seconds", self.repair_seconds)
        if self.interval_seconds is not None:
            require_positive("interval_seconds", self.interval_seconds)
        if self.spares is not None:
            require_count("spares", self.spares, 0)
        constraint = f"must be at least write_seconds ({self.reliability.write_seconds:g})"
        require(self.interval >= self.reliability.write_seconds, "interval_seconds", self.interval, constraint)

    @property
    def interval(self) -> float:
        """Seconds of work between two saves."""
        best = best_interval_seconds(self.reliability)
        return best if self.interval_seconds is None else self.interval_seconds


@dataclasses.dataclass
class Time:
    """Seconds of a run by what they went into. lost: work that has to be done again."""

    work: float = 0.0
    saving: float = 0.0
    lost: float = 0.0
    restarting: float = 0.0
    waiting: float = 0.0
    failures: int = 0

    @property
    def elapsed(self) -> float:
        """All of it."""
        return self.work + self.saving + self.lost + self.restarting + self.waiting

    @property
    def goodput(self) -> float:
        """The share that went into work that lasted."""
        return self.work / self.elapsed


def expected_events(job: Job) -> float:
    """Returns how many saves and failures a run of the job has on average, about: what a simulation works through.

    Of a job that gets nowhere, those until `simulate` says so.
    """
    reliability = job.reliability
    mtbf = reliability.job_mtbf_seconds
    interval, restart = (job.interval + reliability.blocking_seconds) / mtbf, reliability.restart_seconds / mtbf
    failures = math.exp(min(restart, 100)) * math.expm1(min(interval, 100))  # for each save
    saves = job.work_seconds / job.interval if failures < MAX_FAILURES_IN_VAIN else 1.0
    return saves * (1 + min(failures, MAX_FAILURES_IN_VAIN))


def simulate(job: Job, seed: int) -> Time:
    """Returns where the time of one run went; the same seed gives the same run.

    Raises `CallerError` for a job that gets nowhere: failures come faster than it can save.
    """
    return _Simulation(job, seed).run()


def simulate_many(job: Job, seed: int, runs: int) -> list[Time]:
    """Returns so many runs, with the seeds that follow one another."""
    require_count("runs", runs)
    return [simulate(job, seed + number) for number in range(runs)]


def mean_goodput(times: Sequence[Time]) -> tuple[float, float]:
    """Returns the mean goodput of runs and its standard error, 0 for one run."""
    values = [time.goodput for time in times]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


class _Simulation:
    """The state of one run: the clock, the next failure, work done and work that is safe."""

    def __init__(self, job: Job, seed: int):
        self.job, self.random = job, random.Random(seed)
        self.time = Time()
        self.done = self.safe = 0.0
        self.unwritten: list[tuple[float, float]] = []  # when a save will be safe, and the work in it
        self.under_repair: list[float] = []  # when each chip comes back
        self.in_vain = 0
        self.next_failure = self._draw()

    def run(self) -> Time:
        while self.done < self.job.work_seconds:
            self._work_and_save()
        return self.time

    def _work_and_save(self) -> None:
        job, start = self.job, self.time.elapsed
        work = min(job.interval, job.work_seconds - self.done)
        is_last = self.done + work >= job.work_seconds
        saving = 0.0 if is_last else job.reliability.blocking_seconds
        if start + work + saving <= self.next_failure:
            self.in_vain = 0
            self.done += work
            self.time.work += work
            self.time.saving += saving
            self.unwritten.append((self.time.elapsed + job.reliability.write_seconds, self.done))
            return
        begun = min(self.next_failure - start, work)
        self.done += begun
        self.time.work += begun
        self.time.saving += self.next_failure - start - begun
        self._fail()

    def _fail(self) -> None:
        """Throws the run back to what is safe now, and starts it again."""
        for when, work in self.unwritten:
            if when <= self.next_failure:
                self.safe = work
        self.unwritten = []
        self.time.lost += self.done - self.safe
        self.time.work -= self.done - self.safe
        self.done = self.safe
        self._count_failure()
        restart = self.job.reliability.restart_seconds
        while self.next_failure < self.time.elapsed + restart:  # it fails before it has started
            self.time.restarting += self.next_failure - self.time.elapsed
            self._count_failure()
        self.time.restarting += restart

    def _count_failure(self) -> None:
        """Takes a spare, waiting for one where none is left; the waiting job does not fail."""
        self.time.failures += 1
        self.in_vain += 1
        mtbf, mend = self.job.reliability.job_mtbf_seconds, "save more often, restart faster or use fewer chips"
        gets_ahead = self.in_vain <= MAX_FAILURES_IN_VAIN
        require(gets_ahead, "job_mtbf_seconds", mtbf, "leaves no time to get ahead", mend)
        now = self.time.elapsed
        while self.under_repair and self.under_repair[0] <= now:
            heapq.heappop(self.under_repair)
        if self.job.spares is not None:
            heapq.heappush(self.under_repair, now + self.job.repair_seconds)
            if len(self.under_repair) > self.job.spares:
                self.time.waiting += heapq.heappop(self.under_repair) - now
        self.next_failure = self._draw()

    def _draw(self) -> float:
        return self.time.elapsed + self.random.expovariate(1 / self.job.reliability.job_mtbf_seconds)
