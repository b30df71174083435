"""Processes measured by turns: each is built once and steps when it is asked, so that no two compute at a time.

A process prints one JSON line when it is ready, one for every line that it is sent (CPU and wall seconds of a step,
or what it answers to a task) and one when its input ends.
"""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable


def serve(ready: dict, step: Callable[[], None], finish: Callable[[], dict]) -> None:
    """Says `ready`, steps once for every line of the input, says what `finish` returns: the measured side."""

    def timed(_: str) -> list[float]:
        before = cpu_and_wall()
        step()
        return [after - start for after, start in zip(cpu_and_wall(), before, strict=True)]

    serve_tasks(ready, timed, finish)


def serve_tasks(ready: dict, answer: Callable[[str], object], finish: Callable[[], dict] = dict) -> None:
    """Says `ready`, what `answer` returns to every line of the input, and what `finish` returns."""
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line)), flush=True)
    print(json.dumps(finish()), flush=True)


def cpu_and_wall() -> tuple[float, float]:
    """User plus system seconds of this process (finer than os.times, same clock), and the wall clock's."""
    return time.process_time(), time.perf_counter()


class Process:
    """The measuring side: one process, its answers, and why there are no more of them.

    facts: what it said when it was ready and at its end. warming, timed: (CPU seconds, wall seconds) of the first step
    of each turn, and of the others. ended: None, or why it did not come to its end. `task` is its first line of input;
    `seconds` bounds what it may take in all, start included.
    """

    def __init__(
        self, command: list[str], *, environment: dict[str, str], task: str = "", seconds: float | None = None
    ):
        self.facts: dict = {}
        self.warming: list[list[float]] = []
        self.timed: list[list[float]] = []
        self.ended: str | None = None
        self._limit = self._left = seconds
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 read until the end
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._errors, env=os.environ | environment, bufsize=0
        )
        if task:
            self._send(task)
        self.facts |= self._answer() or {}

    def turn(self, num_steps: int) -> None:
        """Lets it step `num_steps` times after one that does not count; nothing where it has ended.

        Memory that lay idle while others had their turns is cold: on a virtual machine that gives free pages back to
        its host, the first step after a few seconds' rest takes twice the time.
        """
        for steps in [self.warming] + [self.timed] * num_steps:
            if self.ended is None:
                self._send("step")
                steps += [seconds for seconds in [self._answer()] if seconds]

    def ask(self, task: dict) -> dict | list | None:
        """Its answer to one task, None where it has ended."""
        if self.ended is None:
            self._send(json.dumps(task))
            return self._answer()
        return None

    def finish(self) -> None:
        """Lets it come to its end."""
        if self.ended is None:
            self._process.stdin.close()
            self.facts |= self._answer() or {}
        self._process.wait()

    def steps(self) -> list[list[float]]:
        """The steps that count: the timed ones, or those that warm up where it came to no other."""
        return self.timed or self.warming

    def rates(self, tokens: int) -> dict[str, float | None]:
        """Tokens per CPU-second and per second of the median step of `tokens` tokens, None without a step."""
        names = ("tokens_per_cpu_second", "tokens_per_second")
        columns = zip(*self.steps(), strict=True)
        medians = [tokens / statistics.median(column) for column in columns] or [None, None]
        return dict(zip(names, medians, strict=True))

    def errors(self) -> str:
        """What it wrote on standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def _send(self, line: str) -> None:
        # A process that has died is found out by its answer.
        try:
            self._process.stdin.write(f"{line}\n".encode())
        except BrokenPipeError:
            return

    def _answer(self) -> dict | list | None:
        started = time.monotonic()
        answers, _, _ = select.select([self._process.stdout], [], [], self._left)
        line = self._process.stdout.readline() if answers else b""
        if self._left is not None:
            self._left = max(0.0, self._left - (time.monotonic() - started))
        if not answers:
            self._process.kill()
            self.ended = f"stopped after {self._limit:g} s"
        elif not line:
            self.ended = (self.errors().strip() or "said nothing").splitlines()[-1]
        return json.loads(line) if line else None
