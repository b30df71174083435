"""Every layout gives the single device's losses, gradients, gradient norm and parameters, from bit-equal beginnings.

Inputs have no router ties; Adam's epsilon is 1e-6, so that a gradient that differs in its last bits moves a parameter
by no more than its share.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.data import DataConfig, SourceConfig
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.optimizer import OptimizerConfig
from gpt4moe.config.rules import ShardingRules
from gpt4moe.config.run import RunConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.config.train import TrainConfig
from gpt4moe.model import layout
from gpt4moe.parallel import sharding
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.train import state
from gpt4moe.train.step import make_step
from gpt4moe.types import Batch

LENGTH, ROWS, VOCAB, SOURCES, STEPS = 16, 8, 320, 2, 3
CAPACITY = {"capacity": 0.8, "dropless": None}
EXPERTS_ON_TENSOR = ShardingRules(overrides={"experts": ["expert", "tensor"], "mlp": []})

# Name: (mesh, other mesh settings, rules).
LAYOUTS = {
    "DP2": ({"data": 2}, {}, {}),
    "DP8": ({"data": 8}, {}, {}),
    "FSDP2": ({"fsdp": 2}, {}, {}),
    "FSDP8": ({"fsdp": 8}, {}, {}),
    "TP2": ({"tensor": 2}, {}, {}),
    "TP4": ({"tensor": 4}, {}, {}),
    "TP4 sequence parallel": ({"tensor": 4}, {"sequence_parallel": True}, {}),
    "EP2": ({"expert": 2}, {}, {}),
    "EP4": ({"expert": 4}, {}, {}),
    "EP8": ({"expert": 8}, {}, {}),
    "CP2": ({"context": 2}, {}, {}),
    "CP4": ({"context": 4}, {}, {}),
    "PP2": ({"stage": 2}, {}, {}),
    "PP4": ({"stage": 4}, {"stage_microbatches": 4}, {}),
    "PP2 interleaved x2": ({"stage": 2}, {"virtual_stages": 2}, {}),
    "PP4 interleaved x2": ({"stage": 4}, {"virtual_stages": 2}, {}),
    "PP2 uneven": ({"stage": 2}, {"stage_layers": (1, 3)}, {}),
    "PP2 uneven interleaved": ({"stage": 2}, {"virtual_stages": 2, "stage_layers": (1, 2, 1, 1)}, {}),
    "ZeRO-1": ({"data": 4}, {"zero1": True}, {}),
    "ZeRO-1 x TP4": ({"data": 2, "tensor": 4}, {"zero1": True}, {}),
    "HSDP": ({"data": 2, "fsdp": 4}, {"dcn": {"data": 2}}, {}),
    "TP2 x EP2 x FSDP2": ({"tensor": 2, "expert": 2, "fsdp": 2}, {"sequence_parallel": True}, {}),
    "PP2 x TP2 x EP2": ({"stage": 2, "tensor": 2, "expert": 2}, {}, {}),
    "PP2 x TP2 x ZeRO-1": ({"stage": 2, "tensor": 2, "data": 2}, {"zero1": True, "sequence_parallel": True}, {}),
    "CP2 x TP2": ({"context": 2, "tensor": 2}, {}, {}),
    "CP2 x EP2 x TP2": ({"context": 2, "expert": 2, "tensor": 2}, {"sequence_parallel": True}, {}),
    "PP2 x CP2 x EP2": ({"stage": 2, "context": 2, "expert": 2}, {"virtual_stages": 2}, {}),
    "experts over EP2 x TP2": ({"expert": 2, "tensor": 2, "data": 2}, {}, {"rules": EXPERTS_ON_TENSOR}),
    "experts over EP2 x TP2, sequence parallel": (
        {"expert": 2, "tensor": 2, "context": 2},
        {"sequence_parallel": True},
        {"rules": EXPERTS_ON_TENSOR},
    ),
}


def run_of(dispatch, axes=(), settings=None, rules=None, layers=4):
    """Layers of eight experts, grouped-query attention, both auxiliary losses."""
    model = ModelConfig(
        num_layers=layers,
        model_dim=16,
        vocab_size=VOCAB,
        context_length=LENGTH,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm=True),
        moe=MoeConfig(
            8, 2, hidden_dim=8, capacity_factor=CAPACITY[dispatch], load_balance_weight=0.1, router_z_weight=0.1
        ),
        compute_dtype="float32",
        remat="full",
    )
    data = DataConfig((SourceConfig("text", paths=("unused",)),), LENGTH, TokenizerConfig(VOCAB, byte_level_only=True))
    train = TrainConfig(STEPS, 10**9, ROWS * LENGTH, seed=0, checkpoint_every=100)
    optimizer = OptimizerConfig(1e-2, epsilon=1e-6)
    return RunConfig(model, data, optimizer, train, MeshConfig(axes, **(settings or {})), **(rules or {}))


LAYERS = {"PP4 interleaved x2": 8, "PP2 uneven interleaved": 5}


def batch_at(step):
    """Rows of two segments and some padding, weights at random."""
    draw = np.random.default_rng(step)
    shape = (ROWS, LENGTH)
    place_BT = np.broadcast_to(np.arange(LENGTH), shape)
    ends_B1, splits_B1 = draw.integers(LENGTH // 2, LENGTH + 1, (ROWS, 1)), draw.integers(1, LENGTH // 2, (ROWS, 1))
    segment_ids = np.where(place_BT >= ends_B1, 0, 1 + (place_BT >= splits_B1)).astype(np.int32)
    return Batch(
        tokens=draw.integers(0, VOCAB, shape).astype(np.int32),
        targets=draw.integers(0, VOCAB, shape).astype(np.int32),
        loss_weights=(draw.uniform(0, 1, shape) * (segment_ids > 0)).astype(np.float32),
        positions=np.where(place_BT >= splits_B1, place_BT - splits_B1, place_BT).astype(np.int32),
        segment_ids=segment_ids,
        source_ids=draw.integers(0, SOURCES, shape).astype(np.int32),
    )


@dataclasses.dataclass(frozen=True)
class Course:
    """Three steps: parameters before and after, gradients of the first step as clipped, what every step measured."""

    first: dict
    last: dict
    gradients: dict
    metrics: list


def run_and_mesh(dispatch, name):
    """A run under a layout, or on one device with `name` layers."""
    axes, settings, rules = LAYOUTS.get(name, ({}, {}, {}))
    run = run_of(dispatch, axes, settings, rules, layers=LAYERS.get(name, 4) if isinstance(name, str) else name)
    return run, make_mesh(run.mesh, jax.devices()[: int(np.prod(list(axes.values()), dtype=int))])


@functools.cache
def beginning(name):
    """The state before the first step, the same for every dispatcher."""
    run, mesh = run_and_mesh("dropless", name)
    return state.create_state(run, state.abstract_state(run, mesh))


@functools.cache
def course(dispatch, name):
    run, mesh = run_and_mesh(dispatch, name)
    abstract = state.abstract_state(run, mesh)
    at = jax.tree.map(lambda leaf: leaf.copy(), beginning(name))
    first = leaves_in_order(at.params, run, mesh)
    step = make_step(run, SOURCES, abstract)
    rows, metrics = sharding.batch_sharding(mesh, run.rules), []
    for number in range(STEPS):
        batch = jax.tree.map(lambda leaf: jax.device_put(leaf, rows)[None], batch_at(number))
        at, measured = step(at, batch, np.int32(1), np.float32(0))
        metrics.append(jax.device_get(measured))
        if number == 0:
            moments = next(leaf for leaf in at.opt_state[1] if hasattr(leaf, "mu")).mu
            gradients = {
                path: leaf / (1 - run.optimizer.b1) for path, leaf in leaves_in_order(moments, run, mesh).items()
            }
    return Course(first, leaves_in_order(at.params, run, mesh), gradients, metrics)


def leaves_in_order(params, run, mesh):
    """Arrays by path, stacks with their superblocks in order."""
    slots = state.run_layout(run, mesh).slots or tuple(range(run.model.num_moe_layers))
    order = [slots.index(block) for block in range(run.model.num_moe_layers)]
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf.get_value())[
            order if leaf.get_metadata()["logical_axes"][0] == "layers" else slice(None)
        ]
        for path, leaf in flat
    }


def difference(got, want):
    return float(np.linalg.norm(np.float64(got) - want) / max(np.linalg.norm(want), 1e-30))


@pytest.mark.parametrize("dispatch", CAPACITY)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_equals_one_device(name, dispatch, monkeypatch):
    monkeypatch.setattr(layout, "MOST_UNROLLED", 0)  # a loop compiles faster
    got, want = course(dispatch, name), course(dispatch, LAYERS.get(name, 4))
    for path, leaf in want.first.items():
        np.testing.assert_array_equal(got.first[path], leaf, err_msg=path)
    for mine, theirs in zip(got.metrics, want.metrics, strict=True):
        assert difference(mine.grad_norm, theirs.grad_norm) < 1e-5
        for path, leaf in jax.tree_util.tree_leaves_with_path(theirs.sums):
            mine_leaf = functools.reduce(lambda tree, key: getattr(tree, key.name), path, mine.sums)
            assert difference(mine_leaf, leaf) < 1e-5, path
    wrong = {path: difference(got.gradients[path], leaf) for path, leaf in want.gradients.items()}
    assert max(wrong.values()) < 1e-5, wrong
    wrong = {path: difference(got.last[path], leaf) for path, leaf in want.last.items()}
    assert max(wrong.values()) < 1e-4, wrong
    assert want.metrics[0].grad_norm > 1.0  # clipping is at work
    assert (np.sum(want.metrics[0].sums.moe.dropped) > 0) == (dispatch == "capacity")
