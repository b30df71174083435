"""The device mesh and its use: devices along each axis, pipeline stages, what lies on which slot of a stage."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from gpt4moe.config.check import require, require_count, require_flag, require_positive

MESH_AXES = ("data", "fsdp", "stage", "expert", "context", "tensor")
NO_SUPERBLOCK = -1
EXCHANGES = ("bucket", "ragged")


def grouped_placement(slots: Sequence[int], each: int) -> tuple[int, ...]:
    """Which group of `each` superblocks each slot of groups holds, where `slots` hold superblocks, side by side."""
    return tuple(superblock // each for superblock in slots[::each])  # NO_SUPERBLOCK stays what it is


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis, as given in a run file's `MESH` dict; one axis may be -1, the rest of the devices.

    data: replicas; fsdp: replicas that shard the parameters; stage: pipeline; expert: experts; context: the
    sequence; tensor: heads and hidden dims. An axis that is not named has size 1.

    dcn: the part of an axis' degree that spans the slow network (between nodes or slices), -1 for all of it; the rest
    is within one. virtual_stages: chunks of layers that each stage holds (v); above 1 they are interleaved, chunk j of
    stage s being virtual stage j*p + s of p*v. stage_layers: superblocks (`moe_every` layers) of each virtual stage in
    the order in which tokens pass them; None: the same number everywhere. stage_microbatches: pieces that the rows of a
    pass are cut into (m); None: one row per device. zero1: optimizer state is sharded over `data`. sequence_parallel:
    between layers the residual stream's T lies over `tensor`. expert_bucket_factor: dropless dispatch sends each device
    of the expert axis a bucket; None gives it room for all choices there can be, a number c for c times its fair share,
    the choices beyond which are counted as dropped.
    expert_exchange: "bucket" sends whole buckets, "ragged" only what is in them (None: ragged where the backend can).
    """

    axes: tuple[tuple[str, int], ...] = ()
    dcn: tuple[tuple[str, int], ...] = ()
    virtual_stages: int = 1
    stage_layers: tuple[int, ...] | None = None
    stage_microbatches: int | None = None
    zero1: bool = False
    sequence_parallel: bool = False
    expert_bucket_factor: float | None = None
    expert_exchange: str | None = None

    def __post_init__(self) -> None:
        for field, setting in (("axes", "MESH"), ("dcn", "dcn")):
            object.__setattr__(self, field, _sizes_by_axis(setting, getattr(self, field)))
        given = dict(self.axes)
        require(
            sum(size == -1 for size in given.values()) <= 1,
            "MESH",
            given,
            "may infer (-1) at most one axis",
            "give sizes",
        )
        require_count("virtual_stages", self.virtual_stages)
        if self.stage_microbatches is not None:
            require_count("stage_microbatches", self.stage_microbatches)
        self._check_stage_layers()
        require_flag("zero1", self.zero1)
        require_flag("sequence_parallel", self.sequence_parallel)
        if self.expert_bucket_factor is not None:
            require_positive("expert_bucket_factor", self.expert_bucket_factor)
        if self.expert_exchange is not None:
            known = self.expert_exchange in EXCHANGES
            require(known, "expert_exchange", self.expert_exchange, f"must be in {EXCHANGES} or None")
        if -1 not in given.values():
            self._check_against({name: given.get(name, 1) for name in MESH_AXES})

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
            "change the axis sizes, use -1 for one of them, or give other devices (--cpu_devices, --topology)",
        )
        self._check_against(sizes)
        return sizes

    def dcn_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Degrees across the slow network in `MESH_AXES` order, for a mesh with these axis sizes."""
        given = dict(self.dcn)
        return {name: sizes[name] if given.get(name) == -1 else given.get(name, 1) for name in MESH_AXES}

    def for_generation(self) -> MeshConfig:
        """The same devices for tokens one by one: no axis splits a sequence, stages hold their layers in one chunk."""
        axes, dcn = (_context_into_data(dict(sizes)) for sizes in (self.axes, self.dcn))
        layers = self.stage_layers if self.virtual_stages == 1 else None
        given = {"stage_layers": layers, "expert_exchange": self.expert_exchange}
        return MeshConfig(tuple(axes.items()), tuple(dcn.items()), **given)

    def chunk_sizes(self, num_superblocks: int, num_stages: int) -> tuple[int, ...]:
        """Superblocks of every virtual stage, in the order in which tokens pass them.

        Raises `CallerError` where the superblocks cannot be cut that way.
        """
        chunks = num_stages * self.virtual_stages
        mend = "change MESH's stage axis, virtual_stages or the number of layers"
        if self.stage_layers is None:
            require(
                chunks <= num_superblocks, "stage", num_stages, *self._needs(chunks, f"there are {num_superblocks}")
            )
            even = num_superblocks % chunks == 0
            across = f"{num_superblocks} superblocks do not divide over {num_stages} stages x {self.virtual_stages}"
            require(
                even, "stage_layers", None, f"must be given where {across}", "give a number for each, or change one"
            )
            return (num_superblocks // chunks,) * chunks
        num_given, total = len(self.stage_layers), sum(self.stage_layers)
        require(num_given == chunks, "stage_layers", self.stage_layers, *self._needs(chunks, f"it has {num_given}"))
        summed = f"sums to {total} but the model has {num_superblocks} superblocks"
        require(total == num_superblocks, "stage_layers", self.stage_layers, summed, mend)
        return self.stage_layers

    def placement(self, num_superblocks: int, num_stages: int) -> tuple[int, ...]:
        """Which superblock each storage slot holds; `NO_SUPERBLOCK` in a slot that pads a chunk to the longest.

        Slots go stage by stage, within a stage chunk by chunk: sharded evenly over `stage`, every stage holds its own.
        Counting order where there is nothing to interleave or pad. Raises as `chunk_sizes` does.
        """
        sizes = self.chunk_sizes(num_superblocks, num_stages)
        starts, longest = list(itertools.accumulate(sizes, initial=0)), max(sizes)
        order = (chunk * num_stages + stage for stage in range(num_stages) for chunk in range(self.virtual_stages))
        return tuple(
            starts[virtual] + slot if slot < sizes[virtual] else NO_SUPERBLOCK
            for virtual in order
            for slot in range(longest)
        )

    def _needs(self, chunks: int, but: str) -> tuple[str, str]:
        across = f"needs {chunks} chunks of at least one superblock (stage * virtual_stages)"
        return f"{across} but {but}", "change MESH's stage axis, virtual_stages or the number of layers"

    def _check_stage_layers(self) -> None:
        if self.stage_layers is None:
            return
        form = "must be a list of superblocks per virtual stage, each at least 1"
        listed = isinstance(self.stage_layers, (list, tuple)) and len(self.stage_layers) > 0
        require(listed, "stage_layers", self.stage_layers, form)
        require(
            all(type(size) is int and size >= 1 for size in self.stage_layers), "stage_layers", self.stage_layers, form
        )
        object.__setattr__(self, "stage_layers", tuple(self.stage_layers))

    def _check_against(self, sizes: Mapping[str, int]) -> None:
        """Raises where a setting asks for an axis that these sizes do not have."""
        for name, degree in self.dcn_sizes(sizes).items():
            mend = f"change MESH[{name!r}] or dcn[{name!r}]"
            constraint = f"must divide MESH's {name} axis ({sizes[name]})"
            require(sizes[name] % degree == 0, f"dcn[{name!r}]", degree, constraint, mend)
        staged = sizes["stage"] > 1
        for name, unset in (("virtual_stages", 1), ("stage_layers", None), ("stage_microbatches", None)):
            value = getattr(self, name)
            require(
                staged or value == unset, name, value, "needs a stage axis above 1", f"set MESH's stage or drop {name}"
            )
        for name, axis in (("zero1", "data"), ("sequence_parallel", "tensor")):
            wanted, constraint = getattr(self, name), f"needs a {axis} axis above 1"
            require(not wanted or sizes[axis] > 1, name, wanted, constraint, f"set MESH's {axis} or drop {name}")


def _context_into_data(sizes: dict[str, int]) -> dict[str, int]:
    """The sizes with what split a sequence splitting rows; -1, the rest, takes in any other."""
    rows = (sizes.pop("data", 1), sizes.pop("context", 1))
    size = -1 if -1 in rows else math.prod(rows)
    return sizes | ({} if size == 1 else {"data": size})


def _sizes_by_axis(setting: str, given: object) -> tuple[tuple[str, int], ...]:
    """Pairs (axis, size) from a dict or from pairs; raises for an unknown axis or a size that is none."""
    form = "must be a dict of axis sizes"
    require(isinstance(given, (Mapping, list, tuple)), setting, given, form, 'e.g. {"fsdp": 2}')
    pairs = list(given.items() if isinstance(given, Mapping) else given)
    require(all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs), setting, given, form)
    axes = tuple((str(name), size) for name, size in pairs)
    for name, size in axes:
        require(name in MESH_AXES, setting, dict(axes), f"has unknown axis {name!r}", f"use one of {MESH_AXES}")
        valid = type(size) is int and (size >= 1 or size == -1)
        require(valid, setting, dict(axes), f"needs an integer {name} >= 1, or -1 for the rest")
    twice = sorted({name for name, _ in axes if sum(name == other for other, _ in axes) > 1})
    require(not twice, setting, axes, f"gives {', '.join(twice)} more than once", "give each axis one size")
    return axes
