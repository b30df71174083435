"""A run of our own trainer as a measured step: its configuration and `metrics.jsonl` in, a `Sample` out.

The median step counts, the first logged row left out for it pays for compilation. On a CPU the peak is the one that the
run measured itself against.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics

from gpt4moe.accounting import flops
from gpt4moe.accounting.chips import Chip, Network, find_chip
from gpt4moe.accounting.shape import shape_of
from gpt4moe.config.check import CallerError, require
from gpt4moe.config.run import RunConfig
from gpt4moe.plan.published.calibrate import Sample
from gpt4moe.plan.search.gin_export import layout_of
from gpt4moe.plan.training import step_time
from gpt4moe.plan.training.stacks import Stack

STACK = Stack("gpt4moe", data_overlap=0.0)
# A CPU has no data sheet here: memory bandwidth that a server's socket reaches, for the small elementwise part.
CPU_BYTES_PER_SECOND = 20e9
CPU_MEMORY_BYTES = 64e9
NEEDED = ("batch_tokens", "step_seconds", "tokens_per_second", "model_flops_utilization")


def read_sample(workdir: str | os.PathLike, run: RunConfig) -> Sample:
    """Returns the median step of a run beside what is predicted for it.

    Raises `CallerError` where the log holds too few steps or a mesh that the layouts here do not know.
    """
    folder = pathlib.Path(workdir)
    rows = _logged(folder)
    batch_tokens = rows[-1]["batch_tokens"]
    rows = [row for row in rows if row["batch_tokens"] == batch_tokens]
    seconds = statistics.median(row["step_seconds"] for row in rows)
    devices = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["devices"]
    chip = find_chip(devices[0]) or _cpu(run, rows, len(devices))
    layout = layout_of(run, len(devices), batch_tokens)
    step = step_time.estimate(run.model, layout, chip, batch_tokens, run.data.sequence_length, STACK)
    kinds = {kind: sum(step.parts[name] for name in names) for kind, names in step_time.KINDS.items()}
    return Sample(str(folder), f"{STACK.name}/{chip.name}", kinds, seconds, str(folder))


def _logged(folder: pathlib.Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    require(path.exists(), "--workdir", str(folder), "holds no metrics.jsonl", "train there first")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CallerError(f"{path}, line {number}: is not JSON ({error.msg})") from None
        if all(row.get(name) for name in NEEDED):
            rows.append(row)
    require(len(rows) > 1, "--workdir", str(folder), f"logs {len(rows)} steps with times", "train at least two steps")
    return rows[1:]


def _cpu(run: RunConfig, rows: list[dict], num_devices: int) -> Chip:
    """The machine as one chip a device: its peak is what utilisation was measured against."""
    row = rows[-1]
    peak = flops.train_flops_per_token(shape_of(run.model)) * row["tokens_per_second"] / row["model_flops_utilization"]
    share = 1 / num_devices
    network = Network(num_devices, CPU_BYTES_PER_SECOND * share, CPU_BYTES_PER_SECOND * share)
    memory_bytes, rate = CPU_MEMORY_BYTES * share, CPU_BYTES_PER_SECOND * share
    return Chip("cpu", (), peak * share, memory_bytes, rate, network=network)
