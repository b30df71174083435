"""Dense peak rates and memory of accelerators, from the vendors' data sheets."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator: dense 16-bit peak in FLOP/s, memory in bytes, memory bandwidth in bytes/s.

    `device_kinds` are the names JAX reports (`jax.Device.device_kind`), matched as prefixes. clock_hertz: of a TPU, in
    whose cycles its compiler estimates times.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: float
    memory_bytes: float
    bandwidth_bytes_per_second: float
    clock_hertz: float | None = None


CHIPS = (
    Chip("a100_40", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312e12, 40e9, 1.555e12),
    Chip("a100_80", ("NVIDIA A100",), 312e12, 80e9, 2.039e12),
    Chip("h200", ("NVIDIA H200",), 989.5e12, 141e9, 4.8e12),
    Chip("h100", ("NVIDIA H100",), 989.4e12, 80e9, 3.35e12),
    Chip("gb200", ("NVIDIA GB200",), 2500e12, 186e9, 8.0e12),
    Chip("b200", ("NVIDIA B200",), 2250e12, 180e9, 8.0e12),
    Chip("v100", ("Tesla V100",), 125e12, 32e9, 0.9e12),
    Chip("t4", ("Tesla T4",), 65e12, 16e9, 0.32e12),
    Chip("l4", ("NVIDIA L4",), 121e12, 24e9, 0.3e12),
    Chip("a10", ("NVIDIA A10",), 125e12, 24e9, 0.6e12),
    Chip("tpu_v4", ("TPU v4",), 275e12, 32e9, 1.2e12),
    Chip("tpu_v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16e9, 0.82e12),
    Chip("tpu_v5p", ("TPU v5",), 459e12, 95e9, 2.765e12, 1.75e9),
    Chip("tpu_v6e", ("TPU v6",), 918e12, 32e9, 1.64e12, 1.75e9),
    Chip("tpu_7x", ("TPU7x", "TPU v7"), 2307e12, 192 * 2**30, 7.37e12),
)


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip that JAX calls `device_kind`, or None where it is not in the table (a CPU, say)."""
    return next((chip for chip in CHIPS if device_kind.startswith(chip.device_kinds)), None)
