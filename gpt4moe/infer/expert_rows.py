"""Rows through their experts while decoding: one function, with a lowering for each size of batch and platform.

In: rows, each with K choices of experts and their gates. Out: the sum of the experts' outputs weighted by gates, in
float32. An expert that no row goes to is not read.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from gpt4moe.infer.decode_weights import FeedForwardWeights
from gpt4moe.infer.matrix import times
from gpt4moe.model.layers import activate
from gpt4moe.types import Array


def feed_forward(x_UD: Float[Array, "U D"], weights: FeedForwardWeights, gated: bool) -> Float32[Array, "U D"]:
    """Returns rows after a feed-forward."""
    hidden_UJ = times(x_UD, weights.in_DJ)
    if gated:
        gate_UF, up_UF = jnp.split(hidden_UJ, 2, axis=-1)
        return times(activate(up_UF, gate_UF), weights.down_FD)
    return times(activate(hidden_UJ, None), weights.down_FD)


def serve(
    experts: tuple[FeedForwardWeights, ...] | FeedForwardWeights,
    x_UD: Float[Array, "U D"],
    ids_UK: Int[Array, "U K"],
    gates_UK: Float32[Array, "U K"],
    gated: bool,
) -> Float32[Array, "U D"]:
    """Returns y_UD; a choice of gate 0 is none."""
    num = len(experts)
    weights_UE = jnp.sum(jnp.where(ids_UK[..., None] == jnp.arange(num), gates_UK[..., None], 0.0), axis=1)
    y_UD = jnp.zeros(x_UD.shape, jnp.float32)
    for e, expert in enumerate(experts):

        def through(x_UD: Array, expert=expert, weight_U1=weights_UE[:, e : e + 1]) -> Array:
            return feed_forward(x_UD, expert, gated) * weight_U1

        y_UD += jax.lax.cond(jnp.any(weights_UE[:, e] > 0), through, lambda x: jnp.zeros(x.shape, jnp.float32), x_UD)
    return y_UD
