"""The files of docs/launch: run as far as they can be without their schedulers, which stand-ins on PATH speak for."""

import json
import math
import os
import pathlib
import shlex
import subprocess
import sys

import pytest
import yaml

from gpt4moe import flags
from gpt4moe.configure import build_run
from gpt4moe.launch import CALLER_MISTAKE, DONE, FAULT, STOPPED

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "docs/launch"
# Tasks of one node, each with the environment that `srun` gives it.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
tasks=${SLURM_NTASKS:-1}
export SLURM_STEP_NODELIST=localhost SLURM_STEP_TASKS_PER_NODE=$tasks SLURM_NTASKS=$tasks SLURM_PROCID SLURM_LOCALID
for ((SLURM_PROCID = 0; SLURM_PROCID < tasks; SLURM_PROCID++)); do
  SLURM_LOCALID=$SLURM_PROCID
  "$@" > "task$SLURM_PROCID" 2>&1 & pids[SLURM_PROCID]=$!
done
worst=0
for pid in "${pids[@]}"; do wait "$pid" || { code=$?; ((code > worst)) && worst=$code; }; done
exit $worst
"""
# A slice that has to be asked for and waited for; what is run on its hosts is run here, in HOST.
GCLOUD = """#!/bin/bash
printf '%s\\x1f' "$@" >> "$LOG"; printf '\\x1e' >> "$LOG"
case $* in
  *describe*) [[ -e $LOG.made ]] || exit 1
    if [[ -e $LOG.asked ]]; then echo ACTIVE; else touch "$LOG.asked"; echo PROVISIONING; fi ;;
  *create*) touch "$LOG.made" ;;
  *ssh*train*) cd "$HOST" && command=${!#} && exec bash -c "${command#--command=}" ;;
esac
"""


def program(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path):
    """Runs the batch script in a folder whose gpt4moe is `command`; gives its exit code and what it asked of Slurm."""
    program(tmp_path / "bin/srun", SRUN)
    program(tmp_path / "bin/scontrol", '#!/bin/bash\necho "$@" > asked\n')

    def run(command: str, *words: str, **environment: str) -> tuple[int, str]:
        program(tmp_path / ".venv/bin/gpt4moe", f'#!/bin/bash\n{command} "$@"\n')
        names = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **environment}
        script = ["bash", str(LAUNCH / "slurm_gpu.sbatch"), *words]
        ended = subprocess.run(
            script, cwd=tmp_path, env=os.environ | names, capture_output=True, text=True, timeout=300
        )
        asked = tmp_path / "asked"
        return ended.returncode, asked.read_text().strip() if asked.exists() else ""

    return run


def test_two_tasks_of_slurm_train_together(slurm, tmp_path):
    (tmp_path / "words.txt").write_text("A fox and a dog went out. " * 400)
    words = [f"--gin.DATA_PATHS=['{tmp_path / 'words.txt'}']", "--gin.MESH={'fsdp': 4}", "--cpu_devices=2"]
    words += ["--gin_file=gin_configs/run/tiny.gin", "--gin.TRAIN_STEPS=2", f"--workdir={tmp_path / 'run'}", "--json"]
    fast = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT), "SLURM_NTASKS": "2"}
    code, asked = slurm(f"{sys.executable} -m gpt4moe.launch", *words, **fast)
    assert (code, asked) == (DONE, ""), (tmp_path / "task0").read_text()
    assert len(json.loads((tmp_path / "run/environment.json").read_text())["devices"]) == 4
    assert '"step": 2' in (tmp_path / "task0").read_text()


@pytest.mark.parametrize("code", [STOPPED, FAULT, 137])
def test_slurm_queues_a_job_again_that_stopped_or_failed(slurm, code):
    assert slurm(f"exit {code};") == (DONE, "requeue 7")


def test_slurm_does_not_repeat_a_mistake_nor_a_success_nor_for_ever(slurm):
    assert slurm(f"exit {CALLER_MISTAKE};") == (CALLER_MISTAKE, "")
    assert slurm("true") == (DONE, "")
    assert slurm(f"exit {FAULT};", SLURM_RESTART_COUNT="3", MAX_RESTARTS="3") == (FAULT, "")


def test_slurm_gives_a_process_all_gpus_of_its_node_and_time_to_save():
    lines = (LAUNCH / "slurm_gpu.sbatch").read_text().splitlines()
    options = dict(line.split("--")[1].partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert options["ntasks-per-node"] == "1" and options["gpus-per-node"] == "8"
    assert options["signal"].startswith("TERM@") and "requeue" in options


def test_the_manifest_spans_the_chips_of_its_run():
    manifest = yaml.safe_load((LAUNCH / "gke_tpu_jobset.yaml").read_text())
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    command, *words = container["command"]
    arguments = flags.parse(words)
    run, text = build_run(arguments.gin_file, arguments.overrides)
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x"))) * replicated["replicas"]
    assert command == "gpt4moe" and arguments.command == "train"
    assert math.prod(run.mesh.sizes(chips).values()) == chips
    assert f'TOPOLOGY = "v5p:{topology}"' in (ROOT / arguments.gin_file[0]).read_text()
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert job["completions"] == job["parallelism"]
    assert run.data.store in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [CALLER_MISTAKE]
    assert "gs://BUCKET/corpus/" in text


def test_a_slice_is_made_waited_for_and_trained_on_until_it_is_done(tmp_path):
    """The first try is preempted (code 3), the second ends; words arrive as they were typed."""
    program(tmp_path / "bin/gcloud", GCLOUD)
    host, log = tmp_path / "host", tmp_path / "log"
    record = 'printf "%s\\n" "$@" > ../words; [[ -e ../again ]] && exit 0; touch ../again; exit 3'
    program(host / ".venv/bin/gpt4moe", f"#!/bin/bash\n{record}\n")
    program(tmp_path / "bin/sleep", "#!/bin/bash\n")
    (host / "gpt4moe").mkdir()
    names = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "NAME": "pod", "ZONE": "z", "HOST": str(host)}
    words = [
        "--gin_file=gin_configs/run/gpt4_1p8t_v5p.gin",
        '--gin.DATA_PATHS=["gs://mine/a b/"]',
        "--workdir=gs://m/r",
    ]
    script = ["bash", str(LAUNCH / "tpu_pod.sh"), *words]
    ended = subprocess.run(script, env=os.environ | names | {"LOG": str(log)}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (host / "words").read_text().splitlines() == ["train", *words]
    calls = [call.split("\x1f")[:-1] for call in log.read_text().split("\x1e")[:-1]]
    (created,) = [call for call in calls if "create" in call]
    chips = math.prod(build_run(flags.parse(["train", *words]).gin_file)[0].mesh.sizes(2048).values())
    assert f"--accelerator-type=v5p-{2 * chips}" in created and "--runtime-version=v2-alpha-tpuv5" in created
    assert sum("describe" in call for call in calls) >= 3
    assert any("scp" in call for call in calls) and any("pip install" in call[-1] for call in calls)


def test_a_mistake_ends_training_on_a_slice(tmp_path):
    program(tmp_path / "bin/gcloud", GCLOUD)
    program(tmp_path / "host/.venv/bin/gpt4moe", "#!/bin/bash\nexit 2\n")
    (tmp_path / "host/gpt4moe").mkdir()
    for made in ("log.made", "log.asked"):
        (tmp_path / made).touch()
    names = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "NAME": "pod", "ZONE": "z"}
    names |= {"LOG": str(tmp_path / "log"), "HOST": str(tmp_path / "host")}
    script = ["bash", str(LAUNCH / "tpu_pod.sh"), "--workdir=x"]
    assert subprocess.run(script, env=os.environ | names, capture_output=True, timeout=60).returncode == CALLER_MISTAKE


def test_the_readme_shows_every_launch_file_and_flags_that_exist():
    text = (LAUNCH / "README.md").read_text()
    assert [path.name for path in LAUNCH.iterdir() if f"({path.name})" not in text] == ["README.md"]
    examples = [line for line in text.splitlines() if line.startswith("gpt4moe train")]
    assert len(examples) == 2
    for example in examples:
        words = shlex.split(example.partition("#")[0].replace("...", "--workdir=x"))
        assert flags.parse(words[1:]).num_processes == 2
