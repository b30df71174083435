"""What `gpt4moe doctor` finds: devices, versions, memory, disk, and whether a model's training state fits."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import shutil

import jax

from gpt4moe.accounting import memory
from gpt4moe.accounting.chips import find_chip
from gpt4moe.accounting.summary import scaled
from gpt4moe.config.model import ModelConfig

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "gin-config", "tokenizers", "numpy")
# Activations, compiled programs and the runtime take the rest.
USABLE_FRACTION = 0.8
SCARCE_DISK_BYTES = 5e9


def examine(model: ModelConfig | None, folder: str | os.PathLike, num_trained: int | None = None) -> dict:
    """Returns the JSON document of `doctor`.

    Args:
      model: the model to fit, None to look at the machine alone.
      folder: where runs are written; its disk is measured.
      num_trained: parameters of the model that are not frozen, None for all.
    """
    devices = [_device(device) for device in jax.local_devices()]
    disk = shutil.disk_usage(_existing(pathlib.Path(folder)))
    document = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "backend": jax.default_backend(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "host_memory_bytes": host_memory_bytes(),
        "devices": devices,
        "disk_free_bytes": disk.free,
        "warnings": [],
    }
    if disk.free < SCARCE_DISK_BYTES:
        document["warnings"].append(f"only {scaled(disk.free)}B free on the disk of {folder}: checkpoints may not fit")
    if model is not None:
        document["model"] = _fit(model, num_trained, document)
    return document


def format_findings(document: dict) -> str:
    """Returns the document of `examine` as lines to read."""
    kinds: dict[str, int] = {}
    for device in document["devices"]:
        kinds[device["kind"]] = kinds.get(device["kind"], 0) + 1
    lines = [
        f"python      {document['python']} on {document['platform']}",
        "libraries   " + ", ".join(f"{name} {version}" for name, version in document["versions"].items()),
        f"devices     {', '.join(f'{number} x {kind}' for kind, number in kinds.items())} ({document['backend']})",
        f"cpu         {document['cpu_cores']} cores, {scaled(document['host_memory_bytes'])}B memory",
        f"disk        {scaled(document['disk_free_bytes'])}B free",
    ]
    if "model" in document:
        fit = document["model"]
        verdict = "fits" if fit["fits"] else "does not fit"
        lines.append(
            f"model       {verdict}: parameters, gradients and AdamW state take {scaled(fit['train_state_bytes'])}B, "
            f"{scaled(fit['usable_bytes'])}B are usable on {fit['where']}"
        )
    lines += [f"warning     {warning}" for warning in document["warnings"]]
    return "\n".join(lines)


def host_memory_bytes() -> int:
    """Physical memory of this host in bytes, or what its container may use where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return physical if text == "max" else min(physical, int(text))


def _device(device: jax.Device) -> dict:
    statistics = device.memory_stats() or {}
    chip = find_chip(device.device_kind)
    total = statistics.get("bytes_limit") or (chip.memory_bytes if chip else None)
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "memory_bytes": total,
        "peak_flops": chip.peak_flops if chip else None,
    }


def _fit(model: ModelConfig, num_trained: int | None, document: dict) -> dict:
    """Whether the training state, sharded evenly, fits on the devices there are (a CPU's is the host's memory)."""
    accelerators = [device["memory_bytes"] for device in document["devices"] if device["platform"] != "cpu"]
    total = sum(accelerators) if accelerators and all(accelerators) else document["host_memory_bytes"]
    needed = memory.train_state_bytes(model, num_trained)
    usable = USABLE_FRACTION * total
    where = f"{len(accelerators)} device(s)" if accelerators else "this host"
    return {"train_state_bytes": needed, "usable_bytes": int(usable), "fits": needed <= usable, "where": where}


def _existing(folder: pathlib.Path) -> pathlib.Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
