"""Stacks of layers go from one placement on pipeline stages to another, parameters and moments equal to the bit."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt4moe import checkpoint
from gpt4moe.config.check import CallerError
from gpt4moe.config.mesh import NO_SUPERBLOCK, MeshConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel import placement
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.train import state as train_state
from tests.train import tiny

LAYERS = 6
MESH = Mesh(np.array(jax.devices()).reshape(2, 4), ("stage", "tensor"))
INTERLEAVED = MeshConfig({"stage": 2}, virtual_stages=3).placement(LAYERS, 2)
UNEVEN = MeshConfig({"stage": 2}, stage_layers=(2, 4)).placement(LAYERS, 2)
UNEVEN_INTERLEAVED = MeshConfig({"stage": 2}, virtual_stages=2, stage_layers=(1, 2, 1, 2)).placement(LAYERS, 2)
ORDERS = {"in order": None, "interleaved": INTERLEAVED, "uneven": UNEVEN, "uneven interleaved": UNEVEN_INTERLEAVED}


def rows_in(order) -> np.ndarray:
    """Layers 0 to 5 of a [6, 4, 8] stack laid out in `order`, zeros in between."""
    natural = np.random.default_rng(0).normal(size=(LAYERS, 4, 8)).astype(np.float32)
    order = range(LAYERS) if order is None else order
    return np.stack([natural[layer] if layer != NO_SUPERBLOCK else np.zeros((4, 8), np.float32) for layer in order])


def state(order) -> dict:
    """Parameters in `order`, one that is no stack, and moments that differ from the parameters."""
    stack = nnx.Param(jnp.asarray(rows_in(order)), logical_axes=("layers", "embed", "mlp"))
    other = nnx.Param(jnp.arange(8.0), logical_axes=("embed",))
    params = nnx.State({"blocks": {"w": stack}, "final": other})
    adam = optax.adam(0.1)
    gradient = jax.tree.map(lambda leaf: leaf * 3, params)
    return {"params": params, "opt": adam.update(gradient, adam.init(params))[1]}


def abstract(order, mesh: Mesh | None) -> dict:
    """Shapes of `state(order)`; on a mesh stacks lie over its stages, on none everything on one device."""

    def with_sharding(leaf):
        rows = ("stage",) if leaf.ndim == 3 else ()
        sharding = (
            NamedSharding(mesh, PartitionSpec(*rows, None, "tensor") if rows else PartitionSpec()) if mesh else None
        )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, jax.eval_shape(lambda: state(order)))


def save(workdir, order) -> None:
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(1, state(order), {"tokens": 7}, layer_order=order)


def mesh_for(order) -> Mesh:
    """Stages that divide the slots of an order: four where they can, else two."""
    stages = 4 if len(order or range(LAYERS)) % 4 == 0 else 2
    return Mesh(np.array(jax.devices()).reshape(stages, -1), ("stage", "tensor"))


@pytest.fixture(scope="module", params=ORDERS, ids=str)
def saved(request, tmp_path_factory):
    """A work directory for each order in which stacks may be saved."""
    workdir = tmp_path_factory.mktemp("run")
    save(workdir, ORDERS[request.param])
    return workdir


@pytest.mark.parametrize("is_sharded", [False, True], ids=["one device", "stages"])
@pytest.mark.parametrize("wanted", ORDERS, ids=str)
def test_every_order_is_restored_from_every_other_to_the_bit(saved, wanted, is_sharded):
    order = ORDERS[wanted]
    shapes = abstract(order, mesh_for(order) if is_sharded else None)
    restored = checkpoint.restore(saved, 1, shapes, layer_order=order)
    expected = state(order)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for a, b, shape in zip(*map(jax.tree.leaves, (restored, expected, shapes)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert shape.sharding in (None, a.sharding)


def test_the_record_names_the_order(tmp_path):
    save(tmp_path / "plain", None)
    save(tmp_path / "staged", UNEVEN)
    assert checkpoint.restore_progress(tmp_path / "plain", 1) == {"tokens": 7}
    assert checkpoint.restore_progress(tmp_path / "staged", 1) == {"tokens": 7, "layer_order": list(UNEVEN)}


def test_a_model_of_as_many_rows_but_other_layers_is_refused(tmp_path):
    """Six layers in eight slots are not a model of eight layers, nor one of six of another width."""
    save(tmp_path, UNEVEN)
    eight = abstract(UNEVEN, None)
    with pytest.raises(CallerError, match=r"params.blocks.w has shape \(6, 4, 8\), the model \(8, 4, 8\)"):
        checkpoint.restore(tmp_path, 1, eight)
    wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leaf.shape[:-1], 9), leaf.dtype), eight["params"])
    with pytest.raises(CallerError, match=r"has shape \(6, 4, 8\), the model \(6, 4, 9\)"):
        checkpoint.check_shapes(tmp_path, 1, {"params": wide}, layer_order=UNEVEN)
    checkpoint.check_shapes(tmp_path, 1, eight, layer_order=UNEVEN)


def test_rows_over_two_axes_are_reordered_where_they_lie():
    """Twelve rows over stage x tensor: every device holds and ends with a few, whichever way they go."""
    sharding = NamedSharding(MESH, PartitionSpec(("stage", "tensor")))
    held, wanted = tuple(range(12)), tuple(np.random.default_rng(1).permutation(12).tolist()) + (NO_SUPERBLOCK,) * 4
    assert placement.padded_rows(12, sharding) == 16
    stack = jax.device_put(np.arange(16.0), sharding)
    moved = placement.reorder(stack, held, wanted)
    assert moved.sharding == sharding
    np.testing.assert_array_equal(moved, [*wanted[:12], 0, 0, 0, 0])


def training_run(mesh: MeshConfig) -> RunConfig:
    """A tiny run of six layers on `mesh`, and a dense one before them that is in no stack."""
    pattern = {"num_layers": LAYERS + 1, "leading_dense_layers": 1, "dense_hidden_dim": 32}
    run = tiny.run_config(pathlib.Path("unused"), model=dataclasses.replace(tiny.MODEL, **pattern))
    return dataclasses.replace(run, mesh=mesh)


def random_state(abstract):
    """Numbers at random in every array of a training state, moments included."""
    draw = np.random.default_rng(3)

    def fill(leaf):
        numbers = draw.normal(size=leaf.shape) if leaf.dtype == jnp.float32 else draw.integers(0, 99, leaf.shape)
        return jax.device_put(np.asarray(numbers, leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, abstract)


LAYOUTS = [
    MeshConfig({"stage": 2, "expert": 2}, virtual_stages=3, stage_microbatches=2),
    MeshConfig({"stage": 4, "data": 2}, stage_layers=(1, 2, 1, 2), zero1=True),
    MeshConfig({"fsdp": 2, "tensor": 2, "data": 2}, zero1=True),
]


@pytest.mark.parametrize("mesh", LAYOUTS, ids=["interleaved", "uneven, ZeRO-1", "FSDP, TP, ZeRO-1"])
def test_a_whole_training_state_goes_to_a_layout_and_back(mesh, tmp_path):
    """From one device to the layout, saved there, and back on one device: every array is what it was."""
    states = {}
    for name, config in (("plain", MeshConfig()), ("laid_out", mesh)):
        devices = jax.devices()[: int(np.prod([size for _, size in config.axes]))]
        run, grid = training_run(config), make_mesh(config, devices)
        states[name] = train_state.abstract_state(run, grid), train_state.run_layout(run, grid).slots
    (plain, _), (laid_out, order) = states["plain"], states["laid_out"]
    expected = random_state(plain)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, expected, {})
        checkpoints.wait()
        there = checkpoint.restore(tmp_path, 1, laid_out, layer_order=order)
        assert all(a.sharding == b.sharding for a, b in zip(*map(jax.tree.leaves, (there, laid_out)), strict=True))
        checkpoints.save(2, there, {}, layer_order=order)
    back = checkpoint.restore(tmp_path, 2, plain)
    for a, b in zip(*map(jax.tree.leaves, (back, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
