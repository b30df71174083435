"""Conformance of every dispatcher with real experts: values and gradients against a loop over tokens."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.rules import ShardingRules
from gpt4moe.model import dispatch
from gpt4moe.model.experts import Experts, apply_experts
from gpt4moe.model.router import RouterInputs, top_k
from gpt4moe.parallel.expert import sharded_experts
from gpt4moe.parallel.island import spread
from gpt4moe.parallel.mesh import make_mesh
from tests.model import slow

GROUPS, TOKENS, DIM, NUM_EXPERTS, CHOICES = 2, 6, 5, 4, 2
CAPACITIES = {"capacity_tight": 0.7, "capacity_roomy": 100.0, "dropless": None}
EXPERTS_ON_TENSOR = ShardingRules(overrides={"experts": ["expert", "tensor"], "mlp": []})
# Where tokens and experts lie; on one device nothing travels.
LAYOUTS = {
    "one device": ({}, ShardingRules()),
    "EP2": ({"expert": 2}, ShardingRules()),
    "EP2 x CP2 x TP2": ({"expert": 2, "context": 2, "tensor": 2}, ShardingRules()),
    "EP2 x FSDP1 x experts on TP2": ({"expert": 2, "tensor": 2}, EXPERTS_ON_TENSOR),
    "CP3": ({"context": 3}, ShardingRules()),
}
# Which tokens are real, and a preference for experts that is added to random logits.
SITUATIONS = {
    "mixed": (np.ones((GROUPS, TOKENS), bool), np.zeros(NUM_EXPERTS)),
    "padding": (np.array([[True] * 4 + [False] * 2, [False] * TOKENS]), np.zeros(NUM_EXPERTS)),
    "all_to_one": (np.ones((GROUPS, TOKENS), bool), np.array([0.0, 50.0, 0.0, 0.0])),
    "two_without_tokens": (np.ones((GROUPS, TOKENS), bool), np.array([0.0, 0.0, -50.0, -50.0])),
}


def _route(logits_GUE, valid_GU, config):
    inputs = RouterInputs(jnp.zeros(valid_GU.shape, jnp.int32), jnp.asarray(valid_GU))
    return jax.vmap(lambda logits, row: top_k(logits, row, config))(logits_GUE, inputs)


def _apply_on(layout):
    """`apply_experts` of one of `LAYOUTS`."""
    axes, rules = LAYOUTS[layout]
    config = MeshConfig(axes)
    mesh = make_mesh(config, jax.devices()[: math.prod(axes.values())])
    return sharded_experts(spread(mesh, config, rules), None, "bucket") if axes else apply_experts


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", CAPACITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_a_loop_over_tokens(layout, name, situation):
    gated = situation != "padding"  # SwiGLU and GELU both; the activation does not interact with the situation
    factor, apply = CAPACITIES[name], _apply_on(layout)
    config = MoeConfig(NUM_EXPERTS, CHOICES, hidden_dim=8, gated=gated, capacity_factor=factor)
    valid_GU, preference_E = SITUATIONS[situation]
    keys = jax.random.split(jax.random.key(0), 3)
    x_GUD = jax.random.normal(keys[0], (GROUPS, TOKENS, DIM))
    logits_GUE = jax.random.normal(keys[1], (GROUPS, TOKENS, NUM_EXPERTS)) + preference_E
    dy_GUD = jax.random.normal(keys[2], x_GUD.shape)
    graph, parameters = nnx.split(slow.one_layer(Experts((0,), DIM, config, 1.0, nnx.Rngs(0))))

    @jax.jit
    def ours(x_GUD, logits_GUE, parameters):
        weights = nnx.merge(graph, parameters)()
        routing = _route(logits_GUE, valid_GU, config)
        y_GUD, dropped = apply(weights, x_GUD, routing, config, factor is not None)
        return jnp.sum(y_GUD * dy_GUD), (y_GUD, dropped)

    routing = _route(logits_GUE, valid_GU, config)
    ids_GUK, used_GUK = np.asarray(routing.expert_ids_UK), np.asarray(routing.used_UK)
    room = None if factor is None else config.expert_capacity(TOKENS)

    def reference(x_GUD, logits_GUE, parameters):
        gates_GUK = _route(logits_GUE, valid_GU, config).gates_UK
        experts = nnx.merge(graph, parameters)
        matrices = (experts.gate[...] if gated else None, experts.up[...], experts.down[...])
        y_GUD = slow.mixture(x_GUD, gates_GUK, matrices, ids_GUK, used_GUK, room)
        return jnp.sum(y_GUD * dy_GUD), y_GUD

    (_, (got, dropped)), got_gradients = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(
        x_GUD, logits_GUE, parameters
    )
    (_, want), want_gradients = jax.value_and_grad(reference, (0, 1, 2), has_aux=True)(x_GUD, logits_GUE, parameters)
    kept = [slow.kept_choices(ids, used, room).sum() for ids, used in zip(ids_GUK, used_GUK, strict=True)]
    assert int(dropped) == used_GUK.sum() - sum(kept)
    assert slow.relative_difference(got, want) < 1e-5
    assert slow.relative_difference(got_gradients, want_gradients) < 1e-5


def test_story_of_four_tokens_and_room_for_one():
    """Tokens 0 and 1 want expert 0 first; token 2 wants expert 1 first. Each expert has one place.

    Token 0 gets expert 0, token 2 gets expert 1; token 1's second choice, expert 1, is full by then, because first
    choices queue before second ones. Token 3 is padding and takes no place.
    """
    config = MoeConfig(2, 2, hidden_dim=1, capacity_factor=0.25)
    ids_UK = jnp.array([[0, 1], [0, 1], [1, 0], [0, 1]])
    routing = _route(jnp.zeros((1, 4, 2)), np.array([[True, True, True, False]]), config)
    routing = jax.tree.map(lambda x: x, routing)
    routing = type(routing)(ids_UK[None], routing.gates_UK, routing.used_UK, routing.losses, routing.stats)
    x_GUD = jnp.array([[[10.0], [11.0], [12.0], [13.0]]])
    dispatched = dispatch.capacity(x_GUD, routing, config)
    np.testing.assert_array_equal(dispatched.rows_XCD[:, :, 0], [[10.0], [12.0]])
    np.testing.assert_array_equal(dispatched.plan.slot_of_choice_PUK[0], [[0, 2], [2, 2], [1, 2], [2, 2]])
    assert int(dispatched.stats.dropped_G[0]) == 4


@pytest.mark.parametrize("seed", range(3))
def test_every_used_choice_has_its_own_slot_in_a_block_of_its_expert(seed):
    config = MoeConfig(NUM_EXPERTS, CHOICES, hidden_dim=1)
    keys = jax.random.split(jax.random.key(seed), 2)
    valid_GU = np.asarray(jax.random.bernoulli(keys[0], 0.8, (3, 40)))
    routing = _route(3 * jax.random.normal(keys[1], (3, 40, NUM_EXPERTS)), valid_GU, config)
    x_GUD = jnp.arange(120.0).reshape(3, 40, 1) + 1
    dispatched = jax.jit(lambda x, r: dispatch.dropless(x, r, config))(x_GUD, routing)
    block = dispatched.rows_XCD.shape[1]
    slots = np.asarray(dispatched.plan.slot_of_choice_PUK)[0]
    used = np.asarray(routing.used_UK).reshape(slots.shape)
    assert len(set(slots[used])) == used.sum()
    assert (slots[~used] == dispatched.rows_XCD.size).all()
    experts = np.asarray(dispatched.block_expert_X)[slots[used] // block]
    np.testing.assert_array_equal(experts, np.asarray(routing.expert_ids_UK).reshape(slots.shape)[used])
    assert slots[used].max() < int(dispatched.num_blocks) * block
    rows = np.asarray(dispatched.rows_XCD).reshape(-1)
    np.testing.assert_array_equal(
        np.sort(rows[rows > 0]), np.sort(np.repeat(np.asarray(x_GUD).ravel(), 2)[used.ravel()])
    )


@pytest.mark.parametrize(("factor", "places"), [(0.7, 3), (1.0, 3), (9.0, 6)])
def test_capacity_is_the_fair_share_times_the_factor_rounded_up_and_no_more_than_the_tokens(factor, places):
    config = MoeConfig(NUM_EXPERTS, CHOICES, hidden_dim=1, capacity_factor=factor)  # a fair share of 6 tokens is 3
    assert config.expert_capacity(TOKENS) == places


def test_capacity_takes_the_factor_as_the_decimal_that_was_written():
    config = MoeConfig(4, 2, hidden_dim=1, capacity_factor=1.1)
    assert config.expert_capacity(20) == 11, "binary fractions would make it 12"


def test_capacity_does_not_depend_on_other_rows():
    config = MoeConfig(NUM_EXPERTS, CHOICES, hidden_dim=1, capacity_factor=0.7)
    logits_GUE = jax.random.normal(jax.random.key(0), (2, 6, NUM_EXPERTS))
    together = dispatch.capacity(jnp.ones((2, 6, 1)), _route(logits_GUE, np.ones((2, 6), bool), config), config)
    for g in range(2):
        alone = dispatch.capacity(
            jnp.ones((1, 6, 1)), _route(logits_GUE[g : g + 1], np.ones((1, 6), bool), config), config
        )
        np.testing.assert_array_equal(alone.plan.choice_of_slot_PS[0], together.plan.choice_of_slot_PS[g])
