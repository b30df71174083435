"""How parameters are updated: AdamW, clipping, and the learning-rate schedule in tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from gpt4moe.config.check import require, require_count, require_fraction, require_not_negative, require_positive


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a fraction of its peak, over tokens: linear warm-up, then `shape` down to `final_fraction`.

    `shape` is a function behind the contract of `gpt4moe.train.schedule` (None: cosine). `decay_fraction` is the
    share of the run that a warmup-stable-decay shape spends decaying.
    """

    warmup_tokens: int = 0
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    shape: Callable | None = None

    def __post_init__(self) -> None:
        require_count("warmup_tokens", self.warmup_tokens, least=0)
        require_fraction("final_fraction", self.final_fraction)
        require_fraction("decay_fraction", self.decay_fraction)
        require(self.shape is None or callable(self.shape), "shape", self.shape, "must be a function or None")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter) with global-norm clipping; matrices decay, norms and vectors do not.

    `build` is a function of the user's own, `build(learning_rate, config) -> optax.GradientTransformation`
    (None: AdamW). `clip_norm` None disables clipping.
    """

    learning_rate: float
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    build: Callable | None = None

    def __post_init__(self) -> None:
        require_positive("learning_rate", self.learning_rate)
        require(self.learning_rate < 1000, "learning_rate", self.learning_rate, "must be below 1000")
        for name in ("b1", "b2"):
            require_fraction(name, getattr(self, name))
            # AdamW divides by 1 - b^t: at 1 every parameter becomes infinite in the first step.
            require(getattr(self, name) < 1, name, getattr(self, name), "must be below 1")
        require_positive("epsilon", self.epsilon)
        require_not_negative("weight_decay", self.weight_decay)
        if self.clip_norm is not None:
            require_positive("clip_norm", self.clip_norm)
        require(self.build is None or callable(self.build), "build", self.build, "must be a function or None")
