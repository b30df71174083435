"""Checkpoints: what is saved comes back, on any mesh; what is kept; kills, full disks and other models."""

import contextlib
import functools
import json
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt4moe import checkpoint
from gpt4moe.config.check import CallerError


def state(scale: float = 1.0):
    """A tree with what training states have: variables, optimizer tuples, integers, keys, and dozens of leaves."""
    draw = np.random.default_rng(0)
    params = nnx.State(
        {
            "zeta": nnx.Param(jnp.asarray(draw.normal(size=(8, 4)) * scale, jnp.float32)),
            "alpha": {"w": nnx.Param(jnp.asarray(draw.normal(size=(16,)), jnp.float32))},
        }
    )
    return {
        "params": params,
        "opt": optax.adam(0.1).init(params),
        "key": jax.random.key_data(jax.random.key(7)),
        "many": tuple(jnp.full(2, number) for number in range(12)),
    }


def layout(*names: str | None, axes: dict[str, int]) -> NamedSharding:
    devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))]).reshape(tuple(axes.values()))
    return NamedSharding(Mesh(devices, tuple(axes)), PartitionSpec(*names))


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_tree_and_its_record_come_back(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state(), {"tokens": 2**40, "data": {"row": 1}})
    assert checkpoint.saved_steps(tmp_path) == [3]
    assert_equal(checkpoint.restore(tmp_path, 3, abstract(state())), state())
    assert checkpoint.restore_progress(tmp_path, 3) == {"tokens": 2**40, "data": {"row": 1}}


def test_another_mesh_reads_what_one_wrote(tmp_path):
    eight, two = layout("a", axes={"a": 8}), layout(None, "b", axes={"a": 2, "b": 2})
    tree = {"w": jax.device_put(np.arange(64.0).reshape(16, 4), eight)}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {})
    restored = checkpoint.restore(tmp_path, 1, abstract(tree, two))["w"]
    assert restored.sharding == two
    np.testing.assert_array_equal(restored, np.arange(64.0).reshape(16, 4))


def test_a_part_of_a_tree_is_read_alone(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(), {})
    params = {"params": state()["params"]}
    assert_equal(checkpoint.restore(tmp_path, 1, abstract(params)), params)


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    grow = jax.jit(functools.partial(jax.tree.map, lambda x: x + 1), donate_argnums=0)
    expected, tree = {}, {"w": jnp.zeros((256, 256))}
    with checkpoint.Checkpoints(tmp_path, keep_last=5) as checkpoints:
        for step in range(1, 6):
            expected[step] = np.array(tree["w"])
            checkpoints.save(step, tree, {})
            tree = grow(tree)
    for step, value in expected.items():
        np.testing.assert_array_equal(checkpoint.restore(tmp_path, step, abstract({"w": value}))["w"], value)


def test_the_newest_and_the_best_are_kept(tmp_path):
    """Losses 3, 1, 2 at steps 1, 2, 3, none later: of six, the newest two and step 2 remain."""
    losses = {1: 3.0, 2: 1.0, 3: 2.0}
    with checkpoint.Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, {"w": jnp.ones(1)}, {}, held_out_loss=losses.get(step))
    assert checkpoint.saved_steps(tmp_path) == [2, 5, 6]


def test_a_half_written_checkpoint_is_ignored_and_then_removed(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(1)}, {})
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "state"
    half.mkdir(parents=True)
    (half / "d").write_text("half")
    assert checkpoint.saved_steps(tmp_path) == [1] and checkpoint.latest_step(tmp_path) == 1
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"w": jnp.ones(1)}, {})
    assert checkpoint.saved_steps(tmp_path) == [1, 2] and not half.exists()


def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones((2, 3)), "v": jnp.ones(1)}, {})
    other = {"w": jnp.ones((2, 4)), "u": jnp.ones(1)}
    with pytest.raises(
        CallerError, match=r"another model: u is missing, w has shape \(2, 3\), the model \(2, 4\)"
    ) as error:
        checkpoint.restore(tmp_path, 1, abstract(other))
    assert "\n" not in str(error.value)


def test_a_work_directory_without_checkpoints_is_refused(tmp_path):
    assert checkpoint.saved_steps(tmp_path) == []
    with pytest.raises(CallerError, match="no complete checkpoint"):
        checkpoint.latest_step(tmp_path)


@contextlib.contextmanager
def files_no_larger_than(size: int):
    """The operating system refuses to write beyond `size` bytes of any file, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_when_the_disk_refuses_the_earlier_checkpoint_stands(tmp_path, capfd):
    tree = {"w": jax.random.normal(jax.random.key(0), (300_000,))}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {"tokens": 5})
        checkpoints.wait()
        with files_no_larger_than(100_000), pytest.raises(checkpoint.CheckpointError) as error:
            checkpoints.save(2, tree, {"tokens": 6})
            checkpoints.wait()
    assert "File too large; the checkpoint of step 1 is intact" in str(error.value)
    assert "Traceback" not in capfd.readouterr().err
    assert checkpoint.saved_steps(tmp_path) == [1]
    assert_equal(checkpoint.restore(tmp_path, 1, abstract(tree)), tree)


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    """0.4 MB that eight devices have, of which one copy is written, and what is asked for beyond."""
    usage, everywhere = shutil.disk_usage(tmp_path), layout(axes={"a": 8})
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(1000)}, {})
        checkpoints.wait()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
        with pytest.raises(checkpoint.CheckpointError, match=r"No space left on device \(1.5 MB needed, 1.0 MB free\)"):
            checkpoints.save(2, {"w": jax.device_put(np.ones(100_000, np.float32), everywhere)}, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_the_record_is_plain_json(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(1)}, {"data": {"next_row": 12}})
    files = [path for path in pathlib.Path(tmp_path).rglob("progress/*") if path.name == "metadata"]
    assert json.loads(files[0].read_text()) == {"data": {"next_row": 12}}
