"""Balance among the experts of a layer: the balance loss over what it is taken over, and the bias that needs none.

Scopes of the loss E * sum_e f_e P_e (f: fractions of the assignments, P: means of the router's distribution):
  row: f and P of each row, the mean over rows. Exact under accumulation and any layout.
  microbatch: f and P of a microbatch over all its shards. Exact under any layout.
  batch: f of the whole batch as far as it has been counted when a microbatch runs (Qiu et al. 2025, algorithm 1: a
    buffer over accumulated passes). Exact under any layout; over a batch in one piece it is the scope `microbatch`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from gpt4moe.config.moe import MoeConfig
from gpt4moe.model.layers import Slots
from gpt4moe.model.moe import MoeOut
from gpt4moe.types import Array


def load_balance(
    moe: MoeOut, config: MoeConfig, rows: Array, tokens: Array, load_so_far_LE: Int[Array, "L E"] | None
) -> Float[Array, " L"]:
    """Returns a microbatch's share of each layer's balance loss, 1 at uniform routing for a whole batch.

    rows, tokens: of the whole batch. load_so_far_LE: assignments of the batch's earlier microbatches, None for the
    first; only the scope `batch` looks.
    """
    if config.load_balance_scope == "row":
        return moe.load_balance / jnp.maximum(rows, 1.0)
    add_earlier = config.load_balance_scope == "batch" and load_so_far_LE is not None
    load_LE = moe.load_E + load_so_far_LE if add_earlier else moe.load_E
    fraction_LE = load_LE / jnp.maximum(jnp.sum(load_LE, axis=-1, keepdims=True), 1)
    products_L = jnp.sum(jax.lax.stop_gradient(fraction_LE) * moe.probability_E, axis=-1)
    return moe.load_E.shape[-1] * products_L / jnp.maximum(tokens, 1.0)


def move_biases(
    trained: nnx.State, before: nnx.State, load_LE: Int[Array, "L E"], slots: Slots, rate: float
) -> nnx.State:
    """Returns `trained` with each router's bias moved by `rate` towards equal loads (Wang et al. 2024, algorithm 1).

    From the value of `before`, whatever the optimizer made of it: up for an expert with less than the mean load of the
    whole batch, down for one with more. `slots` says which layer each bias of the stack is for, -1 for none. A bias
    that is frozen, not among these parameters, stays.
    """
    if "router_bias" not in before.get("blocks", {}).get("moe", {}):
        return trained
    bias_SE = before["blocks"]["moe"]["router_bias"][...]
    load_SE = load_LE[jnp.array(slots)].astype(jnp.float32)
    held_S1 = jnp.array(slots)[:, None] >= 0
    towards_SE = jnp.sign(jnp.mean(load_SE, axis=-1, keepdims=True) - load_SE)
    moved = jax.tree.map(lambda leaf: leaf, trained)  # its containers anew: `trained` stays as it is
    moved["blocks"]["moe"]["router_bias"][...] = bias_SE + rate * jnp.where(held_S1, towards_SE, 0.0)
    return moved


def expert_grad_norms(grads: nnx.State, order: list[int], num_experts: int) -> Float[Array, "L E"]:
    """Returns the norm of the gradient of each layer's each expert, 0 for what `grads` lacks.

    `order` is the slot of every layer.
    """
    experts = grads.get("blocks", {}).get("moe", {}).get("experts", {})
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=(2, 3)) for leaf in jax.tree.leaves(experts)]
    if not squares:
        return jnp.zeros((len(order), num_experts), jnp.float32)
    return jnp.sqrt(sum(squares))[jnp.array(order)]
