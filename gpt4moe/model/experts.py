"""Stacked feed-forward experts: weights, arithmetic over grouped rows, tokens carried there and back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from gpt4moe.config.moe import MoeConfig
from gpt4moe.model import dispatch, expert_loop
from gpt4moe.model.dispatch import Dispatched
from gpt4moe.model.grouped_matmul import block_matmul, expert_matmul
from gpt4moe.model.layers import Slots, activate, matmul, normal_parameter
from gpt4moe.model.router import Routing
from gpt4moe.types import Array

# Choices from which on a CPU takes experts in turn: a token or two of each row are served by a loop over their blocks.
FEWEST_IN_TURN = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """The matrices of one layer's experts, all or those of one shard; gate is None where experts are not gated."""

    gate_EDF: Float[Array, "E D F"] | None
    up_EDF: Float[Array, "E D F"]
    down_EFD: Float[Array, "E F D"]


class Experts(nnx.Module):
    """E feed-forwards, SwiGLU where `gated` and plain GELU otherwise, no biases; an empty row stays zero.

    gate, up: [E, D, F]; down: [E, F, D], with a leading layers dim where stacked.
    """

    def __init__(self, layers: Slots, dim: int, config: MoeConfig, out_scale: float, rngs: nnx.Rngs):
        inward = (config.num_experts, dim, config.hidden_dim), ("experts", "embed", "mlp"), dim**-0.5
        outward = (config.num_experts, config.hidden_dim, dim), ("experts", "mlp", "embed")
        self.gate = normal_parameter(rngs, layers, *inward) if config.gated else None
        self.up = normal_parameter(rngs, layers, *inward)
        self.down = normal_parameter(rngs, layers, *outward, config.hidden_dim**-0.5 * out_scale)

    def __call__(self) -> ExpertWeights:
        """Returns the matrices, in float32."""
        return ExpertWeights(None if self.gate is None else self.gate[...], self.up[...], self.down[...])


def feed_forward(
    weights: ExpertWeights, dispatched: Dispatched, grouped_product: str | None = None, platform: str | None = None
) -> Float[Array, "X C D"]:
    """Returns y_XCD, the rows of every block after its expert.

    `grouped_product` names an implementation, `platform` (None: the backend in use) where the program will run.
    """
    if dispatched.block_expert_X is None and _goes_in_turn(grouped_product, platform):
        return expert_loop.feed_forward_in_turn(_matrices(weights), dispatched.rows_XCD)

    def multiply(rows: Array, w: Array) -> Array:
        if dispatched.block_expert_X is None:
            return expert_matmul(rows, w)
        return block_matmul(rows, w, dispatched.block_expert_X, dispatched.num_blocks, grouped_product)

    rows_XCD = dispatched.rows_XCD
    gate_XCF = None if weights.gate_EDF is None else multiply(rows_XCD, weights.gate_EDF)
    return multiply(activate(multiply(rows_XCD, weights.up_EDF), gate_XCF), weights.down_EFD)


def apply_experts(
    weights: ExpertWeights,
    x_BTD: Float[Array, "B T D"],
    routing: Routing,
    config: MoeConfig,
    drops: bool,
    platform: str | None = None,
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """Returns y_BTD, every token through its experts, and how many choices were dropped; each row is one routing group.

    `drops` holds each expert to the capacity of `config`; otherwise every choice is served. `platform` (None: the
    backend in use) is where the program will run: a CPU takes experts in turn where there is work for them.
    """
    many = routing.expert_ids_UK.size >= FEWEST_IN_TURN
    if not drops and many and _goes_in_turn(config.grouped_product, platform):
        return _serve_in_turn(weights, x_BTD, routing, config.num_experts), jnp.int32(0)
    dispatched = (dispatch.capacity if drops else dispatch.dropless)(x_BTD, routing, config)
    y_XCD = feed_forward(weights, dispatched, config.grouped_product, platform)
    return dispatch.combine(y_XCD, dispatched.plan, len(x_BTD)), jnp.sum(dispatched.stats.dropped_G)


def _goes_in_turn(grouped_product: str | None, platform: str | None) -> bool:
    return grouped_product is None and (platform or jax.default_backend()) == "cpu"


def _serve_in_turn(weights: ExpertWeights, x_BTD: Array, routing: Routing, num_experts: int) -> Array:
    tokens = x_BTD.shape[0] * x_BTD.shape[1]
    choices = (routing.expert_ids_UK, routing.used_UK, routing.gates_UK)
    ids_UK, used_UK, gates_UK = (leaf.reshape(tokens, -1) for leaf in choices)
    order_S, counts_E = dispatch.sort_by_expert(ids_UK, used_UK, num_experts)
    x_UD = x_BTD.reshape(tokens, -1)
    y_UD = expert_loop.serve(_matrices(weights), x_UD, gates_UK, used_UK, order_S, counts_E)
    return y_UD.reshape(x_BTD.shape)


def _matrices(weights: ExpertWeights) -> expert_loop.Matrices:
    inward = (weights.up_EDF,) if weights.gate_EDF is None else (weights.gate_EDF, weights.up_EDF)
    return inward, weights.down_EFD


def apply_single_expert(
    weights: ExpertWeights, x_BTD: Float[Array, "B T D"], routing: Routing
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """Returns what `apply_experts` does where there is one expert and no capacity: a dense product, nothing carried."""
    gate_BTF = None if weights.gate_EDF is None else matmul(x_BTD, weights.gate_EDF[0])
    y_BTD = matmul(activate(matmul(x_BTD, weights.up_EDF[0]), gate_BTF), weights.down_EFD[0])
    weight_BT1 = jnp.where(routing.used_UK, routing.gates_UK, 0.0)[..., :1]
    return (y_BTD * weight_BT1).astype(x_BTD.dtype), jnp.int32(0)
