"""Where the time goes: seconds of a step, goodput, and the peak rate that utilisation is measured against."""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from gpt4moe.accounting import chips

GEMM_SIZE = 1024
GEMM_REPEATS = 5


class StepClock:
    """Seconds of each step, and goodput: the share of wall time since the process started that went into steps.

    Compiling, restoring, evaluating and waiting for a checkpoint are not steps: `resume` after them.
    data_wait_fraction: the share of the last lap in which the device waited for data, at most (see `drawing`).
    """

    def __init__(self) -> None:
        self._started = time.monotonic() - seconds_since_process_start()
        self._mark = time.monotonic()
        self._productive = 0.0
        self._waited = 0.0
        self.data_wait_fraction = 0.0

    def resume(self) -> None:
        """Begins the next step now; the time since the last `lap` was not a step's."""
        self._mark, self._waited = time.monotonic(), 0.0

    @contextlib.contextmanager
    def drawing(self, is_idle: Callable[[], bool]) -> Iterator[None]:
        """Times the drawing of a batch: all of it was waiting where the device `is_idle` once it is there, else none.

        An upper bound, since the device may have been busy for most of it.
        """
        began = time.monotonic()
        yield
        if is_idle():
            self._waited += time.monotonic() - began

    def lap(self) -> float:
        """Ends a step and begins the next: seconds since the last `lap` or `resume`."""
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        self._productive += seconds
        self.data_wait_fraction, self._waited = self._waited / seconds, 0.0
        return seconds

    def goodput(self) -> float:
        """Share of the wall time so far, start-up and compilation included, that was spent in steps."""
        return self._productive / (time.monotonic() - self._started)


def seconds_since_process_start() -> float:
    """Age of this process; 0 where the system does not tell."""
    try:
        # Field 22 of /proc/self/stat, counted behind the parenthesised command name: start in clock ticks after boot.
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0


def peak_flops_per_second(devices: list[jax.Device], dtype: str) -> float:
    """Matrix-product rate of all `devices` together: the chip's data sheet, or this machine's own measured rate.

    A CPU's rate is measured for the whole machine, however many devices it emulates, and taken for that of the machine
    of every process.
    """
    chip = chips.find_chip(devices[0].device_kind)
    if chip:
        return chip.peak_flops * len(devices)
    own = next(device for device in devices if device.process_index == jax.process_index())
    machines = len({device.process_index for device in devices})
    return measured_gemm_rate(own, dtype) * (machines if own.platform == "cpu" else len(devices))


def measured_gemm_rate(device: jax.Device, dtype: str) -> float:
    """FLOP/s of a square product of `dtype` operands accumulated in float32, the best of a few."""
    with jax.default_device(device):
        operand = jnp.ones((GEMM_SIZE, GEMM_SIZE), dtype)
        product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
        product(operand, operand).block_until_ready()
        return 2 * GEMM_SIZE**3 / min(_seconds(product, operand) for _ in range(GEMM_REPEATS))


def _seconds(product, operand: jax.Array) -> float:
    start = time.perf_counter()
    product(operand, operand).block_until_ready()
    return time.perf_counter() - start
