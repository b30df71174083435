"""Every lowering of rows through experts against a loop over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4moe.infer import expert_rows
from gpt4moe.infer.decode_weights import FeedForwardWeights
from gpt4moe.infer.matrix import joined, make_matrix
from tests.model.slow import mixture, relative_difference

NUM_EXPERTS, DIM, HIDDEN = 4, 6, 5


def _parameters(gated):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(NUM_EXPERTS, DIM, HIDDEN)] * 2 + [(NUM_EXPERTS, HIDDEN, DIM)]
    gate, up, down = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return gate if gated else None, up, down


def _experts(parameters):
    gate, up, down = parameters

    def of(matrix):
        return make_matrix(matrix, jnp.float32, None)

    inward = [up] if gate is None else [gate, up]
    return tuple(FeedForwardWeights(joined([of(part[e]) for part in inward]), of(down[e])) for e in range(NUM_EXPERTS))


def _choices(rows):
    """Two different experts for each row, most of them of the first two; some rows with one choice or none."""
    draw = np.random.default_rng(0)
    ids = np.stack([draw.choice(NUM_EXPERTS, 2, replace=False, p=[0.5, 0.4, 0.1, 0.0]) for _ in range(rows)])
    gates = draw.uniform(0.1, 1.0, ids.shape).astype(np.float32)
    gates[1::5, 1] = 0
    gates[2::7] = 0
    return ids.astype(np.int32), gates


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("visit", ["visit_one", "visit_chosen", "visit_all", "visit_sorted"])
def test_rows_go_through_their_experts(visit, gated):
    # Of sorted rows more than a large and several small blocks of an expert.
    rows = {"visit_one": 1, "visit_sorted": 300}.get(visit, 9)
    parameters, (ids, gates) = _parameters(gated), _choices(rows)
    x = jax.random.normal(jax.random.key(1), (rows, DIM))
    got = jax.jit(functools.partial(getattr(expert_rows, visit), gated=gated))(_experts(parameters), x, ids, gates)
    sample = slice(0, 40)
    want = mixture(x[None, sample], gates[None, sample], parameters, ids[None, sample], gates[None, sample] != 0, None)
    assert relative_difference(got[sample], want[0]) < 1e-5
    all_rows = expert_rows.visit_all(_experts(parameters), x, ids, gates, gated)
    assert relative_difference(got, all_rows) < 1e-5


def test_an_expert_without_rows_is_not_read():
    """Where nothing goes to it, an expert of NaN does no harm: what `visit_chosen` is for."""
    parameters = list(_parameters(True))
    parameters[2] = parameters[2].at[3].set(jnp.nan)
    ids, gates = _choices(9)
    x = jax.random.normal(jax.random.key(1), (9, DIM))
    y = expert_rows.visit_chosen(_experts(parameters), x, ids, gates, True)
    assert np.isfinite(y).all() and np.abs(y).max() > 0
