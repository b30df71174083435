"""One process of a sweep: asked to stop, gone on with, out of data, tried again, and files that several write."""

import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from gpt4moe.checkpoint import saved_steps
from gpt4moe.config.check import CallerError
from gpt4moe.configure import build_run
from gpt4moe.sweep import worker
from gpt4moe.sweep.worker import Job, Task, grant_attempts, is_pending, run_folder, run_job, state_of, write_json

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 150
LONG = (f"TRAIN_STEPS={STEPS}", "CHECKPOINT_EVERY=100000")
SMALL = ("BATCH_TOKENS=64", "SEQUENCE_LENGTH=32", "DATA_PATHS=['gpt4moe/sweep']", "train.TrainConfig.sample_prompts=[]")


def build(overrides):
    return build_run([str(ROOT / "gin_configs/run/tiny.gin")], (*SMALL, *overrides))


def job(folder, *overrides, retries=1):
    return Job(str(folder), build, [Task("cell", overrides, str(folder / "stores"))], retries)


def losses(folder):
    lines = (run_folder(folder, "cell") / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines) if "loss" in row]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """A run of the cell in one go; the tests' folder of programs keeps its own, so that others begin at once."""
    folder = tmp_path_factory.mktemp("uncut")
    run_job(job(folder, *LONG))
    return folder


def begin(folder, overrides, steps):
    """Another process that runs the cell, once it has logged so many steps."""
    code = "import sys, pathlib; from tests.sweep.test_worker import job; from gpt4moe.sweep.worker import run_job\n"
    code += "run_job(job(pathlib.Path(sys.argv[1]), *sys.argv[2:]))"
    program = [sys.executable, "-c", code, str(folder), *overrides]
    process = subprocess.Popen(program, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    log = run_folder(folder, "cell") / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > steps):
        time.sleep(0.02)
    return process


def test_a_cell_stopped_by_a_cluster_and_by_its_sweep_has_lost_no_attempt_and_no_step(uncut, tmp_path):
    folder, seconds, last = run_folder(tmp_path, "cell"), 0.0, 0
    for number in (signal.SIGUSR2, signal.SIGTERM):
        process = begin(tmp_path, LONG, steps=last + 3)
        process.send_signal(number)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # a second one does not end it before it has saved
        assert process.wait(120) == 0
        state, before, last = state_of(folder), last, losses(tmp_path)[-1][0]
        assert (state["state"], state["reason"], state["attempts"]) == ("stopped", "stopped on request", 0)
        assert before + 3 < last < STEPS and saved_steps(folder)[-1] == last
        assert state["seconds"] > seconds, "of all attempts"
        seconds = state["seconds"]
    run_job(job(tmp_path, *LONG))
    done = state_of(folder)
    assert (done["state"], done["attempts"]) == ("done", 1) and done["seconds"] > seconds
    assert losses(tmp_path) == losses(uncut)


def test_a_stop_that_comes_too_early_counts_and_other_cells_are_left(uncut, tmp_path):
    """A time limit below a run's beginning would have it submitted for ever."""

    def build_and_ask(overrides):
        signal.raise_signal(signal.SIGUSR2)
        return build(overrides)

    tasks = [Task(name, LONG, str(uncut / "stores")) for name in ("first", "second")]
    asked = Job(str(tmp_path), build_and_ask, tasks, retries=1)
    for attempts in (1, 2):
        run_job(asked)
        state = state_of(run_folder(tmp_path, "first"))
        assert (state["state"], state["attempts"]) == ("stopped", attempts)
    assert not is_pending(state, retries=1)
    assert state_of(run_folder(tmp_path, "second"))["state"] == "waiting"


def test_a_run_whose_data_end_is_done_and_says_so(uncut, tmp_path):
    run_job(job(tmp_path, "TRAIN_STEPS=100000", "DATA_EPOCHS=0.05"))
    state = state_of(run_folder(tmp_path, "cell"))
    assert state["state"] == "done" and state["reason"].startswith("the data ended after "), state


def test_what_failed_is_tried_by_retries_and_anew_when_the_command_is_given_again(tmp_path):
    attempts = []

    def failing(error):
        def build(overrides):
            attempts.append(error)
            raise error

        return build

    folder = run_folder(tmp_path, "cell")
    for error, times in ((OSError("disk full"), 2), (CallerError("INIT_FROM='a' holds no run"), 1)):
        for _ in range(2):  # the same command twice
            attempts.clear()
            grant_attempts(folder)
            assert is_pending(state_of(folder), retries=1)
            run_job(Job(str(tmp_path), failing(error), [Task("cell", (), "")], 1))
            state = state_of(folder)
            assert len(attempts) == state["attempts"] == times and not is_pending(state, retries=1)
    assert state["seconds"] > 0


def test_what_diverged_or_is_done_is_never_tried_again(tmp_path):
    for document in ({"state": "done"}, {"state": "failed", "final": True}):
        write_json(tmp_path / "cell.json", document | {"attempts": 1})
        grant_attempts(tmp_path)
        assert state_of(tmp_path)["state"] == document["state"] and not is_pending(state_of(tmp_path), retries=5)


def test_a_cell_cut_off_twice_has_its_attempts_and_keeps_its_seconds(tmp_path):
    for _ in range(2):
        write_json(tmp_path / "cell.json", {"state": "running", "attempts": 1, "seconds": 5.0})
        grant_attempts(tmp_path)
        state = state_of(tmp_path)
        assert (state["state"], state["attempts"], state["seconds"]) == ("waiting", 0, 5.0)
    write_json(tmp_path / "cell.json", {"state": "running", "attempts": 1})
    with worker.hold(tmp_path):  # another process runs it
        grant_attempts(tmp_path)
    assert state_of(tmp_path) == {"state": "running", "attempts": 1}


def test_several_may_write_one_file(tmp_path):
    def write(number):
        for _ in range(100):
            write_json(tmp_path / "manifest.json", {"by": number})

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert json.loads((tmp_path / "manifest.json").read_text())["by"] in range(4)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
