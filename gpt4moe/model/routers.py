"""Routers of the literature, each a function `(logits_UE, inputs, config) -> Routing` behind `gpt4moe.model.router`.

Set `MoeConfig.router` to one of them; `top_k` there, with K = 1 and without `normalize_gates` the Switch router, is the
default. All repeat `inputs.replay_ids_UK` where given, and route padding nowhere. `check` refuses settings that a
router would silently ignore. Which of them see later tokens of a row stands in `NON_CAUSAL`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from gpt4moe.config.check import require
from gpt4moe.config.moe import MoeConfig
from gpt4moe.model.router import TINY, RouterInputs, Routing, assemble, choose, gates_of, is_choice, top_k
from gpt4moe.types import Array

# Sweeps over a row: shares of experts are then equal within 1e-5 for logits of a deviation of 3, some per cent for 10.
SINKHORN_SWEEPS = 20
# Group scores: the best expert of a group in DeepSeek-V2, the best two in DeepSeek-V3.
BEST_OF_GROUP_V2, BEST_OF_GROUP_V3 = 1, 2


def softmax_of_chosen(logits_UE: Float[Array, "U E"], inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Routes each token to its K largest logits, weighted by the softmax over those K alone.

    KeepTopK of Shazeer et al. 2017 (eq. 3 to 5, without noise), section 2.1 of Mixtral (Jiang et al. 2024). The gates
    are those of `top_k` with `normalize_gates`, which it does not read; a bias is added to logits. Exact and causal
    under any batch, row and layout. With K = 1 the gate is always 1 and the router would learn nothing: refused.
    """
    expert_ids_UK = choose(logits_UE, inputs, config)
    chosen_UK = jnp.take_along_axis(logits_UE, expert_ids_UK, axis=-1)
    gates_UK = jax.nn.softmax(chosen_UK, axis=-1, where=is_choice(expert_ids_UK, inputs)) * config.gate_scale
    return assemble(logits_UE, expert_ids_UK, gates_UK, inputs)


def softmax_of_one(logits_UE: Float[Array, "U E"], inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Routes each token to its largest logit with gate 1, which `softmax_of_chosen` gives with K = 1.

    For weights trained so elsewhere (a Mixtral of one expert a token): of a loss nothing but the balance terms reaches
    this router, for which reason it is not among `ROUTERS`.
    """
    return softmax_of_chosen(logits_UE, inputs, config)


def noisy_top_k(logits_UE: Float[Array, "U E"], inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Routes like `top_k` by logits with normal noise of deviation `router_noise` / E, in training only.

    V-MoE (Riquelme et al. 2021, section 2.1). Choices and gates are of the noisy logits; losses and statistics take
    their probabilities from the clean ones and their loads from the noisy choices. Causal; the noise belongs to the
    row (`inputs.key`), so that it does not depend on the layout. Without a key there is none.
    """
    noisy_UE = logits_UE
    if inputs.training and inputs.key is not None:
        deviation = config.router_noise / logits_UE.shape[-1]
        noisy_UE = logits_UE + deviation * jax.random.normal(inputs.key, logits_UE.shape, logits_UE.dtype)
    log_probabilities_UE = jax.nn.log_softmax(noisy_UE, axis=-1)
    expert_ids_UK = choose(jnp.exp(log_probabilities_UE), inputs, config)
    return assemble(logits_UE, expert_ids_UK, gates_of(log_probabilities_UE, expert_ids_UK, inputs, config), inputs)


def sigmoid_top_k(logits_UE: Float[Array, "U E"], inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Routes each token to its K largest sigmoid scores, a bias on the selection only (DeepSeek-V3 2024, eq. 13 to 16).

    Gates are the scores, over their sum where `normalize_gates`, times `gate_scale`. The distribution of the losses is
    all scores over their sum (eq. 17 to 20). Exact and causal under any batch, row and layout.
    """
    scores_UE = jax.nn.sigmoid(logits_UE)
    return _by_sigmoid(logits_UE, scores_UE, choose(scores_UE, inputs, config), inputs, config)


def group_limited(logits_UE: Float[Array, "U E"], inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Routes like `top_k` among the experts of each token's best `groups_per_token` of `num_groups` groups.

    Device-limited routing of DeepSeek-V2 (2024, section 2.2.2): a group scores as its best expert. Groups are
    consecutive experts, as expert parallelism lays them out. Exact and causal.
    """
    log_probabilities_UE = jax.nn.log_softmax(logits_UE, axis=-1)
    reachable_UE = _of_best_groups(jnp.exp(log_probabilities_UE), inputs, config, BEST_OF_GROUP_V2)
    expert_ids_UK = choose(reachable_UE, inputs, config)
    return assemble(logits_UE, expert_ids_UK, gates_of(log_probabilities_UE, expert_ids_UK, inputs, config), inputs)


def sigmoid_group_limited(logits_UE: Float[Array, "U E"], inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Routes like `sigmoid_top_k` among the experts of each token's best `groups_per_token` of `num_groups` groups.

    Node-limited routing of DeepSeek-V3 (2024, section 2.1.2): a group scores as the sum of its two best biased scores
    (K / groups_per_token in the paper, which are two there). Exact and causal.
    """
    scores_UE = jax.nn.sigmoid(logits_UE)
    reachable_UE = _of_best_groups(scores_UE, inputs, config, BEST_OF_GROUP_V3)
    return _by_sigmoid(logits_UE, scores_UE, choose(reachable_UE, inputs, config), inputs, config)


def expert_choice(logits_UE: Float[Array, "U E"], inputs: RouterInputs, config: MoeConfig) -> Routing:
    """NOT CAUSAL. Every expert picks the ceil(U * K / E * capacity_factor) tokens of the row that like it best.

    Zhou et al. 2022 (section 3.2): loads are equal, a token has from none to E experts (so the width is E), weighted by
    its softmax probabilities as they are; `capacity_factor` None counts as 1, and U counts tokens that are not padding.
    WHETHER A TOKEN IS PICKED DEPENDS ON LATER TOKENS OF ITS ROW: a decoder trained so sees its future in the loss. In
    evaluation and decoding, which must not, each token takes its K likeliest experts instead, with the same weights.
    A token's choices are E wide, most of them unused: dispatch moves as many rows as U * E / K choices of others.
    """
    probabilities_UE = jax.nn.softmax(logits_UE, axis=-1)
    weights_UE = probabilities_UE * config.gate_scale
    if inputs.training and inputs.replay_ids_UK is None:
        experts_UE = jnp.broadcast_to(jnp.arange(logits_UE.shape[-1]), logits_UE.shape)
        picked_UE = _picked(probabilities_UE, inputs.valid_U, config)
        return assemble(logits_UE, experts_UE, weights_UE, inputs, used_UK=picked_UE)
    expert_ids_UK = choose(probabilities_UE, inputs, config)
    return assemble(logits_UE, expert_ids_UK, jnp.take_along_axis(weights_UE, expert_ids_UK, axis=-1), inputs)


def sinkhorn(logits_UE: Float[Array, "U E"], inputs: RouterInputs, config: MoeConfig) -> Routing:
    """NOT CAUSAL IN TRAINING. Routes to K experts by the row's balanced assignment, without gradient through it.

    S-BASE (Clark et al. 2022, section 3.1): Sinkhorn iterations make the assignment of the row's tokens to experts one
    of equal loads; gates are of the clean logits, softmax, or sigmoid where K = 1. In evaluation and decoding the
    choice is by logits alone, which sees no other token. It balances loads itself: set `load_balance_weight` to 0.
    """
    scores_UE = logits_UE
    if inputs.training:
        scores_UE = logits_UE + _balancing_bias(jax.lax.stop_gradient(logits_UE), inputs.valid_U)
    expert_ids_UK = choose(scores_UE, inputs, config)
    log_scores_of = jax.nn.log_sigmoid if config.experts_per_token == 1 else jax.nn.log_softmax
    return assemble(logits_UE, expert_ids_UK, gates_of(log_scores_of(logits_UE), expert_ids_UK, inputs, config), inputs)


def hashed(logits_UE: Float[Array, "U E"], inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Routes each token to K experts that its id alone decides, with gates `gate_scale` / K (Roller et al. 2021).

    A random hash, the same in every layer. By design no gradient of the language-model loss reaches the router, whose
    logits only the auxiliary losses see. Exact and causal under any batch, row and layout.
    """
    keys_U = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), inputs.token_ids_U)
    draws_UE = jax.vmap(lambda key: jax.random.uniform(key, logits_UE.shape[1:]))(keys_U)
    expert_ids_UK = choose(draws_UE, inputs, config)
    chosen_UK = is_choice(expert_ids_UK, inputs).astype(logits_UE.dtype)
    gates_UK = config.gate_scale * chosen_UK / jnp.maximum(jnp.sum(chosen_UK, axis=-1, keepdims=True), 1)
    return assemble(logits_UE, expert_ids_UK, gates_UK, inputs)


def balanced(logits_UE: Float[Array, "U E"], inputs: RouterInputs, config: MoeConfig) -> Routing:
    """For benchmarks: experts in turn, so that a row's loads differ by one at most; gates are those of `top_k`."""
    first_U = config.experts_per_token * (jnp.cumsum(inputs.valid_U) - 1)
    turns_UE = (jnp.arange(logits_UE.shape[-1]) - first_U[:, None]) % logits_UE.shape[-1]
    expert_ids_UK = choose(-turns_UE.astype(logits_UE.dtype), inputs, config)
    gates_UK = gates_of(jax.nn.log_softmax(logits_UE, axis=-1), expert_ids_UK, inputs, config)
    return assemble(logits_UE, expert_ids_UK, gates_UK, inputs)


def uniform(logits_UE: Float[Array, "U E"], inputs: RouterInputs, config: MoeConfig) -> Routing:
    """For benchmarks: K different experts at random, by place in the row where there is no key; gates as in `top_k`."""
    key = jax.random.key(0) if inputs.key is None else inputs.key
    expert_ids_UK = choose(jax.random.uniform(key, logits_UE.shape), inputs, config)
    gates_UK = gates_of(jax.nn.log_softmax(logits_UE, axis=-1), expert_ids_UK, inputs, config)
    return assemble(logits_UE, expert_ids_UK, gates_UK, inputs)


READ_GROUPS = (group_limited, sigmoid_group_limited)
READ_BIAS = (top_k, softmax_of_chosen, noisy_top_k, sigmoid_top_k, *READ_GROUPS)
# Their gates are over their sum in any case, or never.
FIXED_GATES = (softmax_of_chosen, expert_choice, hashed)
# In training, what a token is routed to depends on later tokens of its row.
NON_CAUSAL = (expert_choice, sinkhorn)
ROUTERS = (*READ_BIAS, *NON_CAUSAL, hashed, balanced, uniform)
NORMALIZED = tuple(router for router in ROUTERS if router not in FIXED_GATES)
DEFAULTS = {field.name: field.default for field in dataclasses.fields(MoeConfig)}


def check(config: MoeConfig) -> None:
    """Raises `CallerError` where the router does not read a setting that is not at its default, or could not learn.

    Checked are the settings that some routers read and others do not. Routers of the user's own are taken to know what
    they read.
    """
    router = config.router or top_k
    if not is_among(router, ROUTERS):
        return
    _require_read("bias_rate", config, READ_BIAS)
    _require_read("router_noise", config, (noisy_top_k,))
    _require_read("num_groups", config, READ_GROUPS)
    _require_read("groups_per_token", config, READ_GROUPS)
    limits = not is_among(router, READ_GROUPS) or config.num_groups > 1
    require(limits, "num_groups", 1, f"leaves the router {router.__name__} no groups to limit", "set it above 1")
    alone = config.experts_per_token == 1 and config.num_experts > 1
    if not alone:
        _require_read("normalize_gates", config, NORMALIZED)
    constant = "gives the router {} no gradient with one expert a token (the gate is always 1)"
    mend = "for the Switch router leave ROUTER out and set moe.MoeConfig.normalize_gates=False"
    one = is_among(router, (softmax_of_chosen,)) and alone
    require(not one, "experts_per_token", 1, constant.format(router.__name__), mend)
    one = is_among(router, NORMALIZED) and alone and config.normalize_gates
    mend = "set moe.MoeConfig.normalize_gates=False"
    require(not one, "normalize_gates", True, constant.format(router.__name__), mend)


def _require_read(setting: str, config: MoeConfig, readers: Sequence[Callable]) -> None:
    value, default = getattr(config, setting), DEFAULTS[setting]
    unread = f"is not read by the router {(config.router or top_k).__name__}"
    mend = f"leave it at {default} or set ROUTER to one of {', '.join(each.__name__ for each in readers)}"
    require(value == default or is_among(config.router, readers), setting, value, unread, mend)


def is_among(router: Callable | None, group: Sequence[Callable]) -> bool:
    """Whether `router` (None: `top_k`) is one of `group`, also where gin or a type checker wrapped it."""
    return inspect.unwrap(router or top_k) in [inspect.unwrap(each) for each in group]


def _by_sigmoid(
    logits_UE: Array, scores_UE: Array, expert_ids_UK: Array, inputs: RouterInputs, config: MoeConfig
) -> Routing:
    """The routing of choices by sigmoid scores, which do not sum to 1."""
    probabilities_UE = scores_UE / jnp.maximum(jnp.sum(scores_UE, axis=-1, keepdims=True), TINY)
    gates_UK = gates_of(jax.nn.log_sigmoid(logits_UE), expert_ids_UK, inputs, config)
    return assemble(logits_UE, expert_ids_UK, gates_UK, inputs, probabilities_UE=probabilities_UE)


def _of_best_groups(scores_UE: Array, inputs: RouterInputs, config: MoeConfig, best: int) -> Float[Array, "U E"]:
    """Scores where an expert is of one of its token's best groups by the sum of `best` biased scores, else -inf."""
    biased_UE = jax.lax.stop_gradient(scores_UE if inputs.bias_E is None else scores_UE + inputs.bias_E)
    size = config.num_experts // config.num_groups
    best_of_each = jax.lax.top_k(biased_UE.reshape(-1, config.num_groups, size), min(best, size))[0]
    groups = jax.lax.top_k(jnp.sum(best_of_each, axis=-1), config.groups_per_token)[1]
    group_of_E = jnp.arange(config.num_experts) // size
    reachable_UE = jnp.any(groups[:, :, None] == group_of_E, axis=1)
    return jnp.where(reachable_UE, scores_UE, -jnp.inf)


def _picked(scores_UE: Array, valid_U: Array, config: MoeConfig) -> Bool[Array, "U E"]:
    """Which tokens each expert picks: its best among the valid ones, the earlier of equals."""
    picks_of_valid = np.array([config.expert_capacity(tokens) for tokens in range(len(valid_U) + 1)], np.int32)
    num_picks = jnp.asarray(picks_of_valid)[jnp.sum(valid_U)]
    scores_UE = jnp.where(valid_U[:, None], jax.lax.stop_gradient(scores_UE), -1.0)
    rank_UE = jnp.argsort(jnp.argsort(-scores_UE, axis=0), axis=0)
    return rank_UE < num_picks


def _balancing_bias(logits_UE: Array, valid_U: Array) -> Float[Array, " E"]:
    """The column scaling, as a logarithm, of the assignment with rows of sum 1 and columns of one sum.

    The row scaling does not change which experts of a token come first, so this is all of it that selection needs.
    """
    valid_U1 = valid_U[:, None]

    def sweep(_: Array, bias_E: Array) -> Array:
        log_rows_U = jax.nn.logsumexp(logits_UE + bias_E, axis=-1)
        return -jax.nn.logsumexp(logits_UE - log_rows_U[:, None], axis=0, where=valid_U1)

    bias_E = jax.lax.fori_loop(0, SINKHORN_SWEEPS, sweep, jnp.zeros(logits_UE.shape[-1], logits_UE.dtype))
    return jnp.where(jnp.any(valid_U), bias_E, 0.0)
