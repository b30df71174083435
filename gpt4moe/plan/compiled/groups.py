"""Which mesh axes a collective runs over, from the device groups in its attributes.

In: a collective of an SPMD program and the mesh's axis sizes, in order; devices are numbered along the mesh. XLA writes
groups as lists, as a transposed range of numbers, or as axes of a mesh of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from gpt4moe.plan.compiled.hlo import Instruction

_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")
_RANGE = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=@?\w*?mesh\[(.*?)\](?:,? ?device_ids=\(?(\[.*?)\)?)? ?\{(.*?)\}")


def varying_axes(instruction: Instruction, axes: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """Returns how many devices are in a group, and the mesh axes along which devices of a group differ."""
    groups_GI = groups(instruction.attributes, math.prod(axes.values()))
    coordinates = np.unravel_index(groups_GI, tuple(axes.values()))
    varying = tuple(name for name, at_GI in zip(axes, coordinates, strict=True) if np.any(at_GI != at_GI[:, :1]))
    return groups_GI.shape[1], varying


def groups(attributes: str, num_devices: int) -> np.ndarray:
    """Returns device numbers [groups, members]; for a permutation one row of (source, target) a pair."""
    listed = _LISTS.search(attributes)
    if listed:
        return np.array([[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", listed[1])])
    ranged = _RANGE.search(attributes)
    if ranged:
        return _range(ranged[3], ranged[4]).reshape(int(ranged[1]), int(ranged[2]))
    meshed = _MESH.search(attributes)
    if meshed:
        return _along_axes(*meshed.groups())
    return np.arange(num_devices)[None]


def _range(dims: str, permutation: str | None) -> np.ndarray:
    sizes = [int(n) for n in dims.split(",")]
    order = [int(n) for n in permutation.split(",")] if permutation else range(len(sizes))
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order)


def _along_axes(mesh: str, device_ids: str | None, chosen: str) -> np.ndarray:
    """Groups of `mesh['a'=2,'b'=4] {'b'}`; a chosen axis may be a part, `'b':(2)2` (after 2, of size 2)."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    parts = {name: [(1, size)] for name, size in sizes.items()}
    members = []
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", chosen):
        before, size = int(before or 1), int(size or sizes[name])
        members.append((name, before))
        after = sizes[name] // (before * size)
        parts[name] = [
            (start, span) for start, span in ((0, before), (before, size), (-1, after)) if span > 1 or start == before
        ]
    grid_sizes = [span for name in sizes for _, span in parts[name]]
    keys = [(name, start) for name in sizes for start, _ in parts[name]]
    order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids) if device_ids else None
    ids = (
        _range(order[1], order[2]).reshape(grid_sizes)
        if order
        else np.arange(math.prod(grid_sizes)).reshape(grid_sizes)
    )
    inner = [keys.index(member) for member in members]
    outer = [index for index in range(len(keys)) if index not in inner]
    return ids.transpose(outer + inner).reshape(-1, math.prod(grid_sizes[index] for index in inner))
