"""How the next token is chosen, and when generation ends."""

from __future__ import annotations

import dataclasses
import math

from gpt4moe.config.check import require, require_count, require_fraction, require_positive


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Temperature, then top-k, then top-p (nucleus), in that order; temperature 0 is greedy.

    `top_k` None and `top_p` 1 keep the whole distribution. `max_new_tokens` counts the end-of-text token where one
    is produced. `seed` fixes the draws: a prompt's text depends on the seed and on its place in the batch, not on
    what else is in the batch.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.temperature, (int, float)) and not isinstance(self.temperature, bool)
        require(
            number and math.isfinite(self.temperature) and self.temperature >= 0,
            "temperature",
            self.temperature,
            "must be a finite number of at least 0",
            "use 0 for greedy decoding",
        )
        if self.top_k is not None:
            require_count("top_k", self.top_k)
        require_fraction("top_p", self.top_p)
        require_positive("top_p", self.top_p)
        require_count("max_new_tokens", self.max_new_tokens)
        seed_fits = isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed < 2**32
        require(seed_fits, "seed", self.seed, "must be an integer from 0 to 2**32 - 1")
