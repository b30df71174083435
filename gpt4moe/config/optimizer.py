"""How parameters are updated: AdamW, clipping, and the learning-rate schedule in tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from gpt4moe.config.check import (
    require,
    require_count,
    require_fraction,
    require_instance,
    require_not_negative,
    require_positive,
    require_texts,
)

NOT_FROZEN = "!"


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

    Patterns are globs over the dotted paths of parameters, as `gpt4moe inspect --paths` lists them, and `*` goes
    across dots: `blocks.*`, `*.router`, `embedding`. What `frozen` matches stays as it is: no gradient, no optimizer
    state, no decay. `!pattern` takes out again what stands before it, and the last match decides: `["*",
    "!cross_attention.*"]` trains cross-attention alone. `rate_scales` is a dict of patterns and factors of the
    schedule's learning rate, with which all of a parameter's update is scaled; the first match decides.
    """

    learning_rate: float
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    build: Callable | None = None
    frozen: tuple[str, ...] = ()
    rate_scales: tuple[tuple[str, float], ...] = ()

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
        require_instance("schedule", self.schedule, ScheduleConfig)
        require(self.build is None or callable(self.build), "build", self.build, "must be a function or None")
        object.__setattr__(self, "frozen", require_texts("frozen", self.frozen))
        begins = not self.frozen or not self.frozen[0].startswith(NOT_FROZEN)
        require(begins, "frozen", self.frozen, "begins with an exception, of nothing", "put '*' before it")
        object.__setattr__(self, "rate_scales", _factors(self.rate_scales))

    def trains(self, name: str) -> bool:
        """Whether the parameter of this dotted path is trained: the last pattern of `frozen` that matches decides."""
        matching = [pattern for pattern in self.frozen if fnmatchcase(name, pattern.removeprefix(NOT_FROZEN))]
        return not matching or matching[-1].startswith(NOT_FROZEN)

    def rate_pattern(self, name: str) -> str | None:
        """The first pattern of `rate_scales` that matches the parameter of this dotted path, None if none does."""
        return next((pattern for pattern, _ in self.rate_scales if fnmatchcase(name, pattern)), None)

    def rate_scale(self, name: str) -> float:
        """The factor of the schedule's learning rate for the parameter of this dotted path."""
        return dict(self.rate_scales).get(self.rate_pattern(name), 1.0)


def _factors(given: object) -> tuple[tuple[str, float], ...]:
    form, example = "must be a dict from patterns to factors", 'e.g. {"embedding": 0.1}'
    require(isinstance(given, (Mapping, list, tuple)), "rate_scales", given, form, example)
    pairs = list(given.items() if isinstance(given, Mapping) else given)
    paired = all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
    require(paired, "rate_scales", given, form, example)
    patterns = require_texts("rate_scales", [pattern for pattern, _ in pairs])
    require(len(set(patterns)) == len(patterns), "rate_scales", patterns, "must name every pattern once")
    for pattern, factor in pairs:
        require_positive(f"rate_scales[{pattern!r}]", factor)
    return tuple((pattern, float(factor)) for pattern, factor in pairs)
