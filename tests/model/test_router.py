"""Top-k routing: choices, gates, losses and statistics, by hand and as invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4moe.config.moe import MoeConfig
from gpt4moe.model.router import RouterInputs, top_k


def _inputs(valid):
    valid = jnp.asarray(valid, bool)
    return RouterInputs(jnp.zeros(valid.shape, jnp.int32), valid)


def test_story_of_three_tokens():
    """Probabilities are chosen, logits are their logarithms; the third token is padding."""
    probabilities = np.array([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [1 / 3] * 3])
    routing = top_k(jnp.log(probabilities), _inputs([1, 1, 0]), MoeConfig(3, 2, hidden_dim=1))
    np.testing.assert_array_equal(routing.expert_ids_UK[:2], [[0, 1], [2, 1]])
    np.testing.assert_allclose(routing.gates_UK, [[5 / 8, 3 / 8], [2 / 3, 1 / 3], [0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(routing.used_UK, [[True, True], [True, True], [False, False]])
    np.testing.assert_array_equal(routing.stats.load_E, [1, 2, 1])
    # f = (1, 2, 1) / 4 and P = (0.3, 0.3, 0.4): 3 * (0.3 * 1/4 + 0.3 * 2/4 + 0.4 * 1/4)
    np.testing.assert_allclose(routing.losses.load_balance, 3 * 0.325, rtol=1e-6)
    np.testing.assert_allclose(routing.losses.router_z, 0.0, atol=1e-6)
    entropy = -(probabilities[:2] * np.log(probabilities[:2])).sum()
    np.testing.assert_allclose(routing.stats.entropy, entropy, rtol=1e-6)


def test_z_loss_is_the_squared_log_partition_of_real_tokens():
    logits_UE = jnp.log(jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    routing = top_k(logits_UE, _inputs([1, 1, 0]), MoeConfig(2, 1, hidden_dim=1, normalize_gates=False))
    np.testing.assert_allclose(routing.losses.router_z, np.log(3.0) ** 2 + np.log(7.0) ** 2, rtol=1e-6)


@pytest.mark.parametrize("num_experts, choices", [(4, 1), (4, 2), (8, 8)])
def test_balance_loss_is_one_at_uniform_routing(num_experts, choices):
    logits_UE = 1e-4 * jnp.eye(num_experts)  # token i prefers expert i, all by the same hair
    config = MoeConfig(num_experts, choices, hidden_dim=1, normalize_gates=False)
    routing = top_k(logits_UE, _inputs(np.ones(num_experts)), config)
    np.testing.assert_allclose(routing.losses.load_balance, 1.0, rtol=1e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("normalized", [True, False])
def test_gates_and_load_over_random_inputs(seed, normalized):
    keys = jax.random.split(jax.random.key(seed), 2)
    logits_UE, valid_U = jax.random.normal(keys[0], (50, 6)), jax.random.bernoulli(keys[1], 0.7, (50,))
    routing = top_k(logits_UE, _inputs(valid_U), MoeConfig(6, 3, hidden_dim=1, normalize_gates=normalized))
    assert int(routing.stats.load_E.sum()) == 3 * int(valid_U.sum())
    assert float(routing.losses.load_balance) > 0
    sums_U = np.asarray(routing.gates_UK.sum(-1))
    np.testing.assert_array_equal(sums_U[~np.asarray(valid_U)], 0.0)
    if normalized:
        np.testing.assert_allclose(sums_U[np.asarray(valid_U)], 1.0, rtol=1e-6)
    else:
        assert (sums_U[np.asarray(valid_U)] < 1.0).all()


def test_a_group_without_tokens_has_no_loss_and_finite_gradients():
    def losses(logits_UE):
        routing = top_k(logits_UE, _inputs(np.zeros(5)), MoeConfig(3, 2, hidden_dim=1))
        return routing.losses.load_balance + routing.losses.router_z + routing.gates_UK.sum()

    value, gradient = jax.value_and_grad(losses)(jax.random.normal(jax.random.key(0), (5, 3)))
    np.testing.assert_array_equal(value, 0.0)
    np.testing.assert_array_equal(gradient, 0.0)
