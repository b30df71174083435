"""From a `MeshConfig` to the device mesh that a run is laid out on."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gpt4moe.config.check import require
from gpt4moe.config.mesh import MESH_AXES, MeshConfig

# Splitting these needs code that names the axis (pipeline schedule, ring attention); GSPMD alone would only replicate.
EXPLICIT_AXES = ("stage", "context")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with all of `MESH_AXES`, in an order that keeps `tensor` on neighbouring devices.

    An empty config uses one device. Raises `CallerError` where the sizes do not multiply to the device count.
    """
    devices = list(jax.devices() if devices is None else devices)
    devices = devices if config.axes else devices[:1]
    sizes = config.sizes(len(devices))
    for axis in EXPLICIT_AXES:
        require(sizes[axis] == 1, "MESH", dict(config.axes), f"cannot split {axis} yet", f"leave {axis} at 1")
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    on_accelerator = devices[0].platform != "cpu" and len(devices) > 1
    grid = mesh_utils.create_device_mesh(shape, devices) if on_accelerator else np.array(devices).reshape(shape)
    # Auto axes: GSPMD propagates the layout of parameters and batch through the step.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
