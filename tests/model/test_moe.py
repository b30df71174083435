"""The layer as a whole: what it must equal, and that the router learns from the language-model loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.moe import MoeConfig
from gpt4moe.model.layout import ONE_DEVICE
from gpt4moe.model.moe import Moe, RoutedTokens
from gpt4moe.model.router import assemble
from tests.model import slow

BATCH, TOKENS, DIM = 2, 6, 8


def _layer(**settings):
    config = MoeConfig(**{"num_experts": 4, "experts_per_token": 2, "hidden_dim": 6, **settings})
    return slow.one_layer(Moe((0,), DIM, config, ONE_DEVICE, 1.0, nnx.Rngs(0)))


def _inputs():
    x_BTD = jax.random.normal(jax.random.key(1), (BATCH, TOKENS, DIM))
    return x_BTD, jnp.zeros((BATCH, TOKENS), jnp.int32), jnp.ones((BATCH, TOKENS), bool)


@nnx.jit(static_argnames="dropless")
def _apply(layer, x_BTD, token_ids_BT, valid_BT, dropless=False):
    return layer(x_BTD, RoutedTokens(token_ids_BT, valid_BT), dropless=dropless)


@nnx.jit
def _router_gradient(layer, x_BTD, token_ids_BT, valid_BT):
    def loss(layer):
        return jnp.sum(jnp.square(layer(x_BTD, RoutedTokens(token_ids_BT, valid_BT), dropless=False)[0]))

    return nnx.grad(loss)(layer)["router"][...]


@pytest.mark.parametrize("capacity_factor", [None, 100.0])
def test_identical_experts_are_one_dense_feed_forward(capacity_factor):
    layer = _layer(capacity_factor=capacity_factor)
    experts = layer.experts
    for matrix in (experts.gate, experts.up, experts.down):
        matrix[...] = jnp.broadcast_to(matrix[...][:1], matrix.shape)
    x_BTD, *rest = _inputs()
    y_BTD, _ = _apply(layer, x_BTD, *rest)
    one = jax.vmap(jax.vmap(slow.feed_forward, (0, None, None, None)), (0, None, None, None))
    want = one(x_BTD, experts.gate[...][0], experts.up[...][0], experts.down[...][0])
    assert slow.relative_difference(y_BTD, want) < 1e-5


def test_a_single_expert_takes_everything():
    layer = _layer(num_experts=1, experts_per_token=1)
    x_BTD, *rest = _inputs()
    y_BTD, out = _apply(layer, x_BTD, *rest)
    experts = layer.experts
    one = jax.vmap(jax.vmap(slow.feed_forward, (0, None, None, None)), (0, None, None, None))
    want = one(x_BTD, experts.gate[...][0], experts.up[...][0], experts.down[...][0])
    assert slow.relative_difference(y_BTD, want) < 1e-5
    np.testing.assert_array_equal(out.load_E, [BATCH * TOKENS])


def test_the_shared_expert_is_added():
    layer = _layer(shared_hidden_dim=5)
    x_BTD, *rest = _inputs()
    with_shared, _ = _apply(layer, x_BTD, *rest)
    shared = layer.shared_expert
    one = jax.vmap(jax.vmap(slow.feed_forward, (0, None, None, None)), (0, None, None, None))
    added = one(x_BTD, shared.gate[...], shared.up[...], shared.down[...])
    shared.down[...] = jnp.zeros_like(shared.down[...])
    without_shared, _ = _apply(layer, x_BTD, *rest)
    assert slow.relative_difference(with_shared - without_shared, added) < 1e-5


def test_dropless_overrides_the_capacity():
    layer = _layer(capacity_factor=0.3)
    inputs = _inputs()
    assert int(_apply(layer, *inputs)[1].dropped) > 0
    y_BTD, out = _apply(layer, *inputs, dropless=True)
    assert int(out.dropped) == 0
    roomy = _layer(capacity_factor=100.0)
    assert slow.relative_difference(y_BTD, _apply(roomy, *inputs)[0]) < 1e-5


@pytest.mark.parametrize("choices, normalized", [(1, False), (2, False), (2, True), (3, True)])
def test_the_router_learns_from_the_output_alone(choices, normalized):
    layer = _layer(experts_per_token=choices, normalize_gates=normalized, capacity_factor=100.0)
    gradient_DE = _router_gradient(layer, *_inputs())
    assert (np.abs(gradient_DE).max(axis=0) > 1e-6).all()


def second_best(logits_UE, inputs, config):
    """A router of the user's own: the second likeliest expert, with weight one."""
    ids_UK = jax.lax.top_k(logits_UE, 2)[1][:, 1:]
    return assemble(logits_UE, ids_UK, jnp.ones(ids_UK.shape), inputs)


def test_a_router_of_the_users_own():
    plain, own = _layer(experts_per_token=2), _layer(experts_per_token=2, router=second_best)
    x_BTD, *rest = _inputs()
    _, out = _apply(own, x_BTD, *rest)
    logits = np.asarray(jnp.einsum("BTD,DE->BTE", x_BTD, plain.router[...])).reshape(-1, 4)
    want = np.bincount(np.argsort(-logits, axis=-1)[:, 1], minlength=4)
    np.testing.assert_array_equal(out.load_E, want)
