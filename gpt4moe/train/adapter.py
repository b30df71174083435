"""A run with an adapter for images: what begins fresh on a checkpoint of a text model, how open its gates are.

In: the parameters of the run's model and the names of those in the source. Out: which parts are new, and the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from etils import epath
from flax import nnx
from jaxtyping import Float

from gpt4moe import checkpoint
from gpt4moe.config.check import require
from gpt4moe.config.model import ModelConfig
from gpt4moe.model.layout import Layout
from gpt4moe.types import Array

PARTS = ("vision_encoder", "resampler", "cross_attention", "spelling")
# What an encoder of single images lacks when it goes on with clips or with pages in tiles.
GROWN = ("vision_encoder.frames",)


def new_parts(source: epath.PathLike, step: int, params: nnx.State) -> tuple[str, ...]:
    """Returns the parts of `params`, of PARTS and GROWN, of which `step` of `source` has no array.

    Raises `CallerError` where `source` has a part that `params` has not: it would be lost.
    """
    saved = [name.removeprefix("params.").split(".") for name in checkpoint.saved_names(source, step)]
    there = {part for part in (*PARTS, *GROWN) if any(path[: len(_path(part))] == _path(part) for path in saved)}
    lost = [part for part in (*PARTS, *GROWN) if part in there and not has(params, part)]
    lost = [part for part in lost if part in PARTS or _path(part)[0] not in lost]
    mend = "give the model its vision configuration, or start from a text model"
    require(not lost, "init_from", str(source), f"has {' and '.join(lost)}, which this model lacks", mend)
    new = tuple(part for part in PARTS if part in params and part not in there)
    grown = tuple(part for part in GROWN if _path(part)[0] in there and part not in there and has(params, part))
    return new + grown


def without(params: nnx.State, parts: Sequence[str]) -> nnx.State:
    """Returns all of `params` but these parts."""
    return nnx.split_state(params, _within(parts), ...)[1] if parts else params


def with_parts(params: nnx.State, parts: Sequence[str], fresh: nnx.State) -> nnx.State:
    """Returns `params` and, of `fresh`, these parts."""
    taken, _ = nnx.split_state(fresh, _within(parts), ...)
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


def has(params: nnx.State, part: str) -> bool:
    """Returns whether `params` hold anything of a part."""
    return any(_within([part])(path, None) for path, _ in nnx.to_flat_state(params))


def _path(part: str) -> list[str]:
    return part.split(".")


def _within(parts: Sequence[str]) -> Callable[[tuple, object], bool]:
    """Whether a parameter lies in one of `parts`, as a filter of states."""
    paths = [_path(part) for part in parts]
    return lambda path, _: any(list(path[: len(of)]) == of for of in paths)
