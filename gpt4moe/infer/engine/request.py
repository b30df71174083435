"""What goes into the engine and what comes out: requests, chunks of their continuations, refusals, counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from gpt4moe.config.check import require, require_count, require_positive, require_text
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.pictures import Picture

FINISH_REASONS = ("stop", "length", "cancelled", "deadline", "error")


class QueueFull(RuntimeError):
    """The engine refuses a request for now: its queue is full. `retry_after_seconds` is when to try again, at least."""

    def __init__(self, waiting: int, retry_after_seconds: float):
        super().__init__(f"{waiting} requests are waiting; try again in {retry_after_seconds:.0f} s")
        self.retry_after_seconds = retry_after_seconds


class EngineClosed(RuntimeError):
    """The engine takes no more requests: it is draining, or closed."""


@dataclasses.dataclass(frozen=True, eq=False)
class EngineRequest:
    """One prompt and how to continue it.

    `prompt_ids` are all its tokens, with the end-of-text that begins a document and one image token a picture.
    A higher `priority` is served first; one that waits or runs longer than `deadline_seconds` is ended. `draw` is
    which of the draws of `sampling.seed` the first continuation takes; the n-th takes `draw` + n. `with_expert_ids`
    reports the experts that every token was routed to; `replay_ids_TLK` forces those of the tokens at positions
    0, 1, ..., of prompt and continuation (-1: none, `decoder.FREE`: the router's own, as of the tokens after them).
    """

    prompt_ids: Sequence[int]
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    pictures: Sequence[Picture] = ()
    priority: int = 0
    deadline_seconds: float | None = None
    request_id: str | None = None
    draw: int = 0
    with_expert_ids: bool = False
    replay_ids_TLK: np.ndarray | None = None

    def __post_init__(self) -> None:
        require(len(self.prompt_ids) > 0, "prompt_ids", [], "must hold a token", "begin with end-of-text")
        object.__setattr__(self, "prompt_ids", tuple(map(int, self.prompt_ids)))
        require_count("priority", self.priority, least=-(2**31))
        require_count("draw", self.draw, least=0)
        require(self.draw + self.sampling.n <= 2**31, "draw", self.draw, "plus n must be at most 2**31")
        if self.deadline_seconds is not None:
            require_positive("deadline_seconds", self.deadline_seconds)
        require_text("request_id", self.request_id)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptReport:
    """A prompt of T tokens once it is read; what may be asked about it is None where it was not.

    `num_cached` of its tokens were not read for this request: their keys and values were there already. `logprobs`
    (nats) are those of its tokens after the first, T - 1 of them; `top_logprobs` the likeliest instead of each.
    `expert_ids_TLK` int32 [T, L, K] has the experts of every token, -1 for none.
    """

    num_cached: int = 0
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    expert_ids_TLK: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """What one continuation gained: whole characters, and the tokens drawn since its last chunk.

    `index` is which of the n. `text` may lag behind `token_ids`: the bytes of half a character, and what may become a
    stop text, wait for the next chunk. Of each token: `logprobs` (nats, under the model's own distribution),
    `top_logprobs`, pairs of id and log-probability from the likeliest down, and `expert_ids_TLK` int32 [tokens, L, K],
    the experts of the token before it, whose pass it was drawn from; each None where it was not asked for.
    `finish_reason` ends the continuation: "stop" (end-of-text, a stop text or id), "length", "cancelled", "deadline"
    or "error", which `error` tells of. `prompt` comes with the first chunk of index 0.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    expert_ids_TLK: np.ndarray | None = None
    finish_reason: str | None = None
    error: str | None = None
    prompt: PromptReport | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Continuation:
    """All the chunks of one continuation joined; the fields are theirs."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None
    expert_ids_TLK: np.ndarray | None
    finish_reason: str
    error: str | None
    prompt: PromptReport | None


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts of values in seconds: `counts[i]` are above `bounds[i - 1]`, at most `bounds[i]`; the last above all."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total_seconds: float

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)


@dataclasses.dataclass(frozen=True, eq=False)
class EngineMetrics:
    """A snapshot; counts are since the engine began.

    Of pages: `used` by running rows, `cached` ones hold what ended rows left and may be taken at any time, the rest of
    `num_pages` is empty. `finished` counts continuations by reason. `expert_load_LE` int64 counts the tokens that each
    expert of each layer got, `distinct_experts_L` the mean number of experts that a decode step touched in each layer,
    and `last_distinct_experts_L` those of the last step. `proposed_tokens` and `accepted_tokens` are of speculation.
    `late_compilations` counts programs compiled after the warm-up: 0 in good order.
    """

    queued: int
    running: int
    slots: int
    num_pages: int
    pages_used: int
    pages_cached: int
    submitted: int
    rejected: int
    finished: Mapping[str, int]
    prompt_tokens: int
    cached_prompt_tokens: int
    new_tokens: int
    prefill_steps: int
    decode_steps: int
    preemptions: int
    proposed_tokens: int
    accepted_tokens: int
    late_compilations: int
    time_to_first_token: Histogram
    inter_token: Histogram
    queue_wait: Histogram
    expert_load_LE: np.ndarray
    distinct_experts_L: np.ndarray
    last_distinct_experts_L: np.ndarray
