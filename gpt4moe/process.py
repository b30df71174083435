"""What must be set in this process before JAX is imported: allocator, logs of libraries, emulated devices."""

from __future__ import annotations

import glob
import importlib.util
import os
import platform
import sys

# Where the kernel shows the chips of a TPU host.
TPU_CHIPS = ("/dev/accel*", "/dev/vfio/[0-9]*")


def restart_with_huge_pages() -> None:
    """On a CPU a tenth of a training step goes to page faults of its temporaries, unless they lie in huge pages.

    glibc reads the setting as a process starts, so the process starts once more with it.
    """
    setting = "glibc.malloc.hugetlb=1"
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = setting
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def quiet(cpu_devices: int | None) -> None:
    """A newcomer's first minute shows progress, not the logs of libraries. `cpu_devices`: emulated in this process."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if cpu_devices or _only_compiles_for_tpus():
        os.environ["JAX_PLATFORMS"] = "cpu"
    if cpu_devices:
        flag = f" --xla_force_host_platform_device_count={cpu_devices}"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag


def _only_compiles_for_tpus() -> bool:
    """Whether libtpu is here for its compiler alone: JAX would look for a TPU with it, and it would complain."""
    accelerators = ("libtpu", "jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin")
    installed = [name for name in accelerators if importlib.util.find_spec(name)]
    chips = [path for pattern in TPU_CHIPS for path in glob.glob(pattern)]
    return installed == ["libtpu"] and not chips and "JAX_PLATFORMS" not in os.environ
