"""One layer written out: pre-norm, two residuals, its own norms for queries and keys, rotary at every pair."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt4moe.model.transformer import Transformer
from tests.model import slow
from tests.model.test_transformer import TINY, _tokens

CONFIG = dataclasses.replace(TINY, num_layers=1)
LENGTH = 7


def matrix(parameter):
    return np.asarray(parameter[...], np.float64)


def norm(x, module):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_epsilon) * matrix(module.scale)


def turned(x_THD):
    """Rotary positions as complex numbers: pair (i, i + H/2) turns by position / theta^(2i/H)."""
    half = x_THD.shape[-1] // 2
    angle_TH = np.arange(LENGTH)[:, None] * CONFIG.attention.rope_theta ** (-np.arange(half) / half)
    turned_THD = (x_THD[..., :half] + 1j * x_THD[..., half:]) * np.exp(1j * angle_TH)[:, None]
    return np.concatenate([turned_THD.real, turned_THD.imag], -1)


def attention(h_TD, module):
    q_TNH, k_TNH, v_TNH = (np.einsum("td,dnh->tnh", h_TD, matrix(p)) for p in (module.query, module.key, module.value))
    q_TNH, k_TNH = turned(norm(q_TNH, module.query_norm)), turned(norm(k_TNH, module.key_norm))
    y_TNH = slow.attention(*map(jnp.asarray, (q_TNH, k_TNH, v_TNH)), np.ones(LENGTH, int))
    return np.einsum("tnh,nhd->td", np.asarray(y_TNH), matrix(module.output))


def mixture(h_TD, module):
    p_TE = np.asarray(jax.nn.softmax(h_TD @ matrix(module.router)))
    ids_TK = np.argsort(-p_TE, axis=-1)[:, :2]
    gates_TK = np.take_along_axis(p_TE, ids_TK, -1)
    gates_TK /= gates_TK.sum(-1, keepdims=True)
    routed, shared = (
        [matrix(p) for p in (experts.gate, experts.up, experts.down)]
        for experts in (module.experts, module.shared_expert)
    )
    y_TD = slow.mixture(h_TD[None], gates_TK[None], routed, ids_TK[None], np.ones((1, LENGTH, 2), bool), None)[0]
    return y_TD + np.stack([slow.feed_forward(h_D, *shared) for h_D in h_TD])


def test_a_model_of_one_layer_written_out():
    graph, state = nnx.split(Transformer(CONFIG, rngs=nnx.Rngs(0)))
    keys = iter(jax.random.split(jax.random.key(3), 99))  # scales of one would hide a norm taken for another
    state = jax.tree.map(lambda x: x * jax.random.uniform(next(keys), x.shape, minval=0.5, maxval=1.5), state)
    model = nnx.merge(graph, state)
    tokens, positions, segments = _tokens(1, LENGTH)
    got, _ = jax.jit(lambda state: nnx.merge(graph, state)(tokens, positions, segments, dropless=True))(state)
    block = slow.one_layer(model.blocks)
    x_TD = matrix(model.embedding)[np.asarray(tokens[0])] / 0.02
    x_TD = x_TD + attention(norm(x_TD, block.attention_norm), block.attention)
    x_TD = x_TD + np.asarray(mixture(norm(x_TD, block.feed_forward_norm), block.moe))
    assert slow.relative_difference(got[0], norm(x_TD, model.final_norm)) < 1e-5
