"""The mixture-of-experts layer: router, dispatch, experts, combine, optional shared expert."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int, Key

from gpt4moe.config.moe import MoeConfig
from gpt4moe.model import routers
from gpt4moe.model.experts import Experts, apply_single_expert
from gpt4moe.model.layers import FeedForward, Slots, normal_parameter
from gpt4moe.model.layout import Layout
from gpt4moe.model.router import RouterInputs, Routing, top_k
from gpt4moe.types import Array

# The router starts near uniform: a tenth of the deviation other matrices have (Switch, section 2.4).
ROUTER_INIT_SCALE = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutedTokens:
    """What a layer's router needs to know of the tokens besides their vectors.

    token_ids, valid: [B, T]. keys_B: a random key for every row, None where nothing may be random. replay_ids_BTK:
    choices to repeat, -1 for none, or None.
    """

    token_ids_BT: Int[Array, "B T"]
    valid_BT: Bool[Array, "B T"]
    keys_B: Key[Array, " B"] | None = None
    replay_ids_BTK: Int[Array, "B T K"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choices:
    """Where every token went: expert_ids_BTK int32, -1 for none, and with what weight: gates_BTK float32."""

    expert_ids_BTK: Int[Array, "... B T K"]
    gates_BTK: Float[Array, "... B T K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeOut:
    """What a layer reports, all as sums over the batch, so that microbatches and shards add up.

    load_E: assignments to each expert (int32); dropped: assignments without a place (int32); load_balance: summed over
    rows, router_z, probability_E, router_entropy and largest_logit: summed over tokens (float32). Stacked over layers,
    each leads with L. choices: of every token, where they were asked for; None otherwise.
    """

    load_E: Int[Array, "... E"]
    dropped: Int[Array, " ..."]
    load_balance: Float[Array, " ..."]
    router_z: Float[Array, " ..."]
    probability_E: Float[Array, "... E"]
    router_entropy: Float[Array, " ..."]
    largest_logit: Float[Array, " ..."]
    choices: Choices | None = None


class Moe(nnx.Module):
    """Every token through its K experts, and through the shared expert where there is one.

    `router_bias` is there where `bias_rate` moves it (`gpt4moe.train.balance`); no gradient reaches it.
    """

    def __init__(self, layers: Slots, dim: int, config: MoeConfig, layout: Layout, out_scale: float, rngs: nnx.Rngs):
        routers.check(config)
        router_std = ROUTER_INIT_SCALE * dim**-0.5
        router_axes = ("embed", "router_experts")
        self.router = normal_parameter(rngs, layers, (dim, config.num_experts), router_axes, router_std)
        bias_LE, bias_axes = jnp.zeros((len(layers), config.num_experts)), ("layers", "router_experts")
        self.router_bias = nnx.Param(bias_LE, logical_axes=bias_axes) if config.bias_rate else None
        self.experts = Experts(layers, dim, config, out_scale, rngs)
        shared = config.shared_hidden_dim
        self.shared_expert = FeedForward(layers, dim, shared, config.gated, out_scale, rngs) if shared else None
        self.config, self.layout = config, layout

    def __call__(
        self, x_BTD: Float[Array, "B T D"], tokens: RoutedTokens, *, dropless: bool, with_choices: bool = False
    ) -> tuple[Float[Array, "B T D"], MoeOut]:
        """Returns y_BTD and the layer's sums; each row is one routing group.

        `dropless`, for evaluation and decoding, overrides the capacity and tells the router that it is not training.
        """
        routing = self._route(x_BTD, tokens, training=not dropless)
        drops = self.config.capacity_factor is not None and not dropless
        if self.config.num_experts == 1 and not drops:
            y_BTD, dropped = apply_single_expert(self.experts(), x_BTD, routing)
        else:
            y_BTD, dropped = self.layout.apply_experts(self.experts(), x_BTD, routing, self.config, drops)
        if self.shared_expert is not None:
            y_BTD = y_BTD + self.shared_expert(x_BTD)
        return y_BTD, _report(routing, dropped, with_choices)

    def _route(self, x_BTD: Array, tokens: RoutedTokens, *, training: bool) -> Routing:
        bias_E = None if self.router_bias is None else jax.lax.stop_gradient(self.router_bias[...])
        return route_rows(x_BTD, self.router[...], bias_E, tokens, self.config, training=training)


def route_rows(
    x_BTD: Float[Array, "B T D"],
    router_DE: Float[Array, "D E"],
    bias_E: Float[Array, " E"] | None,
    tokens: RoutedTokens,
    config: MoeConfig,
    *,
    training: bool,
) -> Routing:
    """Returns where the tokens go; each row is one routing group. Logits are computed in float32."""
    logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST)
    router = config.router or top_k

    def route_row(logits_TE: Array, row: RoutedTokens) -> Routing:
        given = {"key": row.keys_B, "bias_E": bias_E, "replay_ids_UK": row.replay_ids_BTK, "training": training}
        return router(logits_TE, RouterInputs(row.token_ids_BT, row.valid_BT, **given), config)

    return jax.vmap(route_row)(logits_BTE, tokens)


def _report(routing: Routing, dropped: Array, with_choices: bool) -> MoeOut:
    chosen_BTK = jnp.where(routing.used_UK, routing.expert_ids_UK, -1)
    return MoeOut(
        load_E=jnp.sum(routing.stats.load_E, axis=0),
        dropped=dropped,
        load_balance=jnp.sum(routing.losses.load_balance),
        router_z=jnp.sum(routing.losses.router_z),
        probability_E=jnp.sum(routing.losses.probability_E, axis=0),
        router_entropy=jnp.sum(routing.stats.entropy),
        largest_logit=jnp.sum(routing.stats.largest_logit),
        choices=Choices(chosen_BTK, routing.gates_UK) if with_choices else None,
    )
