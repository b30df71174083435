"""Which devices are neighbours on the mesh: emulated, on GPU nodes, on TPU slices."""

import dataclasses

import jax
import numpy as np
import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.config.mesh import MESH_AXES, MeshConfig
from gpt4moe.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """What JAX tells of a device that this machine does not have."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def gpus(nodes: int, *, processes_per_node: int = 1, told_nodes: bool = True) -> list[Accelerator]:
    """Eight GPUs a node, listed in the order that processes happened to come up."""
    devices = [
        Accelerator(8 * node + gpu, "gpu", "NVIDIA H100", process, node if told_nodes else 0)
        for node in range(nodes)
        for gpu in range(8)
        for process in [node * processes_per_node + gpu * processes_per_node // 8]
    ]
    return devices[::-1]


def v5p(shape: tuple[int, int, int], *, slices: int = 1) -> list[Accelerator]:
    """Chips of `slices` TPU v5p tori, four a host."""
    chips = list(np.ndindex(*shape))
    return [
        Accelerator(len(chips) * part + index, "tpu", "TPU v5", (len(chips) * part + index) // 4, part, chip[::-1])
        for part in range(slices)
        for index, chip in enumerate(chips)
    ]


def along(mesh, *axes: str) -> list[list]:
    """The groups of devices that differ along `axes` only."""
    grid = np.moveaxis(mesh.devices, [MESH_AXES.index(axis) for axis in axes], range(-len(axes), 0))
    return grid.reshape(-1, np.prod([mesh.shape[axis] for axis in axes])).tolist()


def numbers(groups: list[list]) -> list[list[int]]:
    return sorted([device.id for device in group] for group in groups)


def test_neighbours_of_the_last_axis_are_neighbouring_devices():
    mesh = make_mesh(MeshConfig({"data": 2, "stage": 2, "tensor": 2}), jax.devices())
    assert mesh.axis_names == MESH_AXES
    assert numbers(along(mesh, "tensor")) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert numbers(along(mesh, "stage")) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert numbers(along(mesh, "data")) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_a_degree_across_the_network_parts_the_devices_first():
    """Two emulated nodes, devices 0-3 and 4-7. Stages span them; data and tensor stay within one."""
    mesh = make_mesh(MeshConfig({"data": 2, "stage": 2, "tensor": 2}, dcn={"stage": 2}), jax.devices())
    assert numbers(along(mesh, "stage")) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert numbers(along(mesh, "data")) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert numbers(along(mesh, "tensor")) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_whole_of_an_axis_may_be_across_the_network():
    mesh = make_mesh(MeshConfig({"data": -1, "fsdp": 4}, dcn={"data": -1}), jax.devices())
    assert numbers(along(mesh, "fsdp")) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert MeshConfig({"stage": -1, "fsdp": 4}, dcn={"stage": -1}).dcn_sizes(mesh.shape)["stage"] == 1


def test_an_axis_may_span_both_networks():
    """Four replicas, two in each of two nodes: the first two lie in the first node."""
    mesh = make_mesh(MeshConfig({"data": 4, "tensor": 2}, dcn={"data": 2}), jax.devices())
    assert numbers(along(mesh, "data")) == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("nodes_known_by", ["slices", "processes"])
def test_the_tensor_axis_of_a_gpu_cluster_stays_within_a_node(nodes_known_by):
    by_slice = nodes_known_by == "slices"
    devices = gpus(6, processes_per_node=8 if by_slice else 1, told_nodes=by_slice)
    config = MeshConfig({"data": 2, "stage": 3, "tensor": 8}, dcn={"data": 2, "stage": 3})
    mesh = make_mesh(config, devices)
    assert numbers(along(mesh, "tensor")) == np.arange(48).reshape(6, 8).tolist()
    assert numbers(along(mesh, "stage"))[0] == [0, 8, 16] and numbers(along(mesh, "data"))[0] == [0, 24]


def test_a_gpu_cluster_without_degrees_is_in_counting_order():
    mesh = make_mesh(MeshConfig({"fsdp": -1, "tensor": 8}), gpus(2))
    assert numbers(along(mesh, "tensor")) == np.arange(16).reshape(2, 8).tolist()


def test_a_tpu_axis_is_a_ring_of_the_torus():
    """A 4 x 4 x 4 torus: every tensor group is a line of four chips that differ in one coordinate only."""
    mesh = make_mesh(MeshConfig({"fsdp": 4, "expert": 4, "tensor": 4}), v5p((4, 4, 4)))
    for axis in ("fsdp", "expert", "tensor"):
        for group in along(mesh, axis):
            varying = [len({chip.coords[dim] for chip in group}) for dim in range(3)]
            assert sorted(varying) == [1, 1, 4]


def test_a_tpu_axis_may_be_a_part_of_a_ring():
    mesh = make_mesh(MeshConfig({"fsdp": 16, "expert": 2, "tensor": 2}), v5p((4, 4, 4)))
    assert sorted(device.id for device in mesh.devices.flat) == list(range(64))


def test_tpu_slices_are_joined_along_the_axis_that_says_so():
    mesh = make_mesh(MeshConfig({"data": 2, "fsdp": 4, "tensor": 4}, dcn={"data": 2}), v5p((2, 2, 4), slices=2))
    assert all(len({chip.slice_index for chip in group}) == 1 for group in along(mesh, "fsdp", "tensor"))
    assert all(len({chip.slice_index for chip in group}) == 2 for group in along(mesh, "data"))


@pytest.mark.parametrize(
    ("axes", "dcn", "devices", "message"),
    [
        ({"data": 3}, {}, gpus(1), "MESH={'data': 3} spans 3 devices but there are 8"),
        ({"data": 2, "tensor": 8}, {"tensor": 4}, gpus(2), "dcn={'tensor': 4} spans 4 parts but the devices lie in 2"),
        ({"data": 2, "tensor": 16}, {}, v5p((2, 2, 4), slices=2), "dcn={} is empty but the devices lie in 2 slices"),
        ({"data": 2, "tensor": 6}, {"data": 2}, gpus(2)[:12], "MESH={'data': 2, 'tensor': 6} does not fit the network"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_in_one_line(axes, dcn, devices, message):
    with pytest.raises(CallerError) as caught:
        make_mesh(MeshConfig(axes, dcn=dcn), devices)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
