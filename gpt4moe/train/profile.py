"""A profiler trace of a few steps, for TensorBoard or Perfetto."""

from __future__ import annotations

import os

import jax
from etils import epath

# The first steps of a process also pay for transfers and caches that later ones do not.
WARMUP_STEPS = 2


class Profile:
    """Traces `num_steps` steps after the first ones into `directory`; use as a context manager, 0 steps trace none."""

    def __init__(self, directory: epath.Path, num_steps: int) -> None:
        self._directory = directory
        self._num_steps = num_steps
        self._seen = 0
        self._running = False

    def before_step(self) -> None:
        """Starts or ends the trace at its step; to be called before each step."""
        if self._num_steps and self._seen == WARMUP_STEPS:
            jax.profiler.start_trace(os.fspath(self._directory))
            self._running = True
        elif self._seen == WARMUP_STEPS + self._num_steps:
            self._stop()
        self._seen += 1

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
        self._running = False
