"""How the next token is chosen, and when generation ends."""

from __future__ import annotations

import dataclasses

from gpt4moe.config.check import require_count, require_fraction, require_not_negative, require_positive, require_seed


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
        require_not_negative("temperature", self.temperature)
        if self.top_k is not None:
            require_count("top_k", self.top_k)
        require_fraction("top_p", self.top_p)
        require_positive("top_p", self.top_p)
        require_count("max_new_tokens", self.max_new_tokens)
        require_seed("seed", self.seed)
