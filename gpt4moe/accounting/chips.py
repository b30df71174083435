"""Accelerators from their vendors' data sheets: peak rates, memory, links to other chips, power, price of an hour."""

from __future__ import annotations

import dataclasses

from gpt4moe.config.check import CallerError, near


@dataclasses.dataclass(frozen=True)
class Network:
    """How chips reach each other; bandwidths are of one chip in one direction.

    domain_chips: chips that the fast links join (a server's NVLink domain, a TPU pod); domain_bytes_per_second: of one
    chip into it, all of its links together; torus_axes: dimensions of a TPU's torus, 0 for a switch;
    outside_bytes_per_second: a chip's share of the network between domains (InfiniBand, data-centre network).
    """

    domain_chips: int
    domain_bytes_per_second: float
    outside_bytes_per_second: float
    torus_axes: int = 0


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator: dense 16-bit peak in FLOP/s, memory in bytes, memory bandwidth in bytes/s.

    `device_kinds` are the names JAX reports (`jax.Device.device_kind`), matched as prefixes. clock_hertz: of a TPU, in
    whose cycles its compiler estimates times. peak_8bit_ops: per second, in fp8 or int8, None where it has neither;
    has_fp8: whether fp8 is among them. dollars_per_hour: rented on demand; watts: of the chip at full load. None where
    nobody says.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: float
    memory_bytes: float
    bandwidth_bytes_per_second: float
    clock_hertz: float | None = None
    network: Network | None = None
    peak_8bit_ops: float | None = None
    dollars_per_hour: float | None = None
    watts: float | None = None
    has_fp8: bool = False


NVLINK3, NVLINK3_SLOW, NVLINK4, NVLINK4_H800, NVLINK5 = 300e9, 200e9, 450e9, 200e9, 900e9
HDR, NDR = 25e9, 50e9  # 200 and 400 Gbit/s to each chip
DCN = 6.25e9  # a TPU's share of its host's network


def _server(scale_up: float, scale_out: float, chips: int = 8) -> Network:
    return Network(chips, scale_up, scale_out)


def _torus(link: float, axes: int, chips: int) -> Network:
    return Network(chips, 2 * axes * link, DCN, axes)


CHIPS = (
    Chip(
        "a100_40", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312e12, 40e9, 1.555e12,
        network=_server(NVLINK3, HDR), peak_8bit_ops=624e12, dollars_per_hour=1.10, watts=400,
    ),
    Chip(
        "a100_80", ("NVIDIA A100",), 312e12, 80e9, 2.039e12,
        network=_server(NVLINK3, HDR), peak_8bit_ops=624e12, dollars_per_hour=1.89, watts=400,
    ),
    Chip("a800", ("NVIDIA A800",), 312e12, 80e9, 2.039e12, network=_server(NVLINK3_SLOW, HDR), peak_8bit_ops=624e12),
    Chip(
        "h200", ("NVIDIA H200",), 989.5e12, 141e9, 4.8e12,
        network=_server(NVLINK4, NDR), peak_8bit_ops=1979e12, dollars_per_hour=3.5, watts=700, has_fp8=True,
    ),
    Chip(
        "h800", ("NVIDIA H800",), 989.4e12, 80e9, 3.35e12,
        network=_server(NVLINK4_H800, NDR), peak_8bit_ops=1979e12, dollars_per_hour=2.0, watts=700, has_fp8=True,
    ),
    Chip(
        "h100", ("NVIDIA H100",), 989.4e12, 80e9, 3.35e12,
        network=_server(NVLINK4, NDR), peak_8bit_ops=1979e12, dollars_per_hour=2.99, watts=700, has_fp8=True,
    ),
    Chip(
        "gb200", ("NVIDIA GB200",), 2500e12, 186e9, 8.0e12,
        network=_server(NVLINK5, NDR, 72), peak_8bit_ops=5000e12, watts=1200, has_fp8=True,
    ),
    Chip(
        "b200", ("NVIDIA B200",), 2250e12, 180e9, 8.0e12,
        network=_server(NVLINK5, NDR), peak_8bit_ops=4500e12, dollars_per_hour=5.0, watts=1000, has_fp8=True,
    ),
    Chip("v100", ("Tesla V100",), 125e12, 32e9, 0.9e12, network=_server(150e9, 12.5e9), watts=300),
    Chip("t4", ("Tesla T4",), 65e12, 16e9, 0.32e12, peak_8bit_ops=130e12, watts=70),
    Chip("l4", ("NVIDIA L4",), 121e12, 24e9, 0.3e12, peak_8bit_ops=242e12, watts=72, has_fp8=True),
    Chip("a10", ("NVIDIA A10",), 125e12, 24e9, 0.6e12, peak_8bit_ops=250e12, watts=150),
    Chip("tpu_v3", ("TPU v3",), 123e12, 32e9, 0.9e12, network=_torus(82e9, 2, 1024)),
    Chip(
        "tpu_v4", ("TPU v4",), 275e12, 32 * 2**30, 1.2e12,
        network=_torus(45e9, 3, 4096), peak_8bit_ops=275e12, dollars_per_hour=3.22, watts=192,
    ),
    Chip(
        "tpu_v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16e9, 0.82e12,
        network=_torus(45e9, 2, 256), peak_8bit_ops=394e12, dollars_per_hour=1.20,
    ),
    Chip(
        "tpu_v5p", ("TPU v5",), 459e12, 95e9, 2.765e12, 1.75e9,
        network=_torus(90e9, 3, 8960), peak_8bit_ops=918e12, dollars_per_hour=4.20,
    ),
    Chip(
        "tpu_v6e", ("TPU v6",), 918e12, 32e9, 1.64e12, 1.75e9,
        network=_torus(90e9, 2, 256), peak_8bit_ops=1836e12, dollars_per_hour=2.70,
    ),
    Chip(
        "tpu_7x", ("TPU7x", "TPU v7"), 2307e12, 192 * 2**30, 7.37e12,
        network=_torus(100e9, 3, 9216), peak_8bit_ops=4614e12, has_fp8=True,
    ),
)  # fmt: skip


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip that JAX calls `device_kind`, or None where it is not in the table (a CPU, say)."""
    return next((chip for chip in CHIPS if device_kind.startswith(chip.device_kinds)), None)


def chip_named(name: str) -> Chip:
    """Returns the chip of this name in the table; raises `CallerError` with the names nearest to an unknown one."""
    by_name = {chip.name: chip for chip in CHIPS}
    if name not in by_name:
        raise CallerError(f"chip={name!r} is not in the table; near: {near(name, by_name)}")
    return by_name[name]
