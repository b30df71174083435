"""Jobs of several processes on this machine: the same losses, and a bounded, explained end when one of them goes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt4moe.config.check import CallerError, RunError
from gpt4moe.launch import main
from gpt4moe.parallel import muster
from gpt4moe.parallel.cluster import Cluster, find_cluster
from gpt4moe.parallel.multihost import RowGroup, row_group

SENTENCE = "The quick brown fox number {0} jumps over {0} lazy dogs and writes down what it saw.\n"
STEPS = 60
RUN_FILE = "--gin_file=gin_configs/run/tiny.gin"
# What a process of a cluster finds in its environment, and what this machine may have set.
CLUSTER_NAMES = ("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION_INDEX", "TPU_", "JAX_COORDINATOR", "JAX_LOCAL_")
MEMBER = """
import pathlib, sys, time
from gpt4moe import launch, process
process.quiet(1)
from gpt4moe.parallel.cluster import Cluster
from gpt4moe.parallel.multihost import job, mark, require_same
address, count, index, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4])
explain = lambda error: launch._explain("train", error)
limits = {"heartbeat_seconds": 2, "stall_seconds": 4}
with job(Cluster(address, count, index), prefix="gpt4moe train: ", explain=explain, **limits):
    (folder / f"joined{index}").touch()
    step = 0
    while not (folder / "asked").exists():
        time.sleep(0.1)
        if not (folder / f"still{index}").exists():
            mark(f"step {(step := step + 1)}")
    require_same("answer", (folder / f"answer{index}").read_text())
    time.sleep(1000)
"""


def spawn(words: list[str], count: int) -> list[subprocess.Popen]:
    """`count` processes of one job, with flags that let them find each other."""
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "GLIBC_TUNABLES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, *(word.format(index=index) for word in words)], env=environment, **pipes)
        for index in range(count)
    ]


def free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return f"localhost:{listener.getsockname()[1]}"


def wait_until(condition, processes: list[subprocess.Popen]) -> None:
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


@pytest.fixture
def started():
    """Processes put in here do not outlive the test."""
    processes = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


# ------------------------------------------------------------------------------------- training, killed and resumed


def train_words(corpus, workdir, mesh, *more):
    words = ["train", RUN_FILE, f"--workdir={workdir}", "--json"]
    macros = {"DATA_PATHS": [str(corpus)], "MESH": mesh, "TRAIN_STEPS": STEPS, "CHECKPOINT_EVERY": 5}
    return [*words, *(f"--gin.{name}={value}" for name, value in macros.items()), *more]


def train_together(corpus, workdir, mesh, count, *more):
    address = ["--coordinator=" + free_address(), f"--num_processes={count}", "--process_id={index}"]
    flags = [*address, "--cpu_devices=4", "--heartbeat_seconds=3", *more]
    words = [word.replace("{", "{{").replace("}", "}}") for word in train_words(corpus, workdir, mesh)]
    return spawn(["-m", "gpt4moe.launch", *words, *flags], count)


def losses(workdir) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(200):
        (folder / f"{number}.txt").write_text(SENTENCE.format(number) * 3)
    return folder


def test_a_job_is_killed_resumed_stopped_and_resumed_on_another_number_of_processes(corpus, tmp_path, started):
    """One run in three jobs of 2, 2 and 4 processes has the losses of one process that was never interrupted."""
    mesh, workdir = {"data": 2, "fsdp": 2, "tensor": 2}, tmp_path / "together"
    checkpoints = workdir / "checkpoints"

    started += (job := train_together(corpus, workdir, mesh, 2))
    wait_until((checkpoints / "5").exists, job)
    job[1].kill()
    killed = time.monotonic()
    assert job[0].wait(60) == 1
    assert time.monotonic() - killed < 60
    *_, reason = job[0].communicate()[1].splitlines()
    assert "process 1" in reason
    assert "has not been heard from for 3 s; the same command goes on from the last checkpoint" in reason
    first = losses(workdir)

    started += (job := train_together(corpus, workdir, mesh, 2))
    wait_until(lambda: max(losses(workdir)) > max(first), job)
    job[1].send_signal(signal.SIGINT)
    outputs = [process.communicate(timeout=120) for process in job]
    assert [process.returncode for process in job] == [3, 3], outputs
    assert "the same command goes on from there" in outputs[0][1]
    stopped_at = max(losses(workdir))
    assert first.items() <= losses(workdir).items()
    assert (checkpoints / str(stopped_at)).exists()
    assert stopped_at < STEPS

    mesh = {"data": 2, "fsdp": 2, "tensor": 4}
    started += (job := train_together(corpus, workdir, mesh, 4))
    outputs = [process.communicate(timeout=240) for process in job]
    assert [process.returncode for process in job] == [0] * 4, outputs
    assert json.loads(outputs[0][0])["step"] == STEPS
    assert [output for output, _ in outputs[1:]] == [""] * 3
    assert len(json.loads((workdir / "environment.json").read_text())["devices"]) == 16

    alone = tmp_path / "alone"
    assert main(train_words(corpus, alone, {"data": 2, "fsdp": 2, "tensor": 2})) == 0
    assert list(losses(workdir)) == list(range(1, STEPS + 1))
    assert losses(workdir) == pytest.approx(losses(alone), rel=1e-5)
    held_out = [json.loads((run / "evaluation.json").read_text())["sets"]["files"]["loss"] for run in (workdir, alone)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)


def test_processes_with_different_work_directories_are_refused(corpus, tmp_path, started):
    mesh, different = {"fsdp": 4, "tensor": 2}, f"--workdir={tmp_path}/run{{index}}"
    started += (job := train_together(corpus, tmp_path, mesh, 2, different))
    errors = [process.communicate(timeout=120)[1] for process in job]
    assert [process.returncode for process in job] == [2, 2], errors
    for error in errors:
        assert (
            f"workdir='{tmp_path}/run1' of process 1 differs from '{tmp_path}/run0' of process 0; start every" in error
        )


# ------------------------------------------------------------------------------------------------- one of them goes


@pytest.fixture
def address():
    return free_address()


@pytest.fixture
def members(tmp_path, started, address):
    """Three processes that have joined and wait."""
    program = MEMBER.replace("{", "{{").replace("}", "}}")
    started += spawn(["-c", program, address, "3", "{index}", str(tmp_path)], 3)
    wait_until(lambda: all((tmp_path / f"joined{index}").exists() for index in range(3)), started)
    return started


def last_words(process: subprocess.Popen) -> tuple[int, str]:
    lines = process.communicate(timeout=60)[1].splitlines()
    return process.returncode, lines[-1]


@pytest.mark.parametrize("gone", [1, 0])
def test_a_process_that_hangs_ends_the_others(members, gone):
    members[gone].send_signal(signal.SIGSTOP)
    for index in {0, 1, 2} - {gone}:
        code, line = last_words(members[index])
        assert code == 1
        assert line.startswith(
            f"gpt4moe train: process {gone} ({socket.gethostname()}) has not been heard from for 2 s;"
        )


@pytest.mark.parametrize("gone", [1, 0])
def test_a_process_that_beats_but_does_nothing_ends_all(members, gone, tmp_path):
    """Its main thread stands still, in a dead file system say; its heartbeat is another thread."""
    (tmp_path / f"still{gone}").touch()
    for member in members:
        code, line = last_words(member)
        assert code == 1
        assert re.search(rf"process {gone} \(.+\) beats but has been at (its beginning|step \d+) for 4 s; the", line)


def test_the_end_of_the_coordinator_is_explained(members):
    members[0].kill()
    for member in members[1:]:
        code, line = last_words(member)
        assert code == 1
        assert line.startswith("gpt4moe train: process 0, which coordinates the job at localhost:")
        assert line.endswith("is gone; the same command goes on from the last checkpoint")


def test_a_stranger_that_comes_to_a_running_job_leaves_it_alone(members, address, monkeypatch, tmp_path):
    monkeypatch.setattr(muster, "JOIN_SECONDS", 3)
    with pytest.raises(RunError, match="a job that runs already, or another program, listens there"):
        muster.muster(Cluster(address, 3, 1), print)
    for index in range(3):
        (tmp_path / f"answer{index}").write_text("yes" if index else "no")
    (tmp_path / "asked").touch()
    assert "answer='yes' of process" in last_words(members[0])[1]


def test_what_one_process_sees_differently_ends_all_with_the_code_of_a_mistake(members, tmp_path):
    for index, answer in enumerate(("yes", "yes", "no")):
        (tmp_path / f"answer{index}").write_text(answer)
    (tmp_path / "asked").touch()
    code, line = last_words(members[2])
    difference = "answer='no' of process 2 differs from 'yes' of process 0"
    assert code == 2 and line.startswith(f"gpt4moe train: {difference}")
    for member in members[:2]:
        code, line = last_words(member)
        assert code == 2
        assert line.startswith(f"gpt4moe train: process 2 ({socket.gethostname()}) ended the job: {difference}")


def test_a_coordinator_whose_port_is_taken_is_one_line(started, tmp_path):
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        flags = [f"--coordinator=localhost:{port}", "--num_processes=2", "--process_id=0"]
        started += spawn(["-m", "gpt4moe.launch", "train", RUN_FILE, f"--workdir={tmp_path}", *flags], 1)
        taken = f"gpt4moe train: --coordinator=localhost:{port}: port {port} cannot be listened on"
        code, line = last_words(started[0])
        assert code == 1 and line.startswith(taken)


# ------------------------------------------------------------------------------------------------ who is in the job


@pytest.fixture
def no_cluster(monkeypatch):
    for name in list(os.environ):
        if name.startswith(CLUSTER_NAMES):
            monkeypatch.delenv(name)
    return monkeypatch


def test_a_laptop_and_a_lone_pod_are_alone(no_cluster):
    assert find_cluster(None, None, None) is None
    no_cluster.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert find_cluster(None, None, None) is None


def test_slurm_tells_who_is_in_the_job(no_cluster):
    names = {"JOB_ID": 7, "STEP_NODELIST": "node[03-05]", "NTASKS": 3, "PROCID": 2, "LOCALID": 0}
    for name, value in names.items():
        no_cluster.setenv(f"SLURM_{name}", str(value))
    no_cluster.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x3)")
    found = find_cluster(None, None, None)
    assert (found.coordinator.partition(":")[0], found.num_processes, found.process_id) == ("node03", 3, 2)
    assert found.local_devices is None
    no_cluster.setenv("SLURM_STEP_TASKS_PER_NODE", "3")
    assert find_cluster(None, None, None).local_devices == (0,)
    no_cluster.setenv("JAX_LOCAL_DEVICE_IDS", "0,1")
    assert find_cluster(None, None, None).local_devices is None
    assert find_cluster(None, 1, None) is None
    assert find_cluster("other:1", 2, 0) == Cluster("other:1", 2, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("here:1", None, None), "--coordinator='here:1' needs --num_processes and --process_id as well"),
        ((None, 2, 0), "--num_processes=2 needs --coordinator as well"),
        (("here:1", 2, 2), "--process_id=2 must be from 0 to 1"),
        (("here", 2, 0), "--coordinator='here' must be HOST:PORT"),
        (("here:1", 1, 0), "--num_processes=1 must be at least 2"),
    ],
)
def test_flags_of_a_job_that_cannot_be_meant_are_refused(no_cluster, flags, message, capsys, tmp_path):
    with pytest.raises(CallerError) as caught:
        find_cluster(*flags)
    assert message in str(caught.value)
    names = ("coordinator", "num_processes", "process_id")
    words = [f"--{name}={value}" for name, value in zip(names, flags, strict=True) if value is not None]
    assert main(["train", RUN_FILE, f"--workdir={tmp_path / 'run'}", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_pod_of_an_indexed_job_does_not_train_alone_by_mistake(no_cluster):
    no_cluster.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    no_cluster.setenv("JOB_COMPLETION_INDEX", "1")
    no_cluster.setitem(sys.modules, "kubernetes", None)
    with pytest.warns(UserWarning, match="kubernetes"), pytest.raises(CallerError, match="JOB_COMPLETION_INDEX='1'"):
        find_cluster(None, None, None)


# ------------------------------------------------------------------------------------------- whose rows a host reads


def groups_of(axes: dict[str, int], devices_of_process: int, *, rows: int = 8, order=None) -> list[RowGroup]:
    """The row group of every process, where processes hold neighbouring devices of a mesh of all eight."""
    devices = np.array(jax.devices())[order if order is not None else slice(None)]
    mesh = Mesh(devices.reshape(tuple(axes.values())), tuple(axes))
    spec = PartitionSpec(None, tuple(axis for axis in axes if axis in ("data", "expert")))
    batch = jax.ShapeDtypeStruct((2, rows, 4), np.int32, sharding=NamedSharding(mesh, spec))
    return [
        row_group(batch, process, lambda device: device.id // devices_of_process)
        for process in range(8 // devices_of_process)
    ]


def test_processes_read_their_own_rows_and_share_those_of_their_stages_and_shards():
    assert groups_of({"data": 8}, 4) == [RowGroup(0, 2), RowGroup(1, 2)]
    assert groups_of({"data": 2, "tensor": 4}, 2) == [RowGroup(0, 2)] * 2 + [RowGroup(1, 2)] * 2
    assert groups_of({"tensor": 8}, 4) == [RowGroup(0, 1)] * 2  # more processes than shards of data
    assert groups_of({"stage": 2, "expert": 4}, 2) == [RowGroup(0, 2), RowGroup(1, 2)] * 2


def test_a_process_may_hold_rows_that_are_not_neighbours():
    interleaved = [0, 4, 1, 5, 2, 6, 3, 7]
    assert groups_of({"data": 8}, 4, order=interleaved) == [RowGroup(0, 2), RowGroup(1, 2)]


def test_processes_with_parts_of_the_same_rows_are_refused():
    with pytest.raises(CallerError, match="overlapping parts of the rows"):
        groups_of({"data": 4, "tensor": 2}, 4, order=[0, 1, 2, 4, 3, 5, 6, 7])


def test_a_process_outside_the_mesh_is_refused():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    batch = jax.ShapeDtypeStruct((1, 4, 4), np.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(CallerError, match="lies on 1 devices, none of them of process 1; give a MESH over"):
        row_group(batch, 1, lambda device: device.id // 4)
