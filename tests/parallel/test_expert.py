"""Exchange of dropless choices: buckets that are too small drop and count, and the ragged exchange gives the same.

XLA:CPU lacks `ragged_all_to_all`: its definition is written out here with the collectives that it has.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.rules import ShardingRules
from gpt4moe.model.experts import ExpertWeights, apply_experts
from gpt4moe.model.router import RouterInputs, top_k
from gpt4moe.parallel.expert import sharded_experts
from gpt4moe.parallel.island import spread
from gpt4moe.parallel.mesh import make_mesh
from tests.model.slow import relative_difference

ROWS, TOKENS, DIM, HIDDEN = 4, 8, 8, 8
CONFIG = MoeConfig(8, 2, hidden_dim=HIDDEN)


def written_out(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Every device looks through what all others have for the rows meant for it."""
    me = jax.lax.axis_index(axis_name)
    gathered = (operand, input_offsets, send_sizes, output_offsets)
    operands, starts, sizes, targets = (jax.lax.all_gather(x, axis_name) for x in gathered)
    for sender in range(len(operands)):
        place = jnp.arange(operand.shape[0])
        index = jnp.where(place < sizes[sender, me], targets[sender, me] + place, output.shape[0])
        rows = jnp.take(operands[sender], starts[sender, me] + place, axis=0, mode="clip")
        output = output.at[index].set(rows, mode="drop")
    return output


def problem(preference=0.0):
    keys = jax.random.split(jax.random.key(0), 6)
    x_BTD = jax.random.normal(keys[0], (ROWS, TOKENS, DIM))
    logits_BTE = jax.random.normal(keys[1], (ROWS, TOKENS, 8)) + preference * (jnp.arange(8) == 3)
    inward, outward = (8, DIM, HIDDEN), (8, HIDDEN, DIM)
    weights = ExpertWeights(
        *(jax.random.normal(k, s) for k, s in zip(keys[2:], (inward, inward, outward), strict=False))
    )
    valid_BT = jax.random.bernoulli(keys[5], 0.9, (ROWS, TOKENS))
    return weights, x_BTD, logits_BTE, valid_BT


def routed(logits_BTE, valid_BT):
    inputs = RouterInputs(jnp.zeros(valid_BT.shape, jnp.int32), valid_BT)
    return jax.vmap(lambda logits, row: top_k(logits, row, CONFIG))(logits_BTE, inputs)


def applied(apply, weights, x_BTD, logits_BTE, valid_BT):
    """((y, dropped), gradients of weights, x and logits)."""

    def loss(weights, x_BTD, logits_BTE):
        y_BTD, dropped = apply(weights, x_BTD, routed(logits_BTE, valid_BT), CONFIG, False)
        return jnp.sum(jnp.sin(y_BTD)), (y_BTD, dropped)

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(weights, x_BTD, logits_BTE)
    return out, gradients


def on_mesh(axes, exchange, factor=None, **settings):
    config = MeshConfig(axes, **settings)
    mesh = make_mesh(config, jax.devices()[: int(np.prod(list(axes.values())))])
    return sharded_experts(spread(mesh, config, ShardingRules()), factor, exchange)


MESHES = {
    "EP4": ({"expert": 4}, {}),
    "EP2 x TP2 x DP2": ({"expert": 2, "tensor": 2, "data": 2}, {}),
    "EP2 x TP2 x CP2": ({"expert": 2, "tensor": 2, "context": 2}, {"sequence_parallel": True}),
}


@pytest.mark.parametrize("preference", [0.0, 50.0])
@pytest.mark.parametrize("name", MESHES)
def test_ragged_equals_one_device(name, preference, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", written_out)
    axes, settings = MESHES[name]
    (got, dropped), gradients = applied(on_mesh(axes, "ragged", **settings), *problem(preference))
    (want, _), wanted = applied(apply_experts, *problem(preference))
    assert int(dropped) == 0
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert relative_difference(gradients, wanted) < 1e-5


@functools.cache
def of_each_expert(preference):
    """What each expert alone adds to every token, [B, T, E, D]."""
    weights, x_BTD, *choices = problem(preference)

    def only(expert):
        down_EFD = weights.down_EFD * (jnp.arange(8) == expert)[:, None, None]
        return apply_experts(dataclasses.replace(weights, down_EFD=down_EFD), x_BTD, routed(*choices), CONFIG, False)[0]

    return np.moveaxis(jax.jit(lambda: jax.lax.map(only, jnp.arange(8)))(), 0, 2)


@pytest.mark.parametrize("exchange", ["bucket", "ragged"])
@pytest.mark.parametrize("axes", [{"expert": 4}, {"expert": 2, "tensor": 2}], ids=["EP4", "EP2 x TP2"])
def test_what_overflows_is_counted_and_spoils_nothing(axes, exchange, monkeypatch):
    """Most choose expert 3 of 8, and the devices that hold it lack room for all.

    Each token has all of its output but that of the choices it lost, and those are as many as were counted, also
    where two devices each send a part of the tokens.
    """
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", written_out)
    weights, *rest = problem(2.0)
    (got, dropped), _ = applied(on_mesh(axes, exchange, 1.0), weights, *rest)
    first, second = (of_each_expert(2.0)[place] for place in _chosen(rest[1]))
    cases = [(first + second, 0), (first, 1), (second, 1), (0 * first, 2)]
    distance_NBT = np.stack([np.abs(got - kept).max(-1) for kept, _ in cases])
    assert distance_NBT.min(0).max() < 1e-5
    valid_BT = np.asarray(rest[-1])
    missing_BT = np.array([count for _, count in cases])[distance_NBT.argmin(0)] * valid_BT
    assert 0 < int(dropped) == missing_BT.sum() < valid_BT.sum()


def _chosen(logits_BTE):
    """Indices into [B, T, E] of every token's first and second choice."""
    order_BTE = np.argsort(-logits_BTE, axis=-1)
    rows, tokens = np.indices(order_BTE.shape[:2])
    return [(rows, tokens, order_BTE[..., k]) for k in range(2)]


def test_gradients_of_rounded_matrices_are_summed_unrounded():
    """Four devices gather their matrices in bfloat16, and each has the gradient of its own row: added in float32."""
    weights, *rows = problem()

    def gradient(apply, x_BTD, logits_BTE, valid_BT):
        def loss(weights):
            y_BTD, _ = apply(weights, x_BTD.astype(jnp.bfloat16), routed(logits_BTE, valid_BT), CONFIG, False)
            return jnp.sum(jnp.sin(y_BTD.astype(jnp.float32)))

        return jax.jit(jax.grad(loss))(weights)

    alone = [gradient(apply_experts, *(leaf[row : row + 1] for leaf in rows)) for row in range(ROWS)]
    together = gradient(on_mesh({"fsdp": 4}, "bucket"), *rows)
    assert relative_difference(together, jax.tree.map(lambda *leaves: sum(leaves), *alone)) < 1e-5
