"""Shardings from logical dims: a story on eight devices, and the refusals that keep a layout honest."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from gpt4moe.config.check import CallerError
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.rules import ShardingRules
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.parallel.sharding import batch_sharding, partition_spec, state_shardings

RULES = ShardingRules()


def mesh_of(**axes):
    return make_mesh(MeshConfig(axes))


def test_an_expert_weight_lies_on_three_axes():
    mesh = mesh_of(expert=2, fsdp=2, tensor=2)
    dims = ("layers", "experts", "embed", "mlp")
    assert partition_spec(dims, (2, 4, 8, 6), mesh, RULES) == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert partition_spec(("norm",), (8,), mesh, RULES) == PartitionSpec(None)


def test_a_state_is_created_in_its_layout():
    mesh = mesh_of(expert=4, tensor=2)

    def create():
        weight = nnx.Param(jnp.ones((4, 8, 6)), logical_axes=("experts", "embed", "mlp"))
        return {"params": nnx.State({"weight": weight}), "step": jnp.zeros((), jnp.int32)}

    shardings = state_shardings(jax.eval_shape(create), mesh, RULES)
    state = jax.jit(create, out_shardings=shardings)()
    weight = state["params"]["weight"].get_value()
    assert weight.addressable_shards[0].data.shape == (1, 8, 3)
    assert state["step"].sharding.is_fully_replicated


def test_rows_lie_over_data_fsdp_and_expert():
    mesh = mesh_of(data=2, fsdp=2, expert=2)
    rows = jax.device_put(jnp.zeros((16, 4)), batch_sharding(mesh, RULES))
    assert rows.addressable_shards[0].data.shape == (2, 4)


def test_an_empty_mesh_is_one_device():
    assert make_mesh(MeshConfig()).size == 1


def test_refusals_name_tensor_value_and_constraint():
    mesh = mesh_of(expert=8)
    with pytest.raises(CallerError, match=r"w.experts=6 must be divisible by the expert axis \(8\)"):
        partition_spec(("experts", "embed"), (6, 8), mesh, RULES, name="w")
    with pytest.raises(CallerError, match=r"puts two dims on mesh axis \['tensor'\]"):
        partition_spec(("heads", "mlp"), (8, 8), mesh_of(tensor=8), RULES)
    with pytest.raises(CallerError, match="logical dim='nonsense' is not in ShardingRules"):
        partition_spec(("nonsense",), (8,), mesh, RULES)
    bare = {"params": nnx.State({"w": nnx.Param(jnp.ones(3))})}
    with pytest.raises(CallerError, match=r"params.w=.* names no logical dims"):
        state_shardings(jax.eval_shape(lambda: bare), mesh, RULES)
