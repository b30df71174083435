"""Sampling: exact kept sets against a slow loop, and draws against the distribution they come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.sampling import SamplingParams, draw, filtered_logits, row_keys, sample, sampling_params

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])


def logits_of(probabilities):
    return jnp.log(jnp.asarray(probabilities, jnp.float32))[None]


def kept(**settings):
    """Ids that a filter keeps of PROBABILITIES."""
    params = sampling_params([SamplingConfig(**settings)], len(PROBABILITIES))
    return set(np.flatnonzero(np.isfinite(filtered_logits(logits_of(PROBABILITIES), params)[0])).tolist())


def test_top_k_keeps_the_k_most_probable():
    assert kept(top_k=1) == {1}
    assert kept(top_k=3) == {1, 3, 4}
    assert kept(top_k=99) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
    assert kept(top_p=0.01) == {1}
    assert kept(top_p=0.39) == {1}
    assert kept(top_p=0.41) == {1, 3}
    assert kept(top_p=0.84) == {1, 3, 4}
    assert kept(top_p=1.0) == {0, 1, 2, 3, 4}


def test_top_p_counts_what_top_k_left():
    # Of {0.4, 0.3}, renormalised to {0.571, 0.429}, 0.5 is reached by the first alone; of all five it is not.
    assert kept(top_p=0.5) == {1, 3}
    assert kept(top_k=2, top_p=0.5) == {1}


def test_temperature_comes_before_top_p():
    # At temperature 0.5 the probabilities are squared: 0.16 / 0.285 = 0.56 for the first.
    assert kept(top_p=0.5, temperature=1.0) == {1, 3}
    assert kept(top_p=0.5, temperature=0.5) == {1}


def test_equal_logits_go_to_the_lower_ids():
    params = sampling_params([SamplingConfig(top_k=2)], 4)
    filtered = filtered_logits(jnp.zeros((1, 4)), params)
    assert np.isfinite(filtered)[0].tolist() == [True, True, False, False]


def test_min_p_keeps_what_is_probable_beside_the_most_probable():
    assert kept(min_p=0.3) == {1, 3, 4}
    assert kept(min_p=0.2, temperature=1.0) == {0, 1, 3, 4}
    assert kept(min_p=0.2, temperature=0.5) == {1, 3}  # squared: 0.16, 0.09, 0.0225, ...
    assert kept(min_p=1.0) == {1}


def slow_filter(logits, temperature, top_k, top_p, min_p):
    """Set of kept ids of one row, one token at a time, in float64."""
    scaled = logits.astype(np.float64) / temperature
    ranked = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))[:top_k]
    weights = np.exp(scaled[ranked] - scaled[ranked].max())
    total, ids = 0.0, set()
    for token, probability in zip(ranked, weights / weights.sum(), strict=True):
        ids.add(token)
        total += probability
        if total >= top_p:
            break
    return {token for token in ids if scaled[token] >= scaled.max() + np.log(min_p)}


def test_filter_equals_slow_loop_on_random_rows_of_different_settings():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(64, 37)).astype(np.float32) * 3
    temperature = generator.uniform(0.3, 2.0, 64).astype(np.float32)
    top_k = generator.integers(1, 38, 64).astype(np.int32)
    top_p = generator.uniform(0.05, 0.99, 64).astype(np.float32)
    min_p = generator.choice([1e-9, 0.05, 0.3], 64).astype(np.float32)
    logits[::4] = np.rint(logits[::4])  # ties
    params = SamplingParams(temperature, top_k, top_p, min_p)
    filtered = np.asarray(filtered_logits(jnp.asarray(logits), params))
    for row in range(64):
        expected = slow_filter(logits[row], temperature[row], top_k[row], top_p[row], min_p[row])
        assert set(np.flatnonzero(np.isfinite(filtered[row])).tolist()) == expected
        ids = sorted(expected)
        np.testing.assert_allclose(filtered[row, ids], logits[row, ids] / temperature[row], rtol=1e-6)


DRAWN = [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8, "temperature": 1.5}, {"min_p": 0.3}]


@pytest.mark.parametrize("settings", DRAWN, ids=str)
def test_draws_follow_the_filtered_distribution(settings):
    draws = 20_000
    configs = [SamplingConfig(**settings, seed=3)] * draws
    params = sampling_params(configs, len(PROBABILITIES))
    logits_BV = jnp.tile(logits_of(PROBABILITIES), (draws, 1))
    ids, _ = jax.jit(sample)(logits_BV, params, row_keys(jnp.full(draws, 3, jnp.uint32)))
    expected = np.asarray(jax.nn.softmax(filtered_logits(logits_BV[:1], params_of_first(params))[0]))
    counts = np.bincount(np.asarray(ids), minlength=len(PROBABILITIES))
    assert (counts[expected == 0] == 0).all()
    chosen = expected > 0
    chi_square = ((counts[chosen] - draws * expected[chosen]) ** 2 / (draws * expected[chosen])).sum()
    assert chi_square < 18.5  # the 0.1 % point of chi-square with 4 degrees of freedom; the seed is fixed


def test_draws_follow_the_distribution_over_many_blocks_of_a_large_vocabulary():
    draws, vocab_size = 40_000, 700
    logits_V = np.random.default_rng(0).normal(size=vocab_size).astype(np.float32)
    logits_V[100:300] = -np.inf  # a whole block and more that nothing may be drawn from
    keys_B = row_keys(jnp.full(draws, 5, jnp.uint32))
    ids = np.asarray(jax.jit(draw)(jnp.broadcast_to(logits_V, (draws, vocab_size)), keys_B))
    expected = np.asarray(jax.nn.softmax(jnp.asarray(logits_V))) * draws
    counts = np.bincount(ids, minlength=vocab_size)
    assert (counts[expected == 0] == 0).all()
    chosen = expected > 0
    chi_square = ((counts[chosen] - expected[chosen]) ** 2 / expected[chosen]).sum()
    assert chi_square < 605  # the 0.1 % point of chi-square with 499 degrees of freedom


def params_of_first(params):
    return jax.tree.map(lambda leaf: leaf[:1], params)


def test_greedy_rows_take_the_maximum_beside_sampled_ones():
    logits_BV = jax.random.normal(jax.random.key(0), (8, 50))
    configs = [SamplingConfig(temperature=0.0 if row % 2 else 5.0) for row in range(8)]
    ids, _ = sample(logits_BV, sampling_params(configs, 50), row_keys(jnp.arange(8, dtype=jnp.uint32)))
    greedy = np.argmax(logits_BV, axis=-1)
    assert (np.asarray(ids)[1::2] == greedy[1::2]).all()
    assert (np.asarray(ids)[0::2] != greedy[0::2]).any()


def test_the_coldest_rows_take_the_maximum():
    logits_BV = 5 * jax.random.normal(jax.random.key(0), (4, 200))
    configs = [SamplingConfig(temperature=temperature) for temperature in (1e-7, 1e-20, 2e-38, 1e-44)]
    ids, logprobs = sample(logits_BV, sampling_params(configs, 200), row_keys(jnp.arange(4, dtype=jnp.uint32)))
    assert (np.asarray(ids) == np.argmax(logits_BV, axis=-1)).all() and np.isfinite(logprobs).all()


def test_what_is_drawn_is_in_the_vocabulary_even_of_a_model_that_gives_no_numbers():
    params = sampling_params([SamplingConfig()], 200)
    ids, _ = sample(jnp.full((1, 200), jnp.nan), params, row_keys(jnp.zeros(1, jnp.uint32)))
    assert 0 <= ids[0] < 200


def test_a_row_draws_the_same_whatever_else_is_in_the_batch():
    logits_BV = jax.random.normal(jax.random.key(1), (6, 200))
    keys = row_keys(jnp.full(6, 9, jnp.uint32))
    params = sampling_params([SamplingConfig(top_p=0.9)] * 6, 200)
    whole, _ = sample(logits_BV, params, keys)
    half, _ = sample(logits_BV[:3], jax.tree.map(lambda leaf: leaf[:3], params), keys[:3])
    assert (np.asarray(whole)[:3] == np.asarray(half)).all()
    assert len(set(np.asarray(whole).tolist())) > 1


def test_logprobs_are_the_models_own_not_the_filtered_ones():
    params = sampling_params([SamplingConfig(temperature=0.3, top_k=1)], len(PROBABILITIES))
    ids, logprobs = sample(logits_of(PROBABILITIES), params, row_keys(jnp.zeros(1, jnp.uint32)))
    assert ids.tolist() == [1]
    np.testing.assert_allclose(logprobs, [np.log(0.4)], rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"seed": 1.5},
    ],
)
def test_bad_settings_are_one_line_errors_that_name_the_setting(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError) as error:
        SamplingConfig(**settings)
    assert str(error.value).startswith(f"{name}={value!r} ") and "\n" not in str(error.value)
