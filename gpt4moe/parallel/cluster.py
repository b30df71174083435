"""How the processes of a job find each other: by flags, Slurm, Open MPI, Kubernetes or a TPU pod's metadata.

What a scheduler sets is read by JAX's own detection, so that every scheduler that JAX knows works here. Nothing is
asked of any server unless the environment says that there is a cluster: a laptop starts at once.
"""

from __future__ import annotations

import dataclasses
import os

from gpt4moe.config.check import CallerError, one_line, require

# The number of a pod in an indexed job, and what marks the processes that JAX finds without asking Kubernetes.
POD_INDEX = "JOB_COMPLETION_INDEX"
FOUND_WITHOUT_KUBERNETES = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "SLURM_PROCID", "OMPI_MCA_orte_hnp_uri")
DETECTION_SECONDS = 300
MEND = "give --coordinator=HOST:PORT, --num_processes and --process_id, or --num_processes=1 to train alone"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Several processes that train together, and which of them this one is.

    coordinator: `host:port`, a port that process 0 may listen on. local_devices: which accelerators of the host are
    this process's, None for all that it sees.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        is_address = bool(host) and port.isdigit() and 0 < int(port) < 65536
        require(is_address, "--coordinator", self.coordinator, "must be HOST:PORT")
        require(self.num_processes > 1, "--num_processes", self.num_processes, "must be at least 2 with --coordinator")
        is_one = 0 <= self.process_id < self.num_processes
        constraint = f"must be from 0 to {self.num_processes - 1}, of --num_processes={self.num_processes}"
        require(is_one, "--process_id", self.process_id, constraint, "change one of them")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator, as sockets take them."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def find_cluster(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Cluster | None:
    """The cluster that the flags name, else the one that the environment shows; None for a process on its own.

    Raises `CallerError` for flags that are half given or contradict each other, and for a cluster that cannot be read.
    """
    flags = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    given = {name: value for name, value in flags.items() if value is not None}
    missing = [name for name in flags if name not in given]
    if not given:
        return _detected()
    if num_processes == 1 and coordinator is None and not process_id:
        return None
    require(not missing, *next(iter(given.items())), f"needs {' and '.join(missing)} as well", MEND)
    return Cluster(coordinator, num_processes, process_id)


def _detected() -> Cluster | None:
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    if in_pod and not any(name in os.environ for name in (POD_INDEX, *FOUND_WITHOUT_KUBERNETES)):
        return None  # a pod that is no part of an indexed job is alone, and may not be allowed to ask
    from jax._src import clusters

    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    try:
        coordinator, num_processes, process_id, devices = detect(None, None, None, None, None, DETECTION_SECONDS)
    except Exception as error:
        raise CallerError(f"the cluster around this process cannot be read ({one_line(error)}); {MEND}") from error
    if coordinator is None:
        index = os.environ.get(POD_INDEX) if in_pod else None
        require(index is None, POD_INDEX, index, "speaks of other pods, which only package kubernetes can find", MEND)
        return None
    if num_processes == 1:
        return None
    return Cluster(coordinator, num_processes, process_id, None if _sees_its_own_devices() else tuple(devices or ()))


def _sees_its_own_devices() -> bool:
    """Whether to leave out JAX's rule for Slurm and Open MPI, one accelerator a process, by its number on the host.

    A process that is alone on its node should have all, and `JAX_LOCAL_DEVICE_IDS` is the user's own choice.
    """
    alone_on_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"
    return alone_on_node or "JAX_LOCAL_DEVICE_IDS" in os.environ
