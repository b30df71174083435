"""Which experts each token goes to, and with what weight; the auxiliary losses that keep the choice healthy.

A router is a function of one routing group (a row), `router(logits_UE, inputs, config) -> Routing`; the model maps it
over the rows. `MoeConfig.router` puts a user's own in the place of `top_k`: choose `expert_ids_UK` and `gates_UK`
and let `assemble` add losses and statistics.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from gpt4moe.config.moe import MoeConfig
from gpt4moe.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterInputs:
    """What a router may look at besides its logits; the last three are None unless the caller supplies them.

    token_ids_U: int32; valid_U: bool, False for padding; key: random key; bias_E: float32 added for selection only;
    replay_ids_UK: int32 choices to repeat.
    """

    token_ids_U: Int[Array, "... U"]
    valid_U: Bool[Array, "... U"]
    key: Key[Array, " ..."] | None = None
    bias_E: Float[Array, "... E"] | None = None
    replay_ids_UK: Int[Array, "... U K"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterLosses:
    """Auxiliary losses of one group as sums, so that a step can divide by global counts.

    load_balance: E * sum_e f_e P_e of the group (1 at uniform routing, 0 for a group without tokens);
    router_z: squared log-partition summed over the group's tokens.
    """

    load_balance: Float[Array, " ..."]
    router_z: Float[Array, " ..."]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """load_E: assignments to each expert, int32; entropy: nats of the router's distribution, summed over tokens."""

    load_E: Int[Array, "... E"]
    entropy: Float[Array, " ..."]


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

    With `normalize_gates` the K probabilities are divided by their sum.
    """
    probabilities_UE = jax.nn.softmax(logits_UE, axis=-1)
    gates_UK, expert_ids_UK = jax.lax.top_k(probabilities_UE, config.experts_per_token)
    if config.normalize_gates:
        gates_UK = gates_UK / jnp.sum(gates_UK, axis=-1, keepdims=True)
    return assemble(logits_UE, expert_ids_UK, gates_UK, inputs)


def assemble(
    logits_UE: Float[Array, "U E"],
    expert_ids_UK: Int[Array, "U K"],
    gates_UK: Float[Array, "U K"],
    inputs: RouterInputs,
) -> Routing:
    """Returns the routing of these choices with its losses and statistics; padding is routed nowhere.

    Load balance follows Shazeer et al. 2017 / Switch (Fedus et al. 2021, eq. 4) with f_e the fraction of the group's
    assignments and P_e the mean softmax probability; z-loss is ST-MoE (Zoph et al. 2022, eq. 5).
    """
    num_experts = logits_UE.shape[-1]
    valid_U = inputs.valid_U.astype(jnp.float32)
    used_UK = jnp.broadcast_to(inputs.valid_U[:, None], expert_ids_UK.shape)
    chosen_UKE = (expert_ids_UK[..., None] == jnp.arange(num_experts)) & used_UK[..., None]
    load_E = jnp.sum(chosen_UKE, axis=(0, 1), dtype=jnp.int32)

    log_partition_U = jax.nn.logsumexp(logits_UE, axis=-1)
    log_probabilities_UE = logits_UE - log_partition_U[:, None]
    probabilities_UE = jnp.exp(log_probabilities_UE)
    num_valid = jnp.maximum(jnp.sum(valid_U), 1.0)
    mean_probability_E = jnp.sum(probabilities_UE * valid_U[:, None], axis=0) / num_valid
    fraction_E = load_E / jnp.maximum(jnp.sum(load_E), 1)
    entropy_U = -jnp.sum(probabilities_UE * log_probabilities_UE, axis=-1)
    losses = RouterLosses(
        load_balance=num_experts * jnp.sum(fraction_E * mean_probability_E),
        router_z=jnp.sum(jnp.square(log_partition_U) * valid_U),
    )
    return Routing(
        expert_ids_UK=expert_ids_UK.astype(jnp.int32),
        gates_UK=gates_UK * valid_U[:, None],
        used_UK=used_UK,
        losses=losses,
        stats=RouterStats(load_E, jax.lax.stop_gradient(jnp.sum(entropy_U * valid_U))),
    )
