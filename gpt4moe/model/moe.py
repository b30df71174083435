"""The mixture-of-experts layer: router, dispatch, experts, combine, optional shared expert."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from gpt4moe.config.moe import MoeConfig
from gpt4moe.model.experts import Experts
from gpt4moe.model.layers import FeedForward, Slots, normal_parameter
from gpt4moe.model.layout import Layout
from gpt4moe.model.router import RouterInputs, top_k
from gpt4moe.types import Array

# The router starts near uniform: a tenth of the deviation other matrices have (Switch, section 2.4).
ROUTER_INIT_SCALE = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeOut:
    """What a layer reports, all as sums over the batch, so that microbatches and shards add up.

    load_E: assignments to each expert (int32); dropped: assignments without a place (int32); load_balance: summed over
    rows, router_z and router_entropy: summed over tokens (float32). Stacked over layers, each leads with L.
    """

    load_E: Int[Array, "... E"]
    dropped: Int[Array, " ..."]
    load_balance: Float[Array, " ..."]
    router_z: Float[Array, " ..."]
    router_entropy: Float[Array, " ..."]


class Moe(nnx.Module):
    """Every token through its K experts, and through the shared expert where there is one."""

    def __init__(self, layers: Slots, dim: int, config: MoeConfig, layout: Layout, out_scale: float, rngs: nnx.Rngs):
        router_std = ROUTER_INIT_SCALE * dim**-0.5
        router_axes = ("embed", "router_experts")
        self.router = normal_parameter(rngs, layers, (dim, config.num_experts), router_axes, router_std)
        self.experts = Experts(layers, dim, config, out_scale, rngs)
        shared = config.shared_hidden_dim
        self.shared_expert = FeedForward(layers, dim, shared, config.gated, out_scale, rngs) if shared else None
        self.config, self.layout = config, layout

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        token_ids_BT: Int[Array, "B T"],
        valid_BT: Bool[Array, "B T"],
        dropless: bool,
    ) -> tuple[Float[Array, "B T D"], MoeOut]:
        """Returns y_BTD and the layer's sums; each row is one routing group. `dropless` overrides the capacity."""
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE",
            x_BTD.astype(jnp.float32),
            self.router[...],
            precision=jax.lax.Precision.HIGHEST,
        )
        router = self.config.router or top_k
        inputs = RouterInputs(token_ids_U=token_ids_BT, valid_U=valid_BT)
        routing = jax.vmap(lambda logits, row: router(logits, row, self.config))(logits_BTE, inputs)

        drops = self.config.capacity_factor is not None and not dropless
        y_BTD, dropped = self.layout.apply_experts(self.experts(), x_BTD, routing, self.config, drops)
        if self.shared_expert is not None:
            y_BTD = y_BTD + self.shared_expert(x_BTD)
        out = MoeOut(
            load_E=jnp.sum(routing.stats.load_E, axis=0),
            dropped=dropped,
            load_balance=jnp.sum(routing.losses.load_balance),
            router_z=jnp.sum(routing.losses.router_z),
            router_entropy=jnp.sum(routing.stats.entropy),
        )
        return y_BTD, out
