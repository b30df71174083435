"""The contract of routers: what one is given, what it returns, and the parts that all of them share.

A router is a function of one routing group (a row), `router(logits_UE, inputs, config) -> Routing`; the model maps it
over the rows. `MoeConfig.router` puts another one, of `gpt4moe.model.routers` or of the user's own, in the place of
`top_k`: `choose` experts by scores, weigh them by gates, and let `assemble` add losses and statistics.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from gpt4moe.config.moe import MoeConfig
from gpt4moe.types import Array

TINY = 1e-30
# Below any logarithm of a score.
LOWEST = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterInputs:
    """What a router may look at besides its logits; the arrays that may be None are so unless the caller has them.

    token_ids_U: int32; valid_U: bool, False for padding; key: random key, in training only; bias_E: float32, added to
    what experts are selected by and to nothing else; replay_ids_UK: int32 choices to repeat, -1 for none.
    training: False in evaluation and decoding, where nothing is random and no token may depend on later ones.
    """

    token_ids_U: Int[Array, "... U"]
    valid_U: Bool[Array, "... U"]
    key: Key[Array, " ..."] | None = None
    bias_E: Float[Array, "... E"] | None = None
    replay_ids_UK: Int[Array, "... U K"] | None = None
    training: bool = dataclasses.field(default=True, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterLosses:
    """Auxiliary losses of one group as sums, so that a step can divide by global counts.

    load_balance: E * sum_e f_e P_e of the group (1 at uniform routing, 0 for a group without tokens);
    router_z: squared log-partition summed over the group's tokens; probability_E: the router's distribution summed
    over tokens, of which the loss over more than a group is made.
    """

    load_balance: Float[Array, " ..."]
    router_z: Float[Array, " ..."]
    probability_E: Float[Array, "... E"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """load_E: assignments to each expert, int32; the others are sums over tokens, without gradient.

    entropy: nats of the router's distribution; largest_logit: of each token.
    """

    load_E: Int[Array, "... E"]
    entropy: Float[Array, " ..."]
    largest_logit: Float[Array, " ..."]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Choices of one group: expert_ids_UK int32, gates_UK float32, used_UK bool (False: the entry goes nowhere).

    Of two tokens that want the last place at an expert, the one with the lower k wins, then the earlier one.
    """

    expert_ids_UK: Int[Array, "... U K"]
    gates_UK: Float[Array, "... U K"]
    used_UK: Bool[Array, "... U K"]
    losses: RouterLosses
    stats: RouterStats


def top_k(logits_UE: Float[Array, "U E"], inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Routes each token to its K likeliest experts, weighted by softmax probability (Shazeer et al. 2017).

    With `normalize_gates` the K probabilities are divided by their sum. With K = 1 and without it, this is the Switch
    router (Fedus et al. 2021).
    """
    log_probabilities_UE = jax.nn.log_softmax(logits_UE, axis=-1)
    expert_ids_UK = choose(jnp.exp(log_probabilities_UE), inputs, config)
    return assemble(logits_UE, expert_ids_UK, gates_of(log_probabilities_UE, expert_ids_UK, inputs, config), inputs)


def choose(scores_UE: Float[Array, "U E"], inputs: RouterInputs, config: MoeConfig) -> Int[Array, "U K"]:
    """Returns the K experts of the largest score plus bias, the largest first; the given ones where it is a replay."""
    if inputs.replay_ids_UK is not None:
        return jnp.maximum(inputs.replay_ids_UK, 0)
    biased_UE = scores_UE if inputs.bias_E is None else scores_UE + inputs.bias_E
    return jax.lax.top_k(jax.lax.stop_gradient(biased_UE), config.experts_per_token)[1]


def is_choice(expert_ids_UK: Int[Array, "U K"], inputs: RouterInputs) -> Bool[Array, "U K"]:
    """Returns which of the choices are any: all but those that a replay leaves out."""
    replay_ids_UK = inputs.replay_ids_UK
    return jnp.ones(expert_ids_UK.shape, bool) if replay_ids_UK is None else replay_ids_UK >= 0


def gates_of(
    log_scores_UE: Float[Array, "U E"], expert_ids_UK: Int[Array, "U K"], inputs: RouterInputs, config: MoeConfig
) -> Float[Array, "U K"]:
    """Returns the scores of the chosen experts, over their sum where `normalize_gates`, times `gate_scale`.

    Scores are given as logarithms: those of a token's experts may all be too small for float32, as where a replay or a
    bias chooses experts that the router thinks little of, and yet have a ratio and a gradient.
    """
    any_UK = is_choice(expert_ids_UK, inputs)
    log_scores_UK = jnp.take_along_axis(log_scores_UE, expert_ids_UK, axis=-1)
    if config.normalize_gates:
        largest_U1 = jnp.max(log_scores_UK, axis=-1, keepdims=True, where=any_UK, initial=LOWEST)
        log_scores_UK -= jax.lax.stop_gradient(largest_U1)
    gates_UK = jnp.exp(jnp.where(any_UK, log_scores_UK, -jnp.inf))
    if config.normalize_gates:
        total_U1 = jnp.sum(gates_UK, axis=-1, keepdims=True)
        gates_UK = gates_UK / jnp.where(total_U1 > 0, total_U1, 1.0)
    return gates_UK * config.gate_scale


def assemble(
    logits_UE: Float[Array, "U E"],
    expert_ids_UK: Int[Array, "U K"],
    gates_UK: Float[Array, "U K"],
    inputs: RouterInputs,
    *,
    used_UK: Bool[Array, "U K"] | None = None,
    probabilities_UE: Float[Array, "U E"] | None = None,
) -> Routing:
    """Returns the routing of these choices with its losses and statistics; padding is routed nowhere.

    Load balance follows Shazeer et al. 2017 / Switch (Fedus et al. 2021, eq. 4) with f_e the fraction of the group's
    assignments and P_e the mean of `probabilities_UE`, softmax of the logits where None; z-loss is ST-MoE (Zoph et al.
    2022, eq. 5). `used_UK` leaves out choices, and so does a replay that has none there.
    """
    num_experts = logits_UE.shape[-1]
    valid_U = inputs.valid_U.astype(jnp.float32)
    used_UK = _used(used_UK, expert_ids_UK, inputs)
    chosen_UKE = (expert_ids_UK[..., None] == jnp.arange(num_experts)) & used_UK[..., None]
    load_E = jnp.sum(chosen_UKE, axis=(0, 1), dtype=jnp.int32)

    log_partition_U = jax.nn.logsumexp(logits_UE, axis=-1)
    if probabilities_UE is None:
        probabilities_UE = jnp.exp(logits_UE - log_partition_U[:, None])
    probability_E = jnp.sum(probabilities_UE * valid_U[:, None], axis=0)
    fraction_E = load_E / jnp.maximum(jnp.sum(load_E), 1)
    mean_probability_E = probability_E / jnp.maximum(jnp.sum(valid_U), 1.0)
    losses = RouterLosses(
        load_balance=num_experts * jnp.sum(fraction_E * mean_probability_E),
        router_z=jnp.sum(jnp.square(log_partition_U) * valid_U),
        probability_E=probability_E,
    )
    return Routing(
        expert_ids_UK=expert_ids_UK.astype(jnp.int32),
        gates_UK=gates_UK * used_UK,
        used_UK=used_UK,
        losses=losses,
        stats=jax.lax.stop_gradient(_stats(logits_UE, probabilities_UE, load_E, valid_U)),
    )


def _used(used_UK: Array | None, expert_ids_UK: Array, inputs: RouterInputs) -> Array:
    valid_UK = inputs.valid_U[:, None] & is_choice(expert_ids_UK, inputs)
    return valid_UK if used_UK is None else valid_UK & used_UK


def _stats(logits_UE: Array, probabilities_UE: Array, load_E: Array, valid_U: Array) -> RouterStats:
    entropy_U = -jnp.sum(probabilities_UE * jnp.log(jnp.maximum(probabilities_UE, TINY)), axis=-1)
    largest_U = jnp.max(logits_UE, axis=-1)
    return RouterStats(load_E, jnp.sum(entropy_U * valid_U), jnp.sum(largest_U * valid_U))
