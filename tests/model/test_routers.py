"""Every router against a loop over tokens, and every router with every dispatcher and real experts."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.check import CallerError
from gpt4moe.config.moe import MoeConfig
from gpt4moe.model import dispatch, routers
from gpt4moe.model import experts as experts_module
from gpt4moe.model.experts import Experts, apply_experts
from gpt4moe.model.layout import ONE_DEVICE
from gpt4moe.model.moe import Moe, RoutedTokens
from gpt4moe.model.router import RouterInputs, Routing, top_k
from tests.model import slow

TOKENS, NUM_EXPERTS, DIM = 7, 4, 3
KEY = jax.random.key(7)
TOKEN_IDS = jnp.array([3, 1, 3, 9, 1, 4, 0])
VALID = jnp.array([True] * 6 + [False])


def config_of(router, choices=2, **settings):
    groups = {"num_groups": 2, "groups_per_token": max(1, choices // 2)} if router in routers.READ_GROUPS else {}
    settings = {"normalize_gates": choices > 1, "gate_scale": 1.5, **groups, **settings}
    return MoeConfig(NUM_EXPERTS, choices, hidden_dim=2, router=None if router is top_k else router, **settings)


def inputs_of(**changes):
    return dataclasses.replace(RouterInputs(TOKEN_IDS, VALID, KEY), **changes)


def logits_at(seed=0, scale=2.0):
    return scale * jax.random.normal(jax.random.key(seed), (TOKENS, NUM_EXPERTS))


def as_matrix(routing):
    """[U, E]: the weight of every expert for every token."""
    one_hot_UKE = jax.nn.one_hot(routing.expert_ids_UK, NUM_EXPERTS) * routing.used_UK[..., None]
    return jnp.einsum("UK,UKE->UE", routing.gates_UK, one_hot_UKE)


def best(scores, count):
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:count]


def softmax_gates(logits_E, chosen, config):
    gates = jax.nn.softmax(logits_E)[jnp.array(chosen)]
    return (gates / gates.sum() if config.normalize_gates else gates) * config.gate_scale


def sigmoid_gates(logits_E, chosen, config):
    gates = jax.nn.sigmoid(logits_E)[jnp.array(chosen)]
    return (gates / gates.sum() if config.normalize_gates else gates) * config.gate_scale


def chosen_gates(logits_E, chosen, config):
    return jax.nn.softmax(logits_E[jnp.array(chosen)]) * config.gate_scale


def plain_softmax_gates(logits_E, chosen, config):
    return jax.nn.softmax(logits_E)[jnp.array(chosen)] * config.gate_scale


def equal_gates(logits_E, chosen, config):
    return jnp.full(len(chosen), config.gate_scale / len(chosen)) + 0 * logits_E[0]


def sinkhorn_scores(logits):
    """Rows and columns of exp(logits) normalised by turns, padding apart."""
    matrix = np.exp(logits[np.asarray(VALID)])
    for _ in range(200):
        matrix = matrix / matrix.sum(1, keepdims=True)
        matrix = matrix / matrix.sum(0, keepdims=True)
    return np.concatenate([matrix, np.zeros((1, NUM_EXPERTS))])


def group_scores(scores_E, config, best_of_group):
    size = NUM_EXPERTS // config.num_groups
    groups = [sorted(scores_E[g * size : (g + 1) * size])[::-1] for g in range(config.num_groups)]
    kept = best([sum(group[:best_of_group]) for group in groups], config.groups_per_token)
    return [score if e // size in kept else -np.inf for e, score in enumerate(scores_E)]


def noise():
    return np.asarray(jax.random.normal(KEY, (TOKENS, NUM_EXPERTS))) / NUM_EXPERTS


# For each router: the scores that its choice is by, and how the chosen are weighted.
REFERENCES = {
    "top_k": (lambda x, c: x, softmax_gates),
    "softmax_of_chosen": (lambda x, c: x, chosen_gates),
    "noisy_top_k": (lambda x, c: x + noise(), None),
    "sigmoid_top_k": (lambda x, c: x, sigmoid_gates),
    "group_limited": (lambda x, c: np.array([group_scores(row, c, 1) for row in np.exp(x)]), softmax_gates),
    "sigmoid_group_limited": (
        lambda x, c: np.array([group_scores(row, c, 2) for row in 1 / (1 + np.exp(-x))]),
        sigmoid_gates,
    ),
    "sinkhorn": (lambda x, c: sinkhorn_scores(x), softmax_gates),
}
BY_SCORES = [pytest.param(getattr(routers, name), *REFERENCES[name], id=name) for name in REFERENCES]


@pytest.mark.parametrize("choices", [1, 2, 4])
@pytest.mark.parametrize(("router", "scores", "gates"), BY_SCORES)
def test_choices_gates_and_gradients_equal_a_loop(router, scores, gates, choices):
    config = (
        config_of(router, choices) if router is not routers.softmax_of_chosen else config_of(router, max(choices, 2))
    )
    if router in routers.READ_GROUPS and choices == 4:
        config = dataclasses.replace(config, groups_per_token=2)
    if router is routers.sinkhorn and choices == 1:
        gates = sigmoid_gates
    logits = logits_at()
    weights_UE = jax.random.normal(jax.random.key(5), logits.shape)
    ranked = np.asarray(scores(np.asarray(logits, np.float64), config))
    chosen = [best(row, config.experts_per_token) for row in ranked]
    added = jnp.asarray(noise()) if router is routers.noisy_top_k else 0.0

    def reference(logits):
        rows = logits + added
        total = jnp.zeros(logits.shape)
        for u in np.flatnonzero(VALID):
            total = total.at[u, jnp.array(chosen[u])].add((gates or softmax_gates)(rows[u], chosen[u], config))
        return total

    routing = router(logits, inputs_of(), config)
    assert [sorted(row) for row in np.asarray(routing.expert_ids_UK)[:-1].tolist()] == [sorted(c) for c in chosen[:-1]]
    assert slow.relative_difference(as_matrix(routing), reference(logits)) < 1e-5
    got = jax.grad(lambda x: jnp.sum(as_matrix(router(x, inputs_of(), config)) * weights_UE))(logits)
    want = jax.grad(lambda x: jnp.sum(reference(x) * weights_UE))(logits)
    assert slow.relative_difference(got, want) < 1e-5


@pytest.mark.parametrize("router", routers.ROUTERS, ids=lambda router: router.__name__)
def test_losses_and_loads_are_those_of_the_choices(router):
    routing = router(logits_at(), inputs_of(), config_of(router))
    used, ids = np.asarray(routing.used_UK), np.asarray(routing.expert_ids_UK)
    np.testing.assert_array_equal(routing.stats.load_E, np.bincount(ids[used], minlength=NUM_EXPERTS))
    assert not used[-1].any() and not np.asarray(routing.gates_UK)[-1].any()
    sigmoid = router in (routers.sigmoid_top_k, routers.sigmoid_group_limited)
    scores = np.asarray(jax.nn.sigmoid(logits_at()) if sigmoid else jax.nn.softmax(logits_at()))[:-1]
    mean_E = (scores / scores.sum(1, keepdims=True)).mean(0)
    fraction_E = np.asarray(routing.stats.load_E) / used.sum()
    np.testing.assert_allclose(routing.losses.load_balance, NUM_EXPERTS * (fraction_E * mean_E).sum(), rtol=1e-5)
    np.testing.assert_allclose(routing.losses.probability_E, 6 * mean_E, rtol=1e-5)


@pytest.mark.parametrize("router", routers.ROUTERS, ids=lambda router: router.__name__)
def test_a_group_of_padding_routes_nothing_and_has_finite_gradients(router):
    def total(logits):
        routing = router(logits, inputs_of(valid_U=jnp.zeros(TOKENS, bool)), config_of(router))
        return jnp.sum(routing.gates_UK) + routing.losses.load_balance + routing.losses.router_z

    value, gradient = jax.value_and_grad(total)(logits_at())
    assert value == 0 and (np.asarray(gradient) == 0).all()


@pytest.mark.parametrize("router", routers.ROUTERS, ids=lambda router: router.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_a_replay_repeats_choices_and_keeps_the_routers_own_gates(router, training):
    config = config_of(router)
    first = router(logits_at(), inputs_of(training=training), config)
    recorded = jnp.where(first.used_UK, first.expert_ids_UK, -1)
    again = router(logits_at(), inputs_of(replay_ids_UK=recorded, training=training), config)
    np.testing.assert_array_equal(jnp.where(again.used_UK, again.expert_ids_UK, -1), recorded)
    np.testing.assert_allclose(as_matrix(again), as_matrix(first), rtol=1e-6)
    forced = jnp.full_like(recorded, -1).at[:, 0].set(2)
    other = router(logits_at(), inputs_of(replay_ids_UK=forced, training=training), config)
    np.testing.assert_array_equal(other.stats.load_E, [0, 0, 6, 0])


@pytest.mark.parametrize("router", routers.ROUTERS, ids=lambda router: router.__name__)
def test_a_replay_with_gaps_weighs_what_is_there_as_if_it_were_all(router):
    """Records of expert choice have a place for every expert, most of them empty, and may be forced on any router."""
    config, replay = config_of(router), jnp.full((TOKENS, NUM_EXPERTS), -1)
    gaps = replay.at[:, 2].set(3).at[:, 1].set(1)
    dense = jnp.stack([gaps[:, 1], gaps[:, 2]], axis=1)
    got, want = (router(logits_at(), inputs_of(replay_ids_UK=ids), config) for ids in (gaps, dense))
    np.testing.assert_allclose(as_matrix(got), as_matrix(want), rtol=1e-6)
    np.testing.assert_array_equal(got.stats.load_E, [0, 6, 0, 6])
    slope = jax.grad(lambda x: jnp.sum(as_matrix(router(x, inputs_of(replay_ids_UK=replay), config))))(logits_at())
    np.testing.assert_array_equal(slope, 0.0)  # nothing chosen: no gate, and no NaN


PERMUTABLE = [router for router in routers.ROUTERS if router not in (routers.balanced, routers.uniform)]


@pytest.mark.parametrize("router", PERMUTABLE, ids=lambda router: router.__name__)
def test_permuted_tokens_are_routed_alike(router):
    order = jax.random.permutation(jax.random.key(3), TOKENS)
    plain = inputs_of(key=None)  # noise belongs to places
    turned = dataclasses.replace(plain, token_ids_U=TOKEN_IDS[order], valid_U=VALID[order])
    config = config_of(router)
    got = as_matrix(router(logits_at()[order], turned, config))
    np.testing.assert_allclose(got, as_matrix(router(logits_at(), plain, config))[order], rtol=1e-5, atol=1e-7)


def test_a_bias_moves_the_selection_and_not_the_gates():
    for router in routers.READ_BIAS:
        config, bias_E = config_of(router), jnp.array([0.0, 0.0, 0.0, 50.0])
        plain, moved = (router(logits_at(), inputs_of(bias_E=b), config) for b in (None, bias_E))
        assert (np.asarray(moved.expert_ids_UK)[:-1] == 3).any(axis=1).all(), router.__name__
        given = inputs_of(replay_ids_UK=moved.expert_ids_UK)
        np.testing.assert_allclose(as_matrix(moved), as_matrix(router(logits_at(), given, config)), rtol=1e-6)
        assert int(plain.stats.load_E[3]) < 6
        gradient_E = jax.grad(lambda b, r=router, c=config: r(logits_at(), inputs_of(bias_E=b), c).gates_UK.sum())(
            bias_E
        )
        np.testing.assert_array_equal(gradient_E, 0.0)


def test_story_of_three_groups():
    """Experts 0 1 | 2 3 | 4 5, two groups a token: the best expert lies in the last, the best pair in the first."""
    logits = jnp.log(jnp.array([[0.20, 0.19, 0.11, 0.10, 0.36, 0.04], [0.1, 0.1, 0.3, 0.3, 0.1, 0.1]]))
    config = MoeConfig(6, 3, hidden_dim=1, num_groups=3, groups_per_token=2)
    valid = RouterInputs(jnp.zeros(2, jnp.int32), jnp.ones(2, bool))
    by_best = routers.group_limited(logits, valid, config)  # groups 2 and 0
    assert by_best.expert_ids_UK.tolist() == [[4, 0, 1], [2, 3, 0]]
    one_group = dataclasses.replace(config, groups_per_token=1, experts_per_token=2)
    by_pair = routers.sigmoid_group_limited(logits, valid, one_group)  # sigmoids 0.17 + 0.16, not 0.26 + 0.04
    assert by_pair.expert_ids_UK.tolist() == [[0, 1], [2, 3]]
    assert routers.group_limited(logits, valid, one_group).expert_ids_UK.tolist() == [[4, 5], [2, 3]]


def test_noise_is_for_training_and_of_the_row():
    config = config_of(routers.noisy_top_k)
    quiet = top_k(logits_at(), inputs_of(), config_of(top_k))
    for still in (inputs_of(training=False), inputs_of(key=None)):
        np.testing.assert_array_equal(routers.noisy_top_k(logits_at(), still, config).gates_UK, quiet.gates_UK)
    one, other = (routers.noisy_top_k(logits_at(), inputs_of(key=jax.random.key(k)), config) for k in (1, 2))
    assert np.abs(one.gates_UK - other.gates_UK).max() > 1e-3


def test_story_of_expert_choice():
    """Six tokens, four experts, two choices a token: every expert picks its best three."""
    likes = [[9, 1, 1, 1], [8, 1, 1, 1], [1, 9, 1, 1], [7, 1, 2, 1], [1, 8, 1, 3], [1, 1, 1, 9], [9, 9, 9, 9]]
    logits = jnp.log(jnp.array(likes, jnp.float32))
    routing = routers.expert_choice(logits, inputs_of(), config_of(routers.expert_choice, gate_scale=1.0))
    picked = np.asarray(routing.used_UK & (routing.gates_UK > 0))
    assert picked.sum(0).tolist() == [3, 3, 3, 3]
    assert np.flatnonzero(picked[:, 0]).tolist() == [0, 1, 3]
    assert {2, 4} <= set(np.flatnonzero(picked[:, 1])) and 5 in np.flatnonzero(picked[:, 3])


@pytest.mark.parametrize("factor, places", [(None, 3), (2.0, 6), (0.5, 2)])
def test_experts_choose_as_many_tokens_as_their_capacity(factor, places):
    routing = routers.expert_choice(logits_at(), inputs_of(), config_of(routers.expert_choice, capacity_factor=factor))
    np.testing.assert_array_equal(routing.stats.load_E, places)


@pytest.mark.parametrize("tokens", [20, 40])
def test_experts_choose_as_many_tokens_as_dispatch_has_room_for_to_the_last_place(tokens):
    """A factor that binary fractions overshoot, with and without padding."""
    config = config_of(routers.expert_choice, capacity_factor=1.1)
    valid = jnp.arange(40) < tokens
    logits = jax.random.normal(jax.random.key(0), (40, NUM_EXPERTS))
    routing = routers.expert_choice(logits, RouterInputs(jnp.arange(40), valid, KEY), config)
    assert routing.stats.load_E.tolist() == [config.expert_capacity(tokens)] * NUM_EXPERTS
    assert config.expert_capacity(tokens) == tokens * 11 // 20


@pytest.mark.parametrize("router", [top_k, routers.sigmoid_top_k], ids=lambda router: router.__name__)
@pytest.mark.parametrize("gap", [60.0, 300.0])
def test_gates_of_experts_far_behind_have_the_gradient_of_their_ratio(router, gap):
    """A replay chooses experts whose scores vanish in float32: the gates are still a softmax of their logits."""
    logits = jnp.array([[0.0, 0.0, -gap, -gap - 0.5]]) - (gap if router is routers.sigmoid_top_k else 0.0)
    inputs = RouterInputs(jnp.zeros(1, jnp.int32), jnp.ones(1, bool), replay_ids_UK=jnp.array([[3, 2]]))
    config = config_of(router, gate_scale=1.0)
    gates, back = jax.vjp(lambda logits: router(logits, inputs, config).gates_UK, logits)
    share = 1 / (1 + np.exp(0.5))
    np.testing.assert_allclose(gates, [[share, 1 - share]], rtol=1e-4)
    slope = share * (1 - share)
    np.testing.assert_allclose(back(jnp.array([[1.0, 0.0]]))[0], [[0, 0, -slope, slope]], atol=1e-5)


def early_output(router, last_token):
    """What a layer gives the first token of a row, by the row's last one."""
    config = config_of(router, gate_scale=1.0)
    layer = slow.one_layer(Moe((0,), DIM, config, ONE_DEVICE, 1.0, nnx.Rngs(0)))
    layer.router[...] = 40 * layer.router[...]
    x_BTD = jax.random.normal(jax.random.key(4), (1, TOKENS, DIM)).at[0, -1].set(last_token)
    tokens = RoutedTokens(TOKEN_IDS[None], jnp.ones((1, TOKENS), bool))
    return [layer(x_BTD, tokens, dropless=evaluating)[0][0, :-1] for evaluating in (False, True)]


@pytest.mark.parametrize("router", routers.ROUTERS, ids=lambda router: router.__name__)
def test_which_routers_break_causality(router):
    """LOUD: under `expert_choice` and `sinkhorn` a token's output in training depends on LATER tokens of its row."""
    outputs = [early_output(router, last) for last in (jnp.ones(DIM), -jnp.ones(DIM), jnp.array([3.0, -3.0, 0.0]))]
    training, evaluating = zip(*outputs, strict=True)
    differs = any(slow.relative_difference(other, training[0]) > 1e-3 for other in training[1:])
    assert differs == (router in routers.NON_CAUSAL)
    assert all(slow.relative_difference(other, evaluating[0]) < 1e-6 for other in evaluating[1:])


def test_sinkhorn_evens_out_what_top_k_would_send_to_one():
    leaning = logits_at(scale=1.0) + jnp.array([3.0, 0, 0, 0])
    config = config_of(routers.sinkhorn, 1)
    balanced = routers.sinkhorn(leaning, inputs_of(), config).stats.load_E
    assert int(top_k(leaning, inputs_of(), config_of(top_k, 1)).stats.load_E.max()) >= 5
    assert int(balanced.max()) <= 3
    plain = routers.sinkhorn(leaning, inputs_of(training=False), config)
    np.testing.assert_array_equal(plain.expert_ids_UK[:, 0], jnp.argmax(leaning, axis=-1))


def test_sinkhorn_has_sweeps_enough_and_counts_no_padding():
    """Steep logits that lean to one expert take more than a few sweeps; padding that leans away changes nothing."""
    valid = jnp.arange(64) < 48
    logits = 2 * jax.random.normal(jax.random.key(1), (64, NUM_EXPERTS)) + jnp.array([8.0, 4.0, 0.0, 0.0])
    logits = jnp.where(valid[:, None], logits, jnp.array([-40.0, 40.0, 0.0, 0.0]))
    matrix = np.exp(np.asarray(logits, np.float64)[:48])
    for _ in range(200):
        matrix = matrix / matrix.sum(1, keepdims=True)
        matrix = matrix / matrix.sum(0, keepdims=True)
    matrix = matrix / matrix.sum(1, keepdims=True)
    routing = routers.sinkhorn(logits, RouterInputs(jnp.arange(64), valid, KEY), config_of(routers.sinkhorn, 1))
    np.testing.assert_array_equal(routing.expert_ids_UK[:48, 0], matrix.argmax(1))
    assert int(routing.stats.load_E.sum()) == 48


def test_a_hash_sends_a_token_to_the_same_experts_wherever_it_stands():
    routing = routers.hashed(logits_at(), inputs_of(), config_of(routers.hashed))
    ids = np.asarray(routing.expert_ids_UK)
    assert (ids[0] == ids[2]).all() and (ids[1] == ids[4]).all()
    assert all(len(set(row)) == 2 for row in ids.tolist())
    many = RouterInputs(jnp.arange(4000), jnp.ones(4000, bool))
    load = routers.hashed(jnp.zeros((4000, NUM_EXPERTS)), many, config_of(routers.hashed)).stats.load_E
    assert (np.abs(np.asarray(load) / 2000 - 1) < 0.1).all()


def test_forced_balance_takes_turns_over_real_tokens():
    valid = jnp.array([True, False, True, True, False, True, True])
    routing = routers.balanced(logits_at(), inputs_of(valid_U=valid), config_of(routers.balanced))
    ids = np.asarray(routing.expert_ids_UK)[np.asarray(valid)]
    assert [sorted(row) for row in ids.tolist()] == [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]


def test_random_choices_are_different_experts_and_change_with_the_key():
    one, other = (routers.uniform(logits_at(), inputs_of(key=k), config_of(routers.uniform)) for k in (KEY, None))
    assert all(len(set(row)) == 2 for row in np.asarray(one.expert_ids_UK).tolist())
    assert (np.asarray(one.expert_ids_UK) != np.asarray(other.expert_ids_UK)).any()


@pytest.mark.parametrize(
    ("router", "settings", "message"),
    [
        (routers.hashed, {"bias_rate": 0.1}, "bias_rate=0.1 is not read by the router hashed; leave it at 0.0 or set"),
        (
            routers.sigmoid_top_k,
            {"router_noise": 2.0},
            "router_noise=2.0 is not read by the router sigmoid_top_k; leave",
        ),
        (routers.hashed, {"normalize_gates": False}, "normalize_gates=False is not read by the router hashed; leave"),
        (
            None,
            {"router_noise": 0.0},
            "router_noise=0.0 is not read by the router top_k; leave it at 1.0 or set ROUTER",
        ),
        (
            routers.sigmoid_top_k,
            {"experts_per_token": 1},
            "normalize_gates=True gives the router sigmoid_top_k no grad",
        ),
        (routers.sigmoid_top_k, {"num_groups": 2, "groups_per_token": 2}, "num_groups=2 is not read by the router"),
        (routers.softmax_of_chosen, {"experts_per_token": 1, "normalize_gates": False}, "no gradient"),
    ],
)
def test_settings_that_a_router_would_ignore_are_refused(router, settings, message):
    config = MoeConfig(**{"num_experts": 4, "experts_per_token": 2, "hidden_dim": 2, "router": router, **settings})
    with pytest.raises(CallerError, match=message):
        Moe((0,), DIM, config, ONE_DEVICE, 1.0, nnx.Rngs(0))


LEARNING = [
    (router, choices, normalized)
    for router in routers.ROUTERS
    for choices in (1, 2, 4)
    for normalized in (True, False)
    if not (choices == 1 and (normalized or router is routers.softmax_of_chosen))
    if not (choices > 1 and not normalized and router in routers.FIXED_GATES)
]


@functools.lru_cache
def router_gradient(router, choices, normalized):
    groups = {"num_groups": 2, "groups_per_token": 2} if router in routers.READ_GROUPS else {}
    settings = {"normalize_gates": normalized, "capacity_factor": 100.0, **groups}
    config = MoeConfig(NUM_EXPERTS, choices, hidden_dim=4, router=router, **settings)
    layer = slow.one_layer(Moe((0,), DIM, config, ONE_DEVICE, 1.0, nnx.Rngs(0)))
    x_BTD = jax.random.normal(jax.random.key(1), (2, TOKENS, DIM))
    ids_BT, valid_BT = jnp.broadcast_to(TOKEN_IDS, (2, TOKENS)), jnp.ones((2, TOKENS), bool)
    tokens = RoutedTokens(ids_BT, valid_BT, jax.random.split(KEY, 2))
    return nnx.grad(lambda layer: jnp.sum(jnp.square(layer(x_BTD, tokens, dropless=False)[0])))(layer)["router"][...]


@pytest.mark.parametrize(("router", "choices", "normalized"), LEARNING, ids=lambda v: getattr(v, "__name__", str(v)))
def test_the_router_learns_from_the_output_alone_where_it_should(router, choices, normalized):
    gradient_DE = np.asarray(router_gradient(router, choices, normalized))
    learns = np.abs(gradient_DE).max() > 1e-6
    assert learns == (router is not routers.hashed)


def route_of(router, choices, logits, config):
    return jax.vmap(lambda row: router(row, inputs_of(), config))(logits)


# What is routed: a router's own choices at K of 1, 2 and E, all to one expert, two experts without tokens.
SITUATIONS = {
    **{router.__name__: (router, 2, 0.0) for router in routers.ROUTERS},
    "one choice": (top_k, 1, 0.0),
    "every expert": (top_k, NUM_EXPERTS, 0.0),
    "all to one": (top_k, 1, jnp.array([0.0, 50.0, 0.0, 0.0])),
    "two without tokens": (top_k, 2, jnp.array([0.0, 0.0, -50.0, -50.0])),
}
ROOM = 3
CAPACITY = MoeConfig(NUM_EXPERTS, 2, hidden_dim=2, capacity_factor=ROOM * NUM_EXPERTS / (2 * TOKENS))


@functools.cache
def experts():
    graph, weights = nnx.split(slow.one_layer(Experts((0,), DIM, CAPACITY, 1.0, nnx.Rngs(0))))
    return nnx.merge(graph, weights)()


@functools.partial(jax.jit, static_argnames=("config", "drops"))
def through_experts(x_GUD, gates_GUK, weights, dy_GUD, ids_GUK, used_GUK, config, drops):
    """Values and all gradients of dispatch, experts and combine; the routing is data, so that routers share this."""

    def total(x_GUD, gates_GUK, weights):
        routing = Routing(ids_GUK, gates_GUK, used_GUK, None, None)
        y_GUD, dropped = apply_experts(weights, x_GUD, routing, config, drops)
        return jnp.sum(y_GUD * dy_GUD), (y_GUD, dropped)

    return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(x_GUD, gates_GUK, weights)


@functools.cache
def situation_of(name):
    """(x, weights of the sum that is differentiated, routing) of two rows."""
    router, choices, preference_E = SITUATIONS[name]
    x_GUD, dy_GUD = (jax.random.normal(jax.random.key(k), (2, TOKENS, DIM)) for k in (1, 2))
    logits = jnp.stack([logits_at(1), logits_at(2)]) + preference_E
    return x_GUD, dy_GUD, route_of(router, choices, logits, config_of(router, choices))


@functools.cache
def by_a_loop(name, room):
    """((sum, y), gradients) token by token."""
    x_GUD, dy_GUD, routing = situation_of(name)
    ids, used = np.asarray(routing.expert_ids_UK), np.asarray(routing.used_UK)

    def reference(x_GUD, gates_GUK, weights):
        matrices = (weights.gate_EDF, weights.up_EDF, weights.down_EFD)
        y_GUD = slow.mixture(x_GUD, gates_GUK, matrices, ids, used, room)
        return jnp.sum(y_GUD * dy_GUD), y_GUD

    return jax.value_and_grad(reference, (0, 1, 2), has_aux=True)(x_GUD, routing.gates_UK, experts())


@pytest.mark.parametrize("drops", [False, True], ids=["dropless", "capacity"])
@pytest.mark.parametrize("product", [None, "loop", "plain"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_router_with_every_dispatcher_and_product_equals_a_loop(situation, product, drops, monkeypatch):
    """`product` None takes experts in turn here; kernels for accelerators are in test_grouped_matmul.py."""
    monkeypatch.setattr(experts_module, "FEWEST_IN_TURN", 0)
    x_GUD, dy_GUD, routing = situation_of(situation)
    room = CAPACITY.expert_capacity(TOKENS) if drops else None
    assert room in (ROOM, None)
    (_, want), want_gradients = by_a_loop(situation, room)
    config = dataclasses.replace(CAPACITY, grouped_product=product)
    choices = (routing.expert_ids_UK, routing.used_UK)
    (_, (got, dropped)), gradients = through_experts(
        x_GUD, routing.gates_UK, experts(), dy_GUD, *choices, config, drops
    )
    used = np.asarray(routing.used_UK)
    kept = sum(slow.kept_choices(i, u, room).sum() for i, u in zip(np.asarray(choices[0]), used, strict=True))
    assert int(dropped) == used.sum() - kept
    assert slow.relative_difference(got, want) < 1e-5
    assert slow.relative_difference(gradients, want_gradients) < 1e-5


def test_identity_experts_give_back_the_sum_of_gates():
    for factor in (None, 100.0):
        config = dataclasses.replace(config_of(routers.sigmoid_top_k), capacity_factor=factor)
        routing = route_of(routers.sigmoid_top_k, 2, logits_at()[None], config)
        x_GUD = jax.random.normal(jax.random.key(1), (1, TOKENS, DIM))
        dispatched = (dispatch.capacity if factor else dispatch.dropless)(x_GUD, routing, config)
        y_GUD = dispatch.combine(dispatched.rows_XCD, dispatched.plan, 1)
        np.testing.assert_allclose(y_GUD, x_GUD * routing.gates_UK.sum(-1, keepdims=True), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("priority", ["position", "gate"])
def test_who_is_dropped_where_room_is_short(priority):
    """A loop over the queue: at each k, tokens in order of place or of their largest gate."""
    config = dataclasses.replace(CAPACITY, drop_priority=priority, capacity_factor=0.5, normalize_gates=False)
    routing = route_of(top_k, 2, logits_at(3)[None], config)
    dispatched = dispatch.capacity(jnp.ones((1, TOKENS, DIM)), routing, config)
    ids, used, gates = (np.asarray(leaf)[0] for leaf in (routing.expert_ids_UK, routing.used_UK, routing.gates_UK))
    queue = sorted(range(TOKENS), key=(lambda u: -gates[u].max()) if priority == "gate" else lambda u: u)
    kept = np.zeros(ids.shape, bool)
    kept[queue] = slow.kept_choices(ids[queue], used[queue], config.expert_capacity(TOKENS))
    places = np.asarray(dispatched.plan.slot_of_choice_PUK)[0]
    np.testing.assert_array_equal(places < dispatched.rows_XCD.shape[0] * dispatched.rows_XCD.shape[1], kept)
    assert len(set(places[kept])) == kept.sum() < used.sum()


def test_routers_are_recognised_however_they_are_wrapped():
    @functools.wraps(routers.sinkhorn)
    def wrapped(*given):
        return routers.sinkhorn(*given)

    assert routers.is_among(wrapped, routers.NON_CAUSAL)
    assert all("et al. 20" in inspect.getdoc(r) or "DeepSeek" in inspect.getdoc(r) for r in routers.ROUTERS[:-2])
