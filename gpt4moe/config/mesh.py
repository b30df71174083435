"""The device mesh: how many devices each axis spans, and which dims of a tensor lie on which axis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from gpt4moe.config.check import require

MESH_AXES = ("data", "fsdp", "stage", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis, as given in a run file's `MESH` dict; one axis may be -1, the rest of the devices.

    data: replicas; fsdp: replicas that shard the parameters; stage: pipeline; expert: experts; context: the
    sequence; tensor: heads and hidden dims. An axis that is not named has size 1.
    """

    axes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        form = "must be a dict of axis sizes"
        require(isinstance(self.axes, (Mapping, list, tuple)), "MESH", self.axes, form, 'e.g. {"fsdp": -1}')
        pairs = self.axes.items() if isinstance(self.axes, Mapping) else self.axes
        axes = tuple((str(name), size) for name, size in pairs)
        object.__setattr__(self, "axes", axes)
        for name, size in axes:
            require(name in MESH_AXES, "MESH", dict(axes), f"has unknown axis {name!r}", f"use one of {MESH_AXES}")
            require(type(size) is int and (size >= 1 or size == -1), "MESH", dict(axes), f"needs {name} >= 1 or -1")
        require(sum(size == -1 for _, size in axes) <= 1, "MESH", dict(axes), "may infer (-1) at most one axis")

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Axis sizes in `MESH_AXES` order for `num_devices` devices; raises unless their product is that number."""
        given = dict(self.axes)
        known = math.prod(size for size in given.values() if size != -1)
        inferred = max(num_devices // known, 1)
        sizes = {name: given.get(name, 1) for name in MESH_AXES}
        sizes = {name: inferred if size == -1 else size for name, size in sizes.items()}
        require(
            math.prod(sizes.values()) == num_devices,
            "MESH",
            given,
            f"spans {math.prod(sizes.values())} devices but there are {num_devices}",
            "change the axis sizes, use -1 for one of them, or pass --cpu_devices",
        )
        return sizes
