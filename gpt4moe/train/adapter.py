"""A run with an adapter for images: what begins fresh on a checkpoint of a text model, how open its gates are.

In: the parameters of the run's model and the names of those in the source. Out: which parts are new, and the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from etils import epath
from flax import nnx
from jaxtyping import Float

from gpt4moe import checkpoint
from gpt4moe.config.check import require
from gpt4moe.config.model import ModelConfig
from gpt4moe.model.layout import Layout
from gpt4moe.types import Array

PARTS = ("vision_encoder", "resampler", "cross_attention")


def new_parts(source: epath.PathLike, step: int, params: nnx.State) -> tuple[str, ...]:
    """Returns the adapter's parts of `params` of which `step` of `source` has no array.

    Raises `CallerError` where `source` has a part that `params` has not: it would be lost.
    """
    there = {name.split(".")[1] for name in checkpoint.saved_names(source, step) if name.startswith("params.")}
    lost = [part for part in PARTS if part in there and part not in params]
    mend = "give the model its vision configuration, or start from a text model"
    require(not lost, "init_from", str(source), f"has {' and '.join(lost)}, which this model lacks", mend)
    return tuple(part for part in PARTS if part in params and part not in there)


def without(params: nnx.State, parts: Sequence[str]) -> nnx.State:
    """Returns all of `params` but these parts."""
    return nnx.split_state(params, lambda path, _: path[0] in parts, ...)[1] if parts else params


def with_parts(params: nnx.State, parts: Sequence[str], fresh: nnx.State) -> nnx.State:
    """Returns `params` and, of `fresh`, these parts."""
    taken, _ = nnx.split_state(fresh, lambda path, _: path[0] in parts, ...)
    return nnx.merge_state(params, taken) if parts else params


def gates(params: nnx.State, model: ModelConfig, layout: Layout) -> Float[Array, "2 L"] | None:
    """Returns tanh of the gates of attention and of the feed-forward of every block of cross-attention.

    Of a gate that is a vector, the mean magnitude. Blocks in the order in which tokens pass them; None of a text model.
    """
    if model.vision is None:
        return None
    each, block = model.superblocks_per_cross_attention, params["cross_attention"]
    order = jnp.array([slot // each for slot in layout.order(model.num_moe_layers)[::each]])

    def opened(gate: nnx.Param) -> Array:
        factors = jnp.tanh(gate[...])[order]
        return factors if factors.ndim == 1 else jnp.mean(jnp.abs(factors), axis=-1)

    return jnp.stack([opened(block["attention_gate"]), opened(block["feed_forward_gate"])])
