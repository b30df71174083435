"""The objective: chunked cross-entropy, and that microbatches add up to the whole batch, values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.model.transformer import Transformer
from gpt4moe.model.vocabulary import cross_entropy
from gpt4moe.train.loss import batch_loss, normalizers
from gpt4moe.types import Batch
from tests.model.slow import relative_difference

CONFIG = ModelConfig(
    num_layers=2,
    model_dim=16,
    vocab_size=20,
    context_length=16,
    attention=AttentionConfig(num_heads=2),
    moe=MoeConfig(
        num_experts=4, experts_per_token=2, hidden_dim=8, capacity_factor=1.0, load_balance_weight=2.0,
        router_z_weight=0.3,
    ),
    compute_dtype="float32",
)  # fmt: skip


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("chunk", [7, 100])
def test_cross_entropy_in_chunks(chunk, dtype, tolerance):
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD = jax.random.normal(keys[0], (2, 3, 8)).astype(dtype)
    weight_VD, targets_BT = jax.random.normal(keys[1], (20, 8)), jax.random.randint(keys[2], (2, 3), 0, 20)
    dnll_BT = jax.random.normal(keys[3], (2, 3))

    def reference(x_BTD, weight_VD):
        log_probabilities = jax.nn.log_softmax(x_BTD @ weight_VD.T)
        return -jnp.take_along_axis(log_probabilities, targets_BT[..., None], -1)[..., 0]

    def ours(x_BTD, weight_VD):
        return cross_entropy(x_BTD, weight_VD, targets_BT, chunk)

    def weighted(nll):
        return lambda x_BTD, weight_VD: jnp.sum(nll(x_BTD, weight_VD) * dnll_BT)

    got = jax.jit(ours)(x_BTD, weight_VD), jax.jit(jax.grad(weighted(ours), (0, 1)))(x_BTD, weight_VD)
    x_full = x_BTD.astype(jnp.float32)
    want = reference(x_full, weight_VD), jax.grad(weighted(reference), (0, 1))(x_full, weight_VD)
    assert relative_difference(got, want) < tolerance


def _batch():
    """Four rows of unlike weight: a full one, a short one, one of two segments, an empty one."""
    keys = jax.random.split(jax.random.key(0), 2)
    tokens, targets = jax.random.randint(keys[0], (2, 4, 10), 0, CONFIG.vocab_size)
    segments = jnp.ones((4, 10), jnp.int32).at[1, 3:].set(0).at[2, 5:].set(2).at[3].set(0)
    positions = jnp.broadcast_to(jnp.arange(10), (4, 10)).at[2, 5:].add(-5)
    weights = jnp.where(segments > 0, jax.random.uniform(keys[1], (4, 10)), 0.0)
    sources = jnp.broadcast_to(jnp.array([[0], [1], [0], [2]]), (4, 10))
    return Batch(tokens, targets, weights, positions, segments, sources)


@functools.cache
def _shares(config, num_microbatches):
    """Objective, sums and gradient added up over microbatches."""
    graph, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    # The router is near uniform at first; sharpen it so that the balance loss has something to say.
    state["blocks"]["moe"]["router"][...] = 50 * state["blocks"]["moe"]["router"][...]
    batch = _batch()
    counts = normalizers(batch)

    @jax.jit
    def share(state, microbatch):
        def loss(state):
            return batch_loss(nnx.merge(graph, state), microbatch, counts, num_sources=3)

        return jax.value_and_grad(loss, has_aux=True)(state)

    rows = 4 // num_microbatches
    shares = [share(state, jax.tree.map(lambda x, i=i: x[i : i + rows], batch)) for i in range(0, 4, rows)]
    return jax.tree.map(lambda *leaves: sum(leaves), *shares)


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_accumulation_gives_the_loss_and_gradient_of_the_whole(num_microbatches):
    """The auxiliary terms weigh as much as the cross-entropy here, so an error in either shows in every gradient."""
    assert relative_difference(_shares(CONFIG, num_microbatches), _shares(CONFIG, 1)) < 1e-5


def test_the_objective_is_made_of_its_sums():
    (objective, sums), _ = _shares(CONFIG, 1)
    batch = _batch()
    weight, tokens = float(batch.loss_weights.sum()), int((batch.segment_ids > 0).sum())
    moe = CONFIG.moe
    np.testing.assert_allclose(sums.load_balance, sums.moe.load_balance / 3, rtol=1e-6)  # three rows have tokens
    auxiliary = moe.load_balance_weight * sums.load_balance.sum()
    auxiliary += moe.router_z_weight * sums.moe.router_z.sum() / tokens
    np.testing.assert_allclose(objective, sums.cross_entropy / weight + auxiliary, rtol=1e-6)
    np.testing.assert_allclose(sums.source_cross_entropy.sum(), sums.cross_entropy, rtol=1e-6)
    np.testing.assert_allclose(sums.source_weight, [
        batch.loss_weights[0].sum() + batch.loss_weights[2].sum(), batch.loss_weights[1].sum(), 0.0
    ], rtol=1e-6)  # fmt: skip
    np.testing.assert_array_equal(sums.moe.load_E.sum(axis=1), 2 * tokens)


def test_padding_has_no_influence():
    batch = _batch()
    padding = batch.segment_ids == 0
    other = dataclasses.replace(batch, tokens=jnp.where(padding, 7, batch.tokens), targets=jnp.where(padding, 5, 1))
    graph, state = nnx.split(Transformer(CONFIG, rngs=nnx.Rngs(0)))
    batch = dataclasses.replace(batch, targets=jnp.where(padding, 2, 1))
    loss = jax.jit(
        jax.value_and_grad(lambda s, b: batch_loss(nnx.merge(graph, s), b, normalizers(b), num_sources=3)[0])
    )
    assert relative_difference(loss(state, other), loss(state, batch)) < 1e-6
