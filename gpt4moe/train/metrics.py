"""What a run writes about itself: rows of `metrics.jsonl`, TensorBoard events, `environment.json`."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import tensorboardX
from etils import epath

from gpt4moe.config.check import CallerError

PACKAGES = ("gpt4moe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tensorstore")


class MetricsLog:
    """Appends rows to `metrics.jsonl` and their scalars to `events/`; use as a context manager.

    Of several hosts the first one writes. Rows of steps after `keep_to_step`, which a killed process had reached but
    not saved, are dropped first. A row has left this process when `write` returns. An object store cannot append:
    there rows gather in a temporary file that `upload` copies, which the trainer does before each checkpoint, and no
    row newer than that outlives a kill anyway.
    `evaluated_steps` are those that already have their evaluation in the log.
    """

    def __init__(self, workdir: epath.Path, *, keep_to_step: int) -> None:
        self._path = workdir / "metrics.jsonl"
        self._primary = jax.process_index() == 0
        self._appends = self._primary and "://" not in os.fspath(workdir)
        rows = _rows_up_to(self._path, keep_to_step) if self._primary else []
        self.evaluated_steps = {row["step"] for row in rows if any(key.startswith("eval/") for key in row)}
        kept = "".join(json.dumps(row) + "\n" for row in rows)
        if self._appends:
            write_atomically(self._path, kept)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 closed in __exit__
            fcntl.flock(self._file, fcntl.LOCK_EX)
        elif self._primary:
            self._file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
            self._file.write(kept)
        else:
            self._file = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        events = os.fspath(workdir / "events")
        self._events = tensorboardX.SummaryWriter(events, purge_step=keep_to_step + 1, write_to_disk=self._primary)

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row, which has `step`; numbers that are not finite become null."""
        self._file.write(json.dumps(_finite(row)) + "\n")
        self._file.flush()
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "step":
                self._events.add_scalar(key, value, row["step"])
        self._events.flush()

    def upload(self) -> None:
        """Copies the rows to the object store; a local work directory has them already."""
        if self._primary and not self._appends:
            self._file.seek(0)
            self._path.write_text(self._file.read())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.upload()
        self._file.close()
        self._events.close()


def refuse_second_trainer(workdir: epath.Path) -> None:
    """Raises `CallerError` while another process of this machine trains in a local `workdir`: it holds its log."""
    path = workdir / "metrics.jsonl"
    if "://" in os.fspath(workdir) or jax.process_index() or not path.exists():
        return
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            mend = "wait for it to end, or give another workdir"
            raise CallerError(
                f"workdir={os.fspath(workdir)!r} is being trained in by another process; {mend}"
            ) from error


def environment() -> dict[str, Any]:
    """Versions, devices and source commit of this process, for `environment.json`."""
    devices = jax.devices()
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in devices],
        "processes": jax.process_count(),
        "commit": _commit(),
    }


def write_atomically(path: epath.Path, text: str) -> None:
    """Replaces a file as a whole, on the first host: no reader sees and no killed writer leaves half of it."""
    if jax.process_index():
        return
    partial = path.parent / f"{path.name}.partial"
    partial.write_text(text)
    partial.replace(path)


def _rows_up_to(path: epath.Path, step: int) -> list[dict]:
    if not path.exists():
        return []
    rows = [_parsed(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row and row["step"] <= step]


def _parsed(line: str) -> dict | None:
    """None for the half line that a killed process may leave at the end."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _commit() -> str | None:
    """Commit of the checkout this package runs from, marked if it has local changes; None outside a checkout."""
    git = ["git", "-C", os.fspath(pathlib.Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
