"""Devices of a machine that is not there: a TPU torus known to the compiler, or emulated CPU devices."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from gpt4moe.config.check import CallerError, one_line, require
from gpt4moe.config.compile import CompileConfig

# The TPU library looks for the machine it runs on; on one without a TPU these tell it not to. Any TPU's name will do:
# which one is compiled for is in the topology.
NOT_ON_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilers at once share no device
}


def devices(config: CompileConfig) -> list[jax.Device]:
    """Returns the devices to compile for; nothing can run on those of a TPU.

    Raises `CallerError` where the TPU compiler is not installed or knows no such topology, or JAX has already started
    with another number of emulated devices.
    """
    jax.config.update("jax_platforms", "cpu")  # else JAX, finding libtpu, looks for a TPU
    kind, _, size = config.topology.partition(":")
    return _emulated(int(size)) if kind == "cpu" else _torus(config)


@contextlib.contextmanager
def without_flags() -> Iterator[None]:
    """Hides XLA_FLAGS: the TPU compiler reads them as it first compiles, and ends the process over one of XLA:CPU's.

    Those of a CPU have taken effect by then, when its devices were made.
    """
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        yield
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags


def _emulated(number: int) -> list[jax.Device]:
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has started, with as many as it was told then
            jax.config.update("jax_num_cpu_devices", number)
    there = jax.devices("cpu")
    mend = "give the same number to --cpu_devices"
    require(
        len(there) >= number, "topology", f"cpu:{number}", f"needs {number} devices, {len(there)} are emulated", mend
    )
    return there[:number]


def _torus(config: CompileConfig) -> list[jax.Device]:
    installed = importlib.util.find_spec("libtpu") is not None
    mend = "pip install -e '.[tpu-compile]'"
    require(installed, "topology", config.topology, "needs the TPU compiler, libtpu, which is not installed", mend)
    for name, value in NOT_ON_A_TPU.items():
        os.environ.setdefault(name, value)
    jax.devices("cpu")  # as many as flags say, before `without_flags` hides them
    try:
        slices = {"num_slices": config.slices} if config.slices > 1 else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=config.topology, **slices).devices
    except (RuntimeError, ValueError) as error:
        raise CallerError(f"topology={config.topology!r} is refused by the TPU compiler: {one_line(error)}") from error
