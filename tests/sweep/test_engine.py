"""What a sweep does with its cells: waits, tries again, saves when interrupted, goes on without what it cannot read."""

import contextlib
import functools
import json
import os
import pathlib
import shlex
import signal
import subprocess
import threading
import time

import pytest

from gpt4moe import flags
from gpt4moe.config.check import CallerError, RunError
from gpt4moe.configure import build_run, build_sweep
from gpt4moe.launch import main
from gpt4moe.sweep import engine
from gpt4moe.sweep.cells import address
from gpt4moe.sweep.executors import shielded
from gpt4moe.sweep.worker import hold, run_folder, run_job, state_of, write_json
from tests.sweep.test_sweep import ROOT, command, environment

SWEEP = """from __gin__ import dynamic_registration
from gpt4moe.config import sweep
from gpt4moe.config import train
from gpt4moe.model import routers
include "gin_configs/run/tiny.gin"
TRAIN_STEPS = 2
BATCH_TOKENS = 64
DATA_PATHS = ["gpt4moe/sweep"]
TRIES = 1
train.TrainConfig.sample_prompts = []
sweep.SweepConfig.retries = %TRIES
sweep.SweepConfig.axes = {"NUM_EXPERTS": [2, 4]}
"""


class Here:
    """Runs jobs in this process: the contract of an executor without its machines."""

    parallel = 1

    def room(self, running):
        return self.parallel - running

    def submit(self, job):
        run_job(job)
        return Ended(job.tasks)


class Ended:
    """A job that is over when it is given."""

    def __init__(self, tasks):
        self.tasks = tasks

    def done(self):
        return True


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sweep.gin"
    path.write_text(SWEEP)
    return str(path)


def planned(file, folder, *overrides):
    config, build = build_sweep([file], overrides)
    return engine.plan(config, build, str(folder), print)


def test_a_cell_whose_process_was_killed_is_tried_again_but_not_for_ever(file, tmp_path):
    sweep = planned(file, tmp_path / "sweep", "TRIES=1")
    folder = run_folder(sweep.folder, sweep.cells[0].id)
    for attempts, ids in ((1, [cell.id for cell in sweep.cells]), (2, [sweep.cells[1].id])):
        with hold(folder):
            write_json(folder / "cell.json", {"state": "running", "attempts": attempts})
        assert [task.id for task in engine._waiting(sweep, [])] == ids
        assert state_of(folder) == {"state": "failed", "reason": engine.KILLED, "attempts": attempts}


def test_a_cell_that_its_cluster_stopped_is_submitted_again_and_stays_as_it_is_until_it_runs(file, tmp_path):
    sweep = planned(file, tmp_path / "sweep")
    stopped = {"state": "stopped", "reason": "stopped on request", "attempts": 0}
    with hold(folder := run_folder(sweep.folder, sweep.cells[1].id)):
        write_json(folder / "cell.json", stopped)
        assert [task.id for task in engine._waiting(sweep, [])] == [sweep.cells[0].id], "its process has not ended"
    assert [task.id for task in engine._waiting(sweep, [])] == [cell.id for cell in sweep.cells]
    assert state_of(folder) == stopped


def test_a_sweep_waits_for_a_cell_that_another_one_runs(file, tmp_path):
    sweep = planned(file, tmp_path / "sweep")
    for cell in sweep.cells:
        with hold(folder := run_folder(sweep.folder, cell.id)):
            write_json(folder / "cell.json", {"state": "done", "attempts": 1})
    waits = threading.Thread(target=engine.run, args=(sweep, Here(), print), kwargs={"show_table": False})
    with hold(folder):
        waits.start()
        waits.join(3 * engine.POLL_SECONDS)
        assert waits.is_alive() and not (sweep.folder / "results.json").exists()
    waits.join(60)
    assert not waits.is_alive() and (sweep.folder / "results.json").exists()


class Broken(Here):
    """An executor whose processes end before they reach a cell, as without the package on a cluster's nodes."""

    def __init__(self):
        self.submitted = 0

    def submit(self, job):
        self.submitted += 1
        return Ended(job.tasks)


def test_processes_that_never_begin_are_not_submitted_for_ever(file, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "POLL_SECONDS", 0.01)
    sweep, broken = planned(file, tmp_path / "sweep"), Broken()
    with pytest.raises(RunError, match="3 processes in a row ended before they began a run; see the logs in"):
        engine.run(sweep, broken, print, show_table=False)
    assert broken.submitted == engine.MOST_FRUITLESS


def test_a_sweep_in_the_folder_of_a_run_is_refused(file, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(CallerError, match="is that of a run, not of a sweep; give a folder of its own"):
        planned(file, tmp_path)


def test_sources_that_cannot_be_read_fail_their_cells_until_they_are_there(file, tmp_path):
    missing = tmp_path / "texts"
    axes = {"DATA_PATHS": [["gpt4moe/sweep"], [str(missing)]]}
    sweep = planned(file, tmp_path / "sweep", f"sweep.SweepConfig.axes={axes}")
    rows = engine.run(sweep, Here(), print, show_table=False)
    assert [row["state"] for row in rows] == ["done", "failed"]
    assert str(missing) in rows[1]["reason"] and rows[1]["attempts"] == 0
    missing.mkdir()
    for number in range(40):
        (missing / f"{number}.txt").write_text(f"text {number}\n" * 200)
    rows = engine.run(sweep, Here(), print, show_table=False)  # the same command again
    assert [(row["state"], row["reason"]) for row in rows] == [("done", None)] * 2


def test_a_printed_command_builds_the_run_of_its_cell(file, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "inner.gin").write_text(SWEEP)
    overrides = (
        "sweep.SweepConfig.seeds=2",
        "TRIES=3",  # which nothing but the sweep reads
        "LEARNING_RATE=3e-3",
        "sweep.SweepConfig.axes={'ROUTER': ['@routers.noisy_top_k', '@routers.sigmoid_top_k'], 'NUM_EXPERTS': [1, 4]}",
    )
    paths = [str(elsewhere), str(tmp_path)]
    config, build = build_sweep(["inner.gin"], overrides, paths)
    sweep = engine.plan(config, build, str(tmp_path / "sweep"), print)
    commands = engine.launch_list(sweep, ["inner.gin"], overrides, paths)
    built = [cell for cell in sweep.cells if cell.refused is None]
    assert len(commands) == len(built) == 4 and len(sweep.cells) == 8, "one expert is too few to choose two of"
    for line, cell in zip(commands, built, strict=True):
        args = flags.parse(shlex.split(line)[1:])
        run, _ = build_run(args.gin_file, args.overrides, args.gin_search_paths)
        assert address(run) == cell.id and run.optimizer.learning_rate == 3e-3
        assert args.gin_search_paths == paths and args.workdir == str(run_folder(sweep.folder, cell.id))


def test_a_dry_run_leaves_nothing_and_says_what_is_refused(file, tmp_path, capsys):
    axes = "--gin.sweep.SweepConfig.axes={'EXPERTS_PER_TOKEN': [2, 9]}"
    words = ["sweep", f"--gin_file={file}", f"--workdir={tmp_path / 'sweep'}", axes]
    assert main([*words, "--dry_run"]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 and "'EXPERTS_PER_TOKEN': 9}: " in said.err
    assert not (tmp_path / "sweep").exists()
    assert main([*words, "--executor=list", "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [cell["state"] for cell in cells] == ["waiting", "failed"] and "experts_per_token=9" in cells[1]["reason"]
    assert json.loads((tmp_path / "sweep" / "manifest.json").read_text())["cells"] == cells


def running(folder, process, after=None, steps=3):
    """What a worker of the sweep says of its cell, past `steps` logged, in another process than `after`."""
    while process.poll() is None:
        for path in (folder / "sweep" / "runs").glob("*/cell.json"):
            state, log = json.loads(path.read_text()), path.parent / "metrics.jsonl"
            begun = log.exists() and log.stat().st_mtime > path.stat().st_mtime and log.read_text().count("\n") > steps
            if state["state"] == "running" and state["pid"] != after and begun:
                return path, state["pid"]
        time.sleep(0.02)
    raise AssertionError("the sweep has ended")


def status(pid, name):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))


def parent(pid):
    return int(status(pid, "PPid"))


def hears_no_interrupt(pid):
    return bool(int(status(pid, "SigBlk"), 16) & 1 << signal.SIGINT - 1)


def test_story_of_a_worker_killed_and_a_sweep_interrupted(tmp_path):
    settings = {"axes": {"NUM_EXPERTS": [4]}, "seeds": 1, "seed_names": (), "retries": 1}
    long = ("--gin.TRAIN_STEPS=100000", "--gin.CHECKPOINT_EVERY=100000")  # it ends on no machine before it is asked to
    words = command(tmp_path, settings, *long)
    with open(tmp_path / "err", "w") as err:
        given = {"cwd": ROOT, "env": environment(), "stdout": subprocess.DEVNULL, "stderr": err}
        # Where the tests run in a shell's background they ignore interrupts, and what they start would too.
        given["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        sweep = subprocess.Popen(words, start_new_session=True, **given)
        _, first = running(tmp_path, sweep)
        os.kill(first, signal.SIGKILL)
        cell, second = running(tmp_path, sweep, after=first)
        assert hears_no_interrupt(second) and hears_no_interrupt(parent(second)), "submitit's would kill it"
        os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does: to the sweep, submitit's controller and the worker
        assert sweep.wait(120) == 3
    assert "waiting for 1 jobs to save" in (tmp_path / "err").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)
    state = json.loads(cell.read_text())
    assert (state["state"], state["attempts"]) == ("stopped", 1), "that of the one that was killed"
    steps = [json.loads(line)["step"] for line in (cell.parent / "metrics.jsonl").read_text().splitlines()]
    assert (cell.parent / "checkpoints" / str(steps[-1])).is_dir() and steps[-1] > 3
    sweep = subprocess.Popen(words, start_new_session=True, **given | {"stderr": subprocess.DEVNULL})
    running(tmp_path, sweep, after=second, steps=steps[-1])
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(120) == 3
    more = [json.loads(line)["step"] for line in (cell.parent / "metrics.jsonl").read_text().splitlines()]
    assert more == [*range(1, more[-1] + 1)] and more[-1] > steps[-1], "it went on where it had stopped"


def test_what_is_started_while_shielded_hears_no_interrupt():
    with shielded():
        started = subprocess.Popen(["sleep", "60"])
    started.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        started.wait(0.3)
    assert started.poll() is None
    started.kill()
    started.wait()
