"""The whole model: initialisation, causality, packing, cache, layouts of layers, the full-size configuration."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.accounting import parameters
from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.model import layout, transformer
from gpt4moe.model.cache import init_cache
from gpt4moe.model.layers import normal_parameter
from gpt4moe.model.transformer import Transformer
from tests.model.slow import relative_difference

TINY = ModelConfig(
    num_layers=2,
    model_dim=16,
    vocab_size=24,
    context_length=16,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm=True),
    moe=MoeConfig(num_experts=4, experts_per_token=2, hidden_dim=8, shared_hidden_dim=6),
    compute_dtype="float32",
)
INTERLEAVED = dataclasses.replace(
    TINY, num_layers=4, moe_every=2, dense_hidden_dim=10, tie_embeddings=False, moe=MoeConfig(4, 2, 8, gated=False)
)
LEADING = dataclasses.replace(INTERLEAVED, num_layers=6, leading_dense_layers=2)
FULL_SIZE = ModelConfig(
    num_layers=120,
    model_dim=10752,
    vocab_size=100352,
    context_length=8192,
    attention=AttentionConfig(num_heads=168, head_dim=128),
    moe=MoeConfig(num_experts=16, experts_per_token=2, hidden_dim=43008, gated=False),
)


@functools.cache
def _model(config=TINY):
    """Made operation by operation: shapes recur, and a program for all draws of each model compiles long."""
    return Transformer(config, rngs=nnx.Rngs(0))


@nnx.jit(static_argnames="dropless")
def _forward(model, tokens, positions, segments, dropless=True, cache=None):
    x, out = model(tokens, positions, segments, dropless=dropless, cache=cache)
    return x, model.logits(x), out


def _tokens(rows, length, seed=1):
    tokens = jax.random.randint(jax.random.key(seed), (rows, length), 0, TINY.vocab_size)
    return tokens, jnp.broadcast_to(jnp.arange(length), tokens.shape), jnp.ones(tokens.shape, jnp.int32)


def _logits_alone(model, tokens, length=10):
    """Logits of one document [1, T] in a row of its own, padded to `length`: one program serves all lengths."""
    num_tokens = tokens.shape[1]
    row, at = jnp.pad(tokens, ((0, 0), (0, length - num_tokens))), jnp.arange(length)[None]
    return _forward(model, row, at, (at < num_tokens).astype(jnp.int32))[1][:, :num_tokens]


@pytest.mark.parametrize("config", [TINY, INTERLEAVED, LEADING], ids=["every_layer", "every_other", "leading"])
def test_parameters_are_those_counted(config):
    shapes = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))))
    assert sum(leaf.size for leaf in shapes) == parameters.count(config).total


def test_the_full_size_model_is_described_without_being_made():
    model = nnx.eval_shape(lambda: Transformer(FULL_SIZE, rngs=nnx.Rngs(0)))
    leaves = nnx.to_flat_state(nnx.state(model))
    assert sum(leaf.get_value().size for _, leaf in leaves) == parameters.count(FULL_SIZE).total
    assert model.blocks.moe.experts.up.get_value().shape == (120, 16, 10752, 43008)
    for path, leaf in leaves:
        assert len(leaf.get_metadata()["logical_axes"]) == len(leaf.get_value().shape), path


def test_initial_deviations():
    """Matrices fan_in^-1/2, those into the residual stream 1/sqrt(2L) of that, router a tenth, embedding 0.02."""
    config = dataclasses.replace(TINY, model_dim=64, vocab_size=500, moe=MoeConfig(4, 2, 96), num_layers=3)
    model = _model(config)
    depth = 6**-0.5
    stated = {
        "embedding": (model.embedding, config.embedding_std),
        "query": (model.blocks.attention.query, 64**-0.5),
        "output": (model.blocks.attention.output, 64**-0.5 * depth),
        "router": (model.blocks.moe.router, 0.1 * 64**-0.5),
        "up": (model.blocks.moe.experts.up, 64**-0.5),
        "down": (model.blocks.moe.experts.down, 96**-0.5 * depth),
    }
    for name, (parameter, std) in stated.items():
        values = np.asarray(parameter[...])
        np.testing.assert_allclose(values.std(), std, rtol=0.1, err_msg=name)
        assert np.abs(values).max() <= 2 * std / 0.879, name
    np.testing.assert_array_equal(model.blocks.attention_norm.scale[...], 1.0)


@pytest.mark.parametrize("model_dim", [64, 256])
def test_tokens_begin_at_unit_deviation_and_with_the_same_logit_for_themselves_at_any_width(model_dim):
    config = dataclasses.replace(TINY, model_dim=model_dim, vocab_size=500, compute_dtype="float32")
    model = _model(config)
    embedded_VD = model._embed(jnp.arange(500))
    np.testing.assert_allclose(np.std(embedded_VD), 1.0, rtol=0.05)
    logits_VV = np.asarray(model.logits(model.final_norm(embedded_VD)))
    np.testing.assert_allclose(np.diag(logits_VV).mean(), transformer.INITIAL_SELF_LOGIT, rtol=0.1)
    assert np.abs(logits_VV - np.diag(np.diag(logits_VV))).mean() < 0.6


def test_a_layers_initial_values_do_not_depend_on_the_number_of_layers():
    three, two = (
        normal_parameter(nnx.Rngs(0), layers, (4, 5), ("embed", "mlp"), 1.0)[...] for layers in ((0, 1, 2), (0, 1))
    )
    np.testing.assert_array_equal(three[:2], two)
    assert not np.array_equal(three[0], three[1])


def test_no_token_sees_the_future():
    """Token t's embedding has gradient from the output at position p exactly where t <= p."""
    _, positions, segments = _tokens(1, 8)
    graph, state = nnx.split(_model())

    @jax.jit
    def influence(position):
        def output(state):
            x, _ = nnx.merge(graph, state)(jnp.arange(8)[None], positions, segments, dropless=True)
            return jnp.sum(x[0] * (jnp.arange(8) == position)[:, None])

        return jnp.abs(jax.grad(output)(state)["embedding"][...][:8]).max(axis=1)

    for position in range(0, 8, 3):
        reached = np.asarray(influence(position)) > 0
        np.testing.assert_array_equal(reached, np.arange(8) <= position)


def test_a_packed_row_is_its_segments_on_their_own():
    model, (tokens, _, _) = _model(), _tokens(1, 10)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0]])
    _, packed, out = _forward(model, tokens, positions, segments)
    for start, stop in ((0, 4), (4, 9)):
        assert relative_difference(packed[:, start:stop], _logits_alone(model, tokens[:, start:stop])) < 1e-5
    np.testing.assert_array_equal(out.moe.load_E.sum(axis=1), 2 * 9)


@pytest.mark.parametrize("config", [TINY, LEADING], ids=["every_layer", "leading_and_every_other"])
def test_prefill_and_decode_equal_the_full_forward(config):
    model, (tokens, positions, segments) = _model(config), _tokens(2, 9)
    _, want, _ = _forward(model, tokens, positions, segments)
    cache, logits = init_cache(config, 2, 12), []
    for piece in (slice(0, 6), slice(6, 7), slice(7, 8), slice(8, 9)):
        _, piece_logits, out = _forward(model, tokens[:, piece], positions[:, piece], segments[:, piece], cache=cache)
        cache = out.cache
        logits.append(piece_logits)
    got = jnp.concatenate(logits, axis=1)
    assert relative_difference(got, want) < 1e-5
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


def test_rows_of_different_lengths_share_a_cache():
    """Row 1 is two tokens shorter; its padding is not written, and its next token follows at its own position."""
    model, (tokens, positions, segments) = _model(), _tokens(2, 6)
    segments = segments.at[1, 4:].set(0)
    _, _, out = _forward(model, tokens, positions, segments, cache=init_cache(TINY, 2, 8))
    np.testing.assert_array_equal(out.cache.keys[:, 1, 4:], 0.0)
    next_token, at = jnp.array([[3], [5]]), jnp.array([[6], [4]])
    _, got, _ = _forward(model, next_token, at, jnp.ones((2, 1), jnp.int32), cache=out.cache)
    for row, length in ((0, 6), (1, 4)):
        alone = jnp.concatenate([tokens[row : row + 1, :length], next_token[row : row + 1]], axis=1)
        assert relative_difference(got[row, 0], _logits_alone(model, alone)[0, -1]) < 1e-5


ONE_LAYER = dataclasses.replace(TINY, num_layers=1)


@functools.cache
def _loss_and_gradients(config, most_unrolled=layout.MOST_UNROLLED):
    graph, state = nnx.split(_model(config))
    tokens, positions, segments = _tokens(2, 8)

    def loss(state):
        x, _ = nnx.merge(graph, state)(tokens, positions, segments)
        return jnp.mean(jnp.square(x.astype(jnp.float32) - 1.0))

    return jax.jit(jax.value_and_grad(loss))(state)


def test_leading_layers_come_first_and_report_nothing():
    """A leading layer that adds nothing leaves the model that begins with the superblocks."""
    model, (tokens, positions, segments) = _model(LEADING), _tokens(2, 8)
    graph, state = nnx.split(model)
    silent = jax.tree.map(jnp.zeros_like, state["leading_blocks"])
    alone = _model(INTERLEAVED)
    shared = {name: leaf for name, leaf in state.items() if name != "leading_blocks"}
    _, want, want_out = _forward(nnx.merge(nnx.split(alone)[0], nnx.State(dict(shared))), tokens, positions, segments)
    _, got, got_out = _forward(
        nnx.merge(graph, nnx.State({**shared, "leading_blocks": silent})), tokens, positions, segments
    )
    assert relative_difference(got, want) < 1e-6
    np.testing.assert_array_equal(got_out.moe.load_E, want_out.moe.load_E)
    _, with_them, _ = _forward(model, tokens, positions, segments)
    assert relative_difference(with_them, want) > 1e-2


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputation_changes_nothing(remat):
    got = _loss_and_gradients(dataclasses.replace(ONE_LAYER, remat=remat))
    assert relative_difference(got, _loss_and_gradients(ONE_LAYER)) < 1e-5


def test_the_loop_over_layers_changes_nothing(monkeypatch):
    want = _loss_and_gradients(TINY)
    monkeypatch.setattr(layout, "MOST_UNROLLED", 0)
    assert relative_difference(_loss_and_gradients(TINY, most_unrolled=0), want) < 1e-5


@pytest.mark.parametrize("capacity_factor", [None, 1.25])
def test_bfloat16_follows_float32(capacity_factor):
    config = dataclasses.replace(ONE_LAYER, moe=dataclasses.replace(TINY.moe, capacity_factor=capacity_factor))
    want, _ = _loss_and_gradients(config)
    got, gradients = _loss_and_gradients(dataclasses.replace(config, compute_dtype="bfloat16"))
    np.testing.assert_allclose(got, want, rtol=2e-2)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))
