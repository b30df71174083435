"""From a `MeshConfig` to the device mesh that a run is laid out on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gpt4moe.config.check import CallerError, one_line, require
from gpt4moe.config.mesh import MESH_AXES, MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with all of `MESH_AXES`, in an order that keeps `tensor` on neighbouring devices.

    An empty config uses one device. `devices` may be those of an ahead-of-time topology. Where `config.dcn` has
    degrees, each part of an axis within them stays inside one slice or node. Raises `CallerError` where the sizes do
    not multiply to the device count or do not fit the network.
    """
    devices = list(jax.devices() if devices is None else devices)
    devices = devices if config.axes else devices[:1]
    sizes = config.sizes(len(devices))
    slow = tuple(config.dcn_sizes(sizes).values())
    fast = tuple(size // across for size, across in zip(sizes.values(), slow, strict=True))
    on_accelerator = devices[0].platform != "cpu" and len(devices) > 1
    grid = _network_order(config, devices, fast, slow) if on_accelerator else _counting_order(devices, fast, slow)
    # Auto axes: GSPMD propagates the layout of parameters and batch through the step.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _counting_order(devices: list[jax.Device], fast: tuple[int, ...], slow: tuple[int, ...]) -> np.ndarray:
    """Emulated devices as if each run of prod(fast) of them were one node: [fast * slow], slow degree major."""
    blocks = np.array(devices).reshape(slow + fast)
    interleaved = np.arange(2 * len(slow)).reshape(2, -1).T.ravel()  # every slow degree before its fast one
    return blocks.transpose(interleaved).reshape([a * b for a, b in zip(slow, fast, strict=True)])


def _network_order(
    config: MeshConfig, devices: list[jax.Device], fast: tuple[int, ...], slow: tuple[int, ...]
) -> np.ndarray:
    """Devices in the order that their network makes fast: the torus of a TPU slice, the nodes of a GPU cluster."""
    slices, processes = (_count(devices, attribute) for attribute in ("slice_index", "process_index"))
    parts, where = math.prod(slow), f"the devices lie in {slices} slices or nodes and {processes} processes"
    on_one_torus = devices[0].platform != "tpu" or slices == 1
    degrees = dict(config.dcn)
    require(
        parts > 1 or on_one_torus, "dcn", degrees, f"is empty but {where}", "give the degree of an axis between them"
    )
    require(parts in (1, slices, processes), "dcn", degrees, f"spans {parts} parts but {where}", "make them equal")
    try:
        if parts == 1:
            return mesh_utils.create_device_mesh(fast, devices, allow_split_physical_axes=True)
        # A GPU node is a slice where JAX was told of its nodes; else one process serves the whole node.
        return mesh_utils.create_hybrid_device_mesh(
            fast, slow, devices, process_is_granule=parts != slices, allow_split_physical_axes=True
        )
    except (NotImplementedError, ValueError) as error:
        constraint = f"does not fit the network of these devices: {one_line(error)}"
        raise CallerError(f"MESH={dict(config.axes)!r} {constraint}") from error


def _count(devices: list[jax.Device], attribute: str) -> int:
    return len({getattr(device, attribute, 0) for device in devices})
