"""Speculation changes no distribution: tokens are drawn as if nothing had been proposed, greedy ones are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.sampling import draw, filtered_logits, row_keys, sampling_params
from gpt4moe.infer.speculative import PROPOSES, Lookup, judge

VOCAB, PLACES, ROWS = 5, 3, 20_000
MODEL = np.random.default_rng(0).normal(size=(PLACES, VOCAB)).astype(np.float32) * 1.5
PROPOSER = np.random.default_rng(1).normal(size=(PLACES, VOCAB)).astype(np.float32)
SETTINGS = [{}, {"temperature": 0.7, "top_k": 4}, {"top_p": 0.8}]


def chi_square(ids, probabilities):
    counts = np.bincount(ids, minlength=VOCAB)
    assert (counts[probabilities == 0] == 0).all()
    expected = len(ids) * probabilities[probabilities > 0]
    return ((counts[probabilities > 0] - expected) ** 2 / expected).sum()


def keys_of_places(rows):
    keys_B = row_keys(jnp.full(rows, 11, jnp.uint32))
    return jax.vmap(lambda key: jax.vmap(lambda t: jax.random.fold_in(key, t))(jnp.arange(PLACES)))(keys_B)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["model", "lookup"])
def test_every_token_is_drawn_from_the_models_own_distribution(settings, kind):
    """Places do not depend on the tokens before, so that the tokens of each place have one known distribution."""
    params = sampling_params([SamplingConfig(**settings)] * ROWS, VOCAB)
    of_place = jax.tree.map(lambda leaf: leaf[:PLACES], params)
    keys_BT = keys_of_places(ROWS)

    @jax.jit
    def run():
        logits_BTV = jnp.broadcast_to(MODEL, (ROWS, PLACES, VOCAB))
        if kind == "lookup":
            proposer_BTV, proposed_BT = None, jnp.broadcast_to(jnp.array([2, 2, 0]), (ROWS, PLACES))
        else:
            kept_TV = filtered_logits(jnp.asarray(PROPOSER), of_place)
            proposer_BTV = jnp.broadcast_to(kept_TV, logits_BTV.shape)
            proposing = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, PROPOSES)))(keys_BT)
            proposed_BT = jax.vmap(draw, (1, 1), 1)(proposer_BTV, proposing).astype(jnp.int32)
        num_B = jnp.arange(ROWS, dtype=jnp.int32) % PLACES  # rows with 0, 1 and 2 proposals
        return judge(logits_BTV, proposed_BT, num_B, params, keys_BT, proposer_BTV)

    ids_BT, num_B = (np.asarray(leaf) for leaf in run())
    probabilities_TV = np.asarray(jax.nn.softmax(filtered_logits(jnp.asarray(MODEL), of_place)))
    assert (num_B <= np.arange(ROWS) % PLACES + 1).all() and set(num_B) == {1, 2, 3}
    for num_proposed in range(PLACES):
        rows = np.arange(ROWS) % PLACES == num_proposed
        # That the row has a token in a later place says something about the ones before, not about its own.
        for place in range(num_proposed + 1):
            there = rows & (num_B > place)
            limit = 18.5  # the 0.1 % point of chi-square with 4 degrees of freedom; the seed is fixed
            assert chi_square(ids_BT[there, place], probabilities_TV[place]) < limit


def test_acceptance_is_as_likely_as_the_distributions_overlap():
    params = sampling_params([SamplingConfig()] * ROWS, VOCAB)
    logits_BTV, proposer_BTV = (jnp.broadcast_to(each, (ROWS, PLACES, VOCAB)) for each in (MODEL, PROPOSER))
    keys_BT = keys_of_places(ROWS)
    proposing = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, PROPOSES)))(keys_BT)
    proposed_BT = jax.vmap(draw, (1, 1), 1)(proposer_BTV, proposing).astype(jnp.int32)
    _, num_B = judge(logits_BTV, proposed_BT, jnp.full(ROWS, 1), params, keys_BT, proposer_BTV)
    p_V, q_V = (np.asarray(jax.nn.softmax(each[0])) for each in (MODEL, PROPOSER))
    overlap = np.minimum(p_V, q_V).sum()
    assert abs((np.asarray(num_B) == 2).mean() - overlap) < 4 * np.sqrt(0.25 / ROWS)


def test_greedy_rows_take_proposals_as_far_as_they_are_the_likeliest():
    best = MODEL.argmax(-1)
    proposed = np.array([best, [best[0], 9 % VOCAB, 0], [(best[0] + 1) % VOCAB, best[1], 0], best], np.int32)
    proposed[1, 1] = (best[1] + 1) % VOCAB
    params = sampling_params([SamplingConfig(temperature=0.0)] * 4, VOCAB)
    logits_BTV = jnp.broadcast_to(MODEL, (4, PLACES, VOCAB))
    ids_BT, num_B = judge(logits_BTV, jnp.asarray(proposed), np.array([2, 2, 2, 1]), params, keys_of_places(4))
    assert num_B.tolist() == [3, 2, 1, 2]
    for row, num in enumerate(num_B.tolist()):
        assert ids_BT[row, :num].tolist() == best[:num].tolist()


def test_lookup_proposes_what_followed_the_same_tokens_before():
    lookup, text = Lookup(), [1, 2, 3, 4, 5, 1, 2, 3]
    assert lookup.propose(text, 3) == [4, 5, 1]
    assert lookup.propose([*text, 4], 9) == [5, 1, 2, 3, 4, 5, 1, 2, 3]
    assert lookup.propose([*text, 4, 9], 3) == []
    assert lookup.propose([*text, 4, 9, 3, 4], 2) == [9, 3]  # the latest time they stood together
    assert Lookup().propose([7], 3) == [] and Lookup().propose([7, 7, 7, 7], 2) == [7, 7]
