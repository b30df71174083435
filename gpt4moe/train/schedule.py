"""Learning-rate schedules: functions of tokens, in fractions of the peak rate; tokens of a run and of a batch.

A shape is `shape(tokens, total_tokens, config) -> fraction`: tokens seen before the step (a float32 scalar, traced),
tokens the whole run will see, and the run's `ScheduleConfig`. It knows nothing of the warm-up, which `fraction`
multiplies in front of any shape, the user's own included.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gpt4moe.config.optimizer import ScheduleConfig
from gpt4moe.config.train import TrainConfig


def fraction(tokens: jax.typing.ArrayLike, total_tokens: int, config: ScheduleConfig) -> jax.Array:
    """Learning rate after `tokens` of `total_tokens`, as a fraction of its peak: linear warm-up, then the shape."""
    shape = config.shape or cosine
    # float: a count of tokens above 2**31 does not fit the int32 that a whole number becomes.
    warmup = jnp.clip(tokens / float(config.warmup_tokens), 0.0, 1.0) if config.warmup_tokens else 1.0
    return warmup * shape(tokens, total_tokens, config)


def cosine(tokens: jax.typing.ArrayLike, total_tokens: int, config: ScheduleConfig) -> jax.Array:
    """Half a cosine from 1 at the end of the warm-up to `final_fraction` at `total_tokens`, constant after."""
    progress = _progress(tokens, config.warmup_tokens, total_tokens)
    return config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def wsd(tokens: jax.typing.ArrayLike, total_tokens: int, config: ScheduleConfig) -> jax.Array:
    """Warmup-stable-decay: 1, then linear to `final_fraction` over the last `decay_fraction` of the run."""
    progress = _progress(tokens, total_tokens * (1 - config.decay_fraction), total_tokens)
    return 1 - (1 - config.final_fraction) * progress


def constant(tokens: jax.typing.ArrayLike, total_tokens: int, config: ScheduleConfig) -> jax.Array:
    """1 throughout."""
    return jnp.ones_like(jnp.asarray(tokens, jnp.float32))


def batch_tokens_at(ramp: tuple[tuple[int, int], ...], tokens: int) -> int:
    """Tokens of the batch that is drawn after `tokens`: the last entry of the ramp that has begun."""
    return [size for start, size in ramp if start <= tokens][-1]


def planned_tokens(config: TrainConfig) -> int:
    """Tokens that the run will have seen at its end, at `steps` or `token_budget`, whichever comes first."""
    tokens, steps = 0, config.steps
    starts = [start for start, _ in config.ramp[1:]] + [config.token_budget]
    for (_, size), end in zip(config.ramp, starts, strict=True):
        end = min(end, config.token_budget)
        taken = min(steps, max(0, -(-(end - tokens) // size)))
        tokens, steps = tokens + taken * size, steps - taken
    return tokens


def _progress(tokens: jax.typing.ArrayLike, start: float, end: float) -> jax.Array:
    """Share of the way from `start` to `end`, within [0, 1]; a run that ends before `start` stays at 0."""
    return jnp.clip((jnp.asarray(tokens, jnp.float32) - float(start)) / float(max(end - start, 1)), 0.0, 1.0)
