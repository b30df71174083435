"""How the engine of continuous batching is laid out: rows, pages of the cache, prompts read at once, the queue."""

from __future__ import annotations

import dataclasses

from gpt4moe.config.check import require, require_count, require_flag

MIN_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an `Engine`; every compiled program follows from them.

    `slots` continuations are decoded at once. Keys and values lie in `num_pages` pages of `page_size` tokens each;
    None is as many as fit in `cache_bytes`, and where that is None too, enough for every slot at `max_length`, the
    most tokens of prompt and continuation together (None: the model's context). A prompt is read in chunks of at most
    `prefill_chunk` tokens, one chunk between two decode steps, in lengths that are powers of two. `max_queue` requests
    may wait; one more is refused. `max_logprobs` bounds the likeliest tokens reported besides the one drawn,
    `max_pictures` those of one request. `prefix_caching` keeps the pages of prompts and continuations that have ended
    and shares them with requests that begin alike. `deterministic` decodes in float32 by one lowering at one shape,
    so that a request gives the same tokens whatever else is in the batch. `replay` lets requests force the experts of
    their tokens. At most `draft_tokens` are proposed to a row in a step, by a smaller model or by its own text, and
    judged by one pass (speculative decoding); 0 proposes none.
    """

    slots: int = 8
    page_size: int = 16
    num_pages: int | None = None
    cache_bytes: int | None = None
    max_length: int | None = None
    prefill_chunk: int = 256
    max_queue: int = 256
    max_logprobs: int = 20
    max_pictures: int = 4
    prefix_caching: bool = True
    deterministic: bool = False
    replay: bool = False
    draft_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("slots", "max_queue", "max_pictures"):
            require_count(name, getattr(self, name))
        for name in ("max_logprobs", "draft_tokens"):
            require_count(name, getattr(self, name), least=0)
        for name, least in (("page_size", 1), ("prefill_chunk", MIN_CHUNK)):
            value = getattr(self, name)
            require_count(name, value, least)
            require(value & (value - 1) == 0, name, value, "must be a power of two")
        for name in ("num_pages", "cache_bytes", "max_length"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))
        both = self.num_pages is not None and self.cache_bytes is not None
        require(
            not both, "num_pages", self.num_pages, f"goes without cache_bytes ({self.cache_bytes})", "leave one out"
        )
        for name in ("prefix_caching", "deterministic", "replay"):
            require_flag(name, getattr(self, name))
