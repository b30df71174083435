"""Experts in turn, as a CPU takes them: values and all gradients against every expert on every token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4moe.config.moe import MoeConfig
from gpt4moe.model import expert_loop
from gpt4moe.model.experts import FEWEST_IN_TURN, ExpertWeights, apply_experts
from gpt4moe.model.layers import activate
from gpt4moe.model.router import Routing
from tests.model.slow import relative_difference

TOKENS, DIM, HIDDEN = 700, 6, 70  # hidden rows with a column more than whole blocks


def weights_of(num_experts, gated):
    keys = jax.random.split(jax.random.key(0), 3)
    inward = [jax.random.normal(key, (num_experts, DIM, HIDDEN)) / DIM**0.5 for key in keys[:2]]
    down = jax.random.normal(keys[2], (num_experts, HIDDEN, DIM)) / HIDDEN**0.5
    return ExpertWeights(inward[0] if gated else None, inward[1], down)


def routing_of(num_experts, choices, *, preference=0.0, used=1.0):
    keys = jax.random.split(jax.random.key(1), 3)
    scores = jax.random.uniform(keys[0], (1, TOKENS, num_experts)) + preference
    ids = jax.lax.top_k(scores, choices)[1]
    gates = jax.random.uniform(keys[1], ids.shape)
    return Routing(ids, gates, jax.random.uniform(keys[2], ids.shape) < used, None, None)


def every_expert(weights, x_GUD, routing):
    """The sum over all experts of the weight that a token gives it times what it makes of the token."""
    gate = None if weights.gate_EDF is None else jnp.einsum("GUD,EDF->GUEF", x_GUD, weights.gate_EDF)
    hidden = activate(jnp.einsum("GUD,EDF->GUEF", x_GUD, weights.up_EDF), gate)
    one_hot = (routing.expert_ids_UK[..., None] == jnp.arange(len(weights.up_EDF))) & routing.used_UK[..., None]
    weight_GUE = jnp.sum(one_hot * routing.gates_UK[..., None], axis=2)
    return jnp.einsum("GUEF,EFD,GUE->GUD", hidden, weights.down_EFD, weight_GUE)


@functools.partial(jax.jit, static_argnames=("config", "drops"))
def ours(x_GUD, gates, weights, dy_GUD, ids, used, config, drops):
    def total(x_GUD, gates, weights):
        y_GUD, dropped = apply_experts(weights, x_GUD, Routing(ids, gates, used, None, None), config, drops)
        return jnp.sum(y_GUD.astype(jnp.float32) * dy_GUD), (y_GUD, dropped)

    return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(x_GUD, gates, weights)


SITUATIONS = {
    "uneven": (4, 2, {"preference": jnp.array([0.6, 0.0, 0.2, 0.0])}),
    "two experts without tokens": (4, 2, {"preference": jnp.array([9.0, 9.0, 0.0, 0.0])}),
    "all to one": (4, 1, {"preference": jnp.array([0.0, 0.0, 9.0, 0.0])}),
    "every expert": (4, 4, {}),
    "many small experts": (64, 2, {}),
    "some choices unused": (4, 2, {"used": 0.6}),
    "none used": (4, 2, {"used": 0.0}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_equals_every_expert_on_every_token(situation, dtype):
    num_experts, choices, settings = SITUATIONS[situation]
    routing = routing_of(num_experts, choices, **settings)
    assert routing.expert_ids_UK.size >= FEWEST_IN_TURN
    weights = weights_of(num_experts, gated=situation != "every expert")
    x_GUD, dy_GUD = (jax.random.normal(jax.random.key(k), (1, TOKENS, DIM)).astype(dtype) for k in (2, 3))
    config = MoeConfig(num_experts, choices, HIDDEN, normalize_gates=False)
    given = (dy_GUD.astype(jnp.float32), routing.expert_ids_UK, routing.used_UK)
    (_, (got, _)), gradients = ours(x_GUD, routing.gates_UK, weights, *given, config, False)

    def plain(x_GUD, gates, weights):
        y_GUD = every_expert(weights, x_GUD, dataclasses.replace(routing, gates_UK=gates))
        return jnp.sum(y_GUD * given[0]), y_GUD

    operands = (x_GUD.astype(jnp.float32), routing.gates_UK, weights)
    (_, want), want_gradients = jax.value_and_grad(plain, (0, 1, 2), has_aux=True)(*operands)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert relative_difference(got, want) < tolerance
    assert relative_difference(gradients, want_gradients) < tolerance


def test_what_padding_holds_reaches_nothing():
    """A token none of whose choices is used may hold anything; its last neighbours' piece reaches into its rows."""
    routing, weights = routing_of(4, 2, used=0.6), weights_of(4, gated=True)
    unused_GU = ~routing.used_UK.any(axis=-1)
    assert unused_GU.any()
    x_GUD, dy_GUD = (jax.random.normal(jax.random.key(k), (1, TOKENS, DIM)) for k in (2, 3))
    given = (routing.gates_UK, weights, dy_GUD, routing.expert_ids_UK, routing.used_UK)
    config = MoeConfig(4, 2, HIDDEN, normalize_gates=False)
    infinite_GUD = jnp.where(unused_GU[..., None], jnp.inf, x_GUD)
    want, got = (ours(x, *given, config, False) for x in (x_GUD, infinite_GUD))
    assert relative_difference(got, want) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gated", [True, False])
def test_blocks_in_turn_are_a_batched_product(gated, dtype):
    weights = weights_of(3, gated)
    matrices = ((weights.gate_EDF, weights.up_EDF) if gated else (weights.up_EDF,)), weights.down_EFD
    rows, dy = (jax.random.normal(jax.random.key(k), (3, 130, DIM)).astype(dtype) for k in (2, 3))

    def plain(matrices, rows):
        *gate, up = (jnp.einsum("ECD,EDF->ECF", rows, w) for w in matrices[0])
        return jnp.einsum("ECF,EFD->ECD", activate(up, gate[0] if gate else None), matrices[1])

    def graded(function, rows):
        total = lambda m, r: jnp.sum(function(m, r).astype(jnp.float32) * dy.astype(jnp.float32))  # noqa: E731
        return function(matrices, rows), jax.grad(total, (0, 1))(matrices, rows)

    got = jax.jit(functools.partial(graded, expert_loop.feed_forward_in_turn))(rows)
    assert relative_difference(got, graded(plain, rows.astype(jnp.float32))) < (1e-5 if dtype == "float32" else 2e-2)


def test_pieces_hold_every_count_with_little_padding():
    sizes = expert_loop.PIECES
    table = expert_loop._cheapest_pieces(sizes)
    held = table @ np.array(sizes)
    rows = np.arange(len(table))
    assert (held >= rows).all() and (held[1:] - rows[1:] <= 0.5 * rows[1:] + sizes[-1]).all()
    assert (table.sum(1) <= len(sizes)).all()
    assert expert_loop._overhang(sizes) == (held - rows).max()
