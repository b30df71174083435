"""The optimizer: AdamW with global-norm clipping, or a function of the user's own.

`build(learning_rate, config) -> optax.GradientTransformation` is called inside the step with the traced learning rate
of that step, so that schedules are functions of tokens and the optimizer's state holds no schedule of its own.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx

from gpt4moe.config.optimizer import OptimizerConfig
from gpt4moe.train import trainable

# Dims over which a tensor is a stack of separate matrices or vectors.
STACKED_DIMS = ("layers", "cross_layers", "vision_layers", "experts")


def make_optimizer(learning_rate: jax.typing.ArrayLike, config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns clipping to `clip_norm` followed by the user's `build`, or AdamW where there is none, and `rate_scales`.

    It is given what is trained and nothing else; the norm is of those gradients.
    """
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    rates = [optax.stateless(lambda updates, _: trainable.scaled(updates, config))] if config.rate_scales else []
    return optax.chain(clip, (config.build or adamw)(learning_rate, config), *rates)


def adamw(learning_rate: jax.typing.ArrayLike, config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019) on matrices only."""
    return optax.adamw(
        learning_rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def decay_mask(params: Any) -> Any:
    """True for parameters that are matrices once their stacked dims are taken away: norms and biases do not decay."""
    return jax.tree.map(
        lambda param: param.replace(_is_matrix(param)), params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def _is_matrix(param: nnx.Variable) -> bool:
    dims = param.get_metadata().get("logical_axes") or ("unnamed",) * param.get_value().ndim
    return sum(dim not in STACKED_DIMS for dim in dims) >= 2
