"""A Slurm cluster of this machine alone, from the distribution's packages, with its state in one folder."""

import contextlib
import os
import shutil
import socket
import subprocess
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo")
SETTINGS = """
ClusterName=one
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
NodeName={host} CPUs={cores} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class NoCluster(Exception):
    """The daemons are there, but do not run on this machine."""


def missing():
    """What keeps a cluster from being started here; None where nothing does."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"no {', '.join(absent)}: install slurmctld, slurmd, slurm-client and munge"
    return None if os.geteuid() == 0 else "only root can start slurmd"


@contextlib.contextmanager
def cluster(folder):
    """Starts the daemons with everything in `folder`; yields the environment that finds them."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    settings = SETTINGS.format(folder=folder, host=socket.gethostname(), ports=_free_ports(2), cores=os.cpu_count())
    (folder / "slurm.conf").write_text(settings)
    given = {name: f"{folder}/munge.{name}" for name in ("key", "socket", "pid", "log", "seed")}
    flags = [f"--{name}-file={path}" for name, path in given.items() if name not in ("socket",)]
    programs = [
        ["munged", "--foreground", "--force", f"--socket={given['socket']}", *flags],
        ["slurmctld", "-D", "-f", f"{folder}/slurm.conf"],
        ["slurmd", "-D", "-f", f"{folder}/slurm.conf"],
    ]
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    environment = {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": path}
    with contextlib.ExitStack() as running:
        for program in programs:
            log = running.enter_context(open(folder / f"{program[0]}.out", "wb"))
            started = subprocess.Popen(program, stdout=log, stderr=log, env=os.environ | environment)
            running.callback(_end, started)
            time.sleep(0.5)
        _wait_until_idle(environment)
        yield environment


def _end(process):
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()


def _wait_until_idle(environment):
    for _ in range(60):
        command = ["sinfo", "--noheader", "--format=%t"]
        state = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment).stdout.strip()
        if state == "idle":
            return
        time.sleep(0.5)
    raise NoCluster(f"the cluster of one node did not come up: {state!r}")


def _free_ports(count):
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]
