"""Whole sweeps through the command: cut twice and gone on with, cells that fail, results that others can read."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SWEEP = """from __gin__ import dynamic_registration
from gpt4moe.config import sweep
from gpt4moe.config import train
include "gin_configs/run/tiny.gin"
TRAIN_STEPS = 6
CHECKPOINT_EVERY = 2
BATCH_TOKENS = 128
train.TrainConfig.sample_prompts = []
sweep.SweepConfig:
"""


def environment():
    """Programs that compile quickly, as tests do without the command."""
    flags = os.environ.get("XLA_FLAGS", "")
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def command(folder, settings, *words):
    file = folder / "sweep.gin"
    bound = "".join(f"  {name} = {value!r}\n" for name, value in settings.items())
    file.write_text(SWEEP + bound)
    program = [sys.executable, "-m", "gpt4moe.launch", "sweep", f"--gin_file={file}"]
    return [*program, f"--workdir={folder / 'sweep'}", "--json", *words]


def run(folder, settings, *words):
    done = subprocess.run(
        command(folder, settings, *words), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def measured(folder):
    """What a sweep found, without clocks: by cell, its losses and all its logged losses."""
    table = pq.read_table(folder / "sweep" / "results.parquet").to_pylist()
    logs = {}
    for row in table:
        lines = (folder / "sweep" / "runs" / row["id"] / "metrics.jsonl").read_text().splitlines()
        logged = [json.loads(line) for line in lines]
        logs[row["id"]] = [(line["step"], line["loss"], line["grad_norm"]) for line in logged if "loss" in line]
    return {row["id"]: (row["NUM_EXPERTS"], row["seed"], row["state"], row["held_out_loss"]) for row in table}, logs


AXES = {"axes": {"NUM_EXPERTS": [2, 4]}, "seeds": 2}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncut")
    code, document, errors = run(folder, AXES)
    assert code == 0, errors
    assert len(document["rows"]) == 4
    report = pathlib.Path(document["report"])
    assert report == folder / "sweep" / "report.html" and document["rows"][3]["id"] in report.read_text()
    assert (report.parent / "figures" / "loss_by_NUM_EXPERTS.csv").read_text().count("\n") == 3
    return folder


def processes_in(folder):
    """Process ids that name the folder on their command line, or work in it: the sweep and its jobs."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="ignore")
                settings = (entry / "environ").read_bytes().decode(errors="ignore")
            except OSError:
                continue
            if str(folder) in words or str(folder) in settings:
                found.append(int(entry.name))
    return found


def test_a_sweep_killed_twice_equals_an_uncut_one(uncut, tmp_path):
    moments = random.Random(os.environ.get("SWEEP_KILL_SEED", "3"))
    for _ in range(2):
        started = subprocess.Popen(
            command(tmp_path, AXES), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 300
        while not list((tmp_path / "sweep").glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(moments.uniform(0, 3))
        for process in {started.pid, *processes_in(tmp_path)}:
            os.kill(process, signal.SIGKILL)
        started.wait()
    code, document, errors = run(tmp_path, AXES)
    assert code == 0, errors
    assert [row["state"] for row in document["rows"]] == ["done"] * 4
    assert measured(tmp_path) == measured(uncut)


def test_a_finished_sweep_is_read_not_run_again(uncut):
    before = {path: path.stat().st_mtime_ns for path in (uncut / "sweep" / "runs").rglob("metrics.jsonl")}
    wider = {"axes": {"NUM_EXPERTS": [4]}, "seeds": [1]}
    code, document, _ = run(uncut, wider)
    assert code == 0 and [row["state"] for row in document["rows"]] == ["done"]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_cells_that_diverge_or_cannot_be_built_or_run_out_of_memory_are_rows_with_reasons(tmp_path):
    cells = [(1e-3, 4, 32), (1e-3, 1, 32), (1e-3, 4, 2_000_000), (1e39, 4, 64)]  # the last loss is not finite
    axes = {"moe.MoeConfig.router_z_weight,NUM_EXPERTS,moe.MoeConfig.hidden_dim": cells}
    settings = {"axes": axes, "memory_limit_gb": 4, "retries": 1, "runs_per_job": 1}
    code, document, errors = run(tmp_path, settings, "--gin.train.TrainConfig.max_skipped_steps=2")
    assert code == 1, errors
    rows = {(row["NUM_EXPERTS"], row["moe.MoeConfig.hidden_dim"]): row for row in document["rows"]}
    assert rows[4, 32]["state"] == "done"
    assert rows[1, 32]["state"] == "failed" and "experts_per_token=2" in rows[1, 32]["reason"]
    big = rows[4, 2_000_000]
    assert big["state"] == "failed" and "memory" in big["reason"], big["reason"]
    diverged = rows[4, 64]
    assert diverged["state"] == "failed" and "finite" in diverged["reason"], diverged["reason"]
    assert (diverged["attempts"], big["attempts"]) == (1, 2), "what would diverge again is not tried again"
    assert {row["id"] for row in pq.read_table(tmp_path / "sweep" / "results.parquet").to_pylist()} == {
        row["id"] for row in document["rows"]
    }


def test_a_launch_list_has_one_command_a_run(tmp_path):
    code, document, _ = run(tmp_path, AXES, "--executor=list")
    assert code == 0 and len(document["commands"]) == 4
    assert all(line.startswith("gpt4moe train --gin_file=") and "--workdir=" in line for line in document["commands"])
