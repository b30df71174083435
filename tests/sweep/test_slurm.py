"""A sweep on a real Slurm: one job is killed and its runs tried again; results are those of the local executor."""

import contextlib
import json
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.sweep import one_node_slurm
from tests.sweep.test_sweep import AXES, ROOT, command, environment, measured, run

SLURM = ("--executor=slurm", "--parallel=2", "--job_parameters=cpus_per_task=1")


@pytest.fixture(scope="module")
def slurm():
    why = one_node_slurm.missing()
    if why:
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:  # a socket's path must be short
        Path(folder).chmod(0o755)
        with contextlib.ExitStack() as running:
            try:
                found = running.enter_context(one_node_slurm.cluster(Path(folder)))
            except one_node_slurm.NoCluster as why:
                pytest.skip(str(why))
            yield environment() | found


def jobs(folder):
    """What the jobs of a sweep left, by Slurm's number."""
    return {path.name.split("_")[0] for path in (folder / "sweep" / "jobs").glob("*_log.out")}


def test_a_cancelled_job_is_tried_again_and_results_are_those_of_this_machine(slurm, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    settings = AXES | {"runs_per_job": 2}
    with open(there / "out", "w") as out, open(there / "err", "w") as err:
        sweep = subprocess.Popen(command(there, settings, *SLURM), cwd=ROOT, env=slurm, stdout=out, stderr=err)
        cancelled = _cancel_one(there, slurm)
        assert sweep.wait(500) == 0, (there / "err").read_text()
    rows = json.loads((there / "out").read_text())["rows"]
    assert [row["state"] for row in rows] == ["done"] * 4
    assert cancelled in jobs(there) and len(jobs(there)) >= 3, "two jobs, and one in the place of the cancelled one"
    assert run(here, settings)[0] == 0
    assert measured(there) == measured(here)


def _cancel_one(folder, env):
    """Cancels a job as soon as one of its runs has begun, and returns its number."""
    for _ in range(600):
        begun = [path for path in (folder / "sweep" / "runs").glob("*/cell.json") if '"running"' in path.read_text()]
        listed = subprocess.run(["squeue", "-h", "-t", "R", "-o", "%i"], capture_output=True, text=True, env=env)
        if begun and listed.stdout.split():
            number = listed.stdout.split()[0]
            subprocess.run(["scancel", "--signal=KILL", "--full", number], check=True, env=env)
            return number
        time.sleep(0.2)
    raise AssertionError("no job has begun")
