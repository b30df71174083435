"""Attention arithmetic against a loop over tokens and heads, values and gradients; cached against plain."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4moe.model import attention_backends, attention_kernel, rope
from tests.model import slow

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
HEAD_DIM = 4


def _operands(heads, kv_heads, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shape = SEGMENTS.shape
    q, k, v = (
        jax.random.normal(key, (*shape, n, HEAD_DIM)) for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=False)
    )
    # what a padding token sees is nobody's business: it gets no loss
    dy = jax.random.normal(keys[3], q.shape) * (SEGMENTS > 0)[..., None, None]
    return [x.astype(dtype) for x in (q, k, v)], dy


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("heads, kv_heads, chunk", [(4, 1, 3), (4, 2, 100)])
def test_equals_a_loop(heads, kv_heads, chunk, dtype, tolerance):
    operands, dy = _operands(heads, kv_heads, dtype)

    def ours(q, k, v):
        y = attention_kernel.attend(q, k, v, jnp.asarray(SEGMENTS), chunk)
        return jnp.sum(y.astype(jnp.float32) * dy), y

    def reference(q, k, v):
        y = jnp.stack([slow.attention(q[b], k[b], v[b], SEGMENTS[b]) for b in range(len(SEGMENTS))])
        return jnp.sum(y * dy), y

    (_, got), gradients = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(*operands)
    full = [x.astype(jnp.float32) for x in operands]
    (_, want), wanted = jax.value_and_grad(reference, (0, 1, 2), has_aux=True)(*full)
    real = (SEGMENTS > 0)[..., None, None]
    assert slow.relative_difference(got * real, want * real) < tolerance
    assert slow.relative_difference(gradients, wanted) < tolerance


# What the five or so queries of two rows may read, first and last number; keys of seven numbers, -2 of none.
RANGES = [[[0, 0], [0, 1], [1, 1], [2, 2], [0, 2], [3, 3]], [[0, 2], [1, 1], [-1, -1], [0, 0], [2, 2], [0, 1]]]
NUMBERS = [[0, 0, 1, -2, 1, 2, 2], [0, 1, 1, 1, -2, -2, 2]]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("queries", [1, 4, 6])  # with their keys as they lie, and head by head
def test_attention_across_equals_softmax_over_what_is_seen(queries, heads, kv_heads, dtype, tolerance):
    keys = jax.random.split(jax.random.key(0), 4)
    ranges, numbers = jnp.array(RANGES)[:, :queries], jnp.array(NUMBERS)
    q, dy = (jax.random.normal(key, (2, queries, heads, HEAD_DIM)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 7, kv_heads, HEAD_DIM)) for key in keys[2:])
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    visible = (ranges[..., :1] <= numbers[:, None]) & (numbers[:, None] <= ranges[..., 1:])
    sees = visible.any(-1)[..., None, None]
    assert queries < 6 or not sees.all()

    def ours(q, k, v):
        y = attention_kernel.attend_across(q, k, v, ranges, numbers, 4)
        return jnp.sum(jnp.where(sees, y.astype(jnp.float32), 0.0) * dy), y

    def reference(q, k, v):
        k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / HEAD_DIM**0.5
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30), axis=-1)
        y = jnp.einsum("bnts,bsnh->btnh", weights, v)
        return jnp.sum(jnp.where(sees, y, 0.0) * dy), y

    (_, got), gradients = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(q, k, v)
    full = [x.astype(jnp.float32) for x in (q, k, v)]
    (_, want), wanted = jax.value_and_grad(reference, (0, 1, 2), has_aux=True)(*full)
    assert got.dtype == q.dtype and jnp.isfinite(got.astype(jnp.float32)).all()
    assert slow.relative_difference(jnp.where(sees, got, 0.0), jnp.where(sees, want, 0.0)) < tolerance
    assert slow.relative_difference(gradients, wanted) < tolerance


@pytest.mark.parametrize("chunk", [2, 100])
def test_the_cache_gives_the_same(chunk):
    (q, k, v), _ = _operands(4, 2)
    want = attention_kernel.attend(q, k, v, jnp.ones(SEGMENTS.shape, jnp.int32), 100)
    spare = ((0, 0), (0, 3), (0, 0), (0, 0))  # slots after the last position hold rubbish that nobody sees
    k, v = jnp.pad(k, spare, constant_values=7.0), jnp.pad(v, spare, constant_values=7.0)
    positions = jnp.broadcast_to(jnp.arange(7), SEGMENTS.shape)
    got = jax.jit(attention_kernel.attend_cached, static_argnums=4)(q, k, v, positions, chunk)
    assert slow.relative_difference(got, want) < 1e-5


def test_nothing_is_as_large_as_all_scores():
    """At T = 64 and blocks of 8, no array of a whole [T, T] a head, forward or backward."""
    q, k, v = (jnp.ones((1, 64, n, HEAD_DIM)) for n in (4, 1, 1))

    def loss(q, k, v):
        return jnp.sum(attention_kernel.attend(q, k, v, jnp.ones((1, 64), jnp.int32), 8))

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v))
    assert "[64,4,64]" not in text and "[8,4,64]" in text


@pytest.mark.filterwarnings("ignore")
def test_the_tpu_kernel_gives_the_same():
    """Interpreted on the CPU; its own products are rounded, hence the tolerance."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (1, 128, n, 128)) for key, n in zip(keys, (4, 2, 2), strict=False))
    dy = jax.random.normal(keys[3], q.shape)
    segments = jnp.ones((1, 128), jnp.int32).at[:, 50:].set(2)

    def weighted(attend):
        return lambda *operands: jnp.sum(attend(*operands, segments) * dy)

    interpreted = functools.partial(attention_backends.splash_attend, interpret=True)
    plain = functools.partial(attention_kernel.attend, query_chunk=64)
    got, want = (jax.jit(jax.grad(weighted(a), (0, 1, 2)))(q, k, v) for a in (interpreted, plain))
    assert slow.relative_difference(got, want) < 1e-3


def test_the_tpu_kernel_lowers_for_a_tpu():
    q, kv = (jnp.ones((2, 256, n, 128), jnp.bfloat16) for n in (4, 1))

    def loss(q, k, v):
        y = attention_kernel.attend(q, k, v, jnp.ones((2, 256), jnp.int32), 1024, backend="tpu")
        return jnp.sum(y.astype(jnp.float32))

    checks = [jax.export.DisabledSafetyCheck.custom_call("tpu_custom_call")]
    exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=["tpu"], disabled_checks=checks)(q, kv, kv)
    assert "tpu_custom_call" in exported.mlir_module()


def test_rotation_makes_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def turned(x, position):
        return rope.rotate(x, rope.rotation(jnp.array([[position]]), 8, 100.0))

    def score(i, j):
        return float(jnp.sum(turned(q, i) * turned(k, j)))

    np.testing.assert_allclose(score(5, 3), score(105, 103), rtol=1e-4)
    assert abs(score(5, 3) - score(5, 4)) > 1e-3


def test_rotation_of_the_first_pair_by_hand():
    """Position 1 turns the first pair, dims 0 and H/2, by one radian."""
    turned = rope.rotate(jnp.array([[[[1.0, 0.0, 0.0, 0.0]]]]), rope.rotation(jnp.array([[1]]), 4, 100.0))
    np.testing.assert_allclose(turned[0, 0, 0], [np.cos(1), 0, np.sin(1), 0], atol=1e-6)
