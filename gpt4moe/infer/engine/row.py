"""One continuation while it is made: its tokens, how far they are read, where they lie, what has been told of them."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from gpt4moe.infer.codec import Codec
from gpt4moe.infer.engine.constraint import Constraint
from gpt4moe.infer.engine.handle import RequestHandle
from gpt4moe.infer.engine.pool import page_names
from gpt4moe.infer.engine.request import Chunk, EngineRequest, PromptReport
from gpt4moe.infer.engine.text import TextStream
from gpt4moe.infer.speculative import Lookup

Top = tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class NewToken:
    """A token that was drawn and what is reported of it, each None where nobody asks."""

    id: int
    logprob: float | None = None
    top: Top | None = None
    experts_LK: np.ndarray | None = None


class Row:
    """`ids` are prompt and continuation, the first `num_read` of which lie in `pages`; `slot` is None while it waits.

    `num_shared` of those read were read for others; the first `num_published` pages others may find. A row with one
    token to read takes part in decode steps, one with more is read in chunks first.
    """

    def __init__(
        self,
        handle: RequestHandle,
        index: int,
        arrival: int,
        max_new: int,
        tokenizer: Codec,
        now: float,
        constraint: Constraint | None = None,
    ):
        self.handle, self.request, self.index, self.arrival = handle, handle.request, index, arrival
        self.sampling = self.request.sampling
        self.ids = list(self.request.prompt_ids)
        self.num_prompt, self.max_new = len(self.ids), max_new
        self.num_read = 0
        self.pages: list[int] = []
        self.num_published = self.num_shared = 0
        self._most_cached = self.num_prompt
        self.slot: int | None = None
        self.finish_reason: str | None = None
        self.has_run = False
        self.submitted_at = self.last_token_at = now
        self.lookup, self.constraint = Lookup(), constraint
        self.prompt = _PromptRecord(self.request) if index == 0 else None
        self.image_index_T = None
        if self.request.pictures:
            self.image_index_T = np.cumsum(np.asarray(self.ids) == tokenizer.image).astype(np.int32) - 1
        self._names: list[bytes] = []
        self._seen = _digests(self.request, tokenizer)
        self._text = TextStream(tokenizer, self.sampling.stop)
        self._ends = {*self.sampling.stop_ids}
        self._ends |= set() if self.sampling.ignore_end_of_text else {tokenizer.end_of_text}
        self._pending: list[NewToken] = []

    @property
    def priority(self) -> tuple[int, int]:
        """Rows are served in ascending order of this."""
        return -self.request.priority, self.arrival

    @property
    def num_new(self) -> int:
        """Tokens drawn so far."""
        return len(self.ids) - self.num_prompt

    @property
    def num_unread(self) -> int:
        """Tokens that are known and not in the pages yet."""
        return len(self.ids) - self.num_read

    @property
    def num_cached(self) -> int:
        """Tokens of the prompt that were never read for this row."""
        return min(self.num_shared, self._most_cached)

    def give_way(self) -> None:
        """The row is about to lose its pages: what it has read and finds again later was not read for others."""
        if self.num_read > self.num_shared:
            self._most_cached = self.num_cached

    @property
    def reads_alone(self) -> bool:
        """Whether every token of the prompt must be read for this row, though its pages may be there already."""
        return self.request.replay_ids_TLK is not None or (self.prompt is not None and self.prompt.wanted)

    @property
    def shares(self) -> bool:
        """Whether other rows may use what it has read: not where experts were forced."""
        return self.request.replay_ids_TLK is None

    def names(self, page_size: int) -> list[bytes]:
        """The names of all full pages of `ids`."""
        self._names += page_names(self.ids, page_size, self._seen, self._names)
        return self._names

    def seen_at(self, start: int, length: int) -> np.ndarray:
        """The picture that each token from `start` on sees last; all behind the prompt see what its last token does."""
        places = np.minimum(np.arange(start, start + length), self.num_prompt - 1)
        return self.image_index_T[places]

    def add(self, token: NewToken, now: float) -> Chunk | None:
        """One more token; returns what there is to tell, and sets `finish_reason` with the last."""
        self.ids.append(token.id)
        self.last_token_at = now
        self._pending.append(token)
        if self.constraint is not None and (problem := self.constraint.accept(token.id)):
            return self._chunk(self._text.finish(), "error", problem)
        if token.id in self._ends:  # and is not part of the text
            return self._chunk(self._text.finish(), "stop")
        text = self._text.push([token.id])
        if self._text.ended or (self.constraint is not None and self.constraint.ended):
            return self._chunk(text + self._text.finish(), "stop")
        if self.num_new >= self.max_new:
            return self._chunk(text + self._text.finish(), "length")
        return self._chunk(text, None) if text else None

    def end(self, reason: str, error: str | None = None) -> Chunk:
        """Ends the row before its time; returns what there is left to tell."""
        return self._chunk(self._text.finish(), reason, error)

    def replayed(self, start: int, stop: int) -> np.ndarray | None:
        """The experts to force on the tokens at positions start .. stop - 1, as far as there are any."""
        given = self.request.replay_ids_TLK
        return None if given is None else given[start:stop]

    def _chunk(self, text: str, reason: str | None, error: str | None = None) -> Chunk:
        tokens, self._pending, self.finish_reason = self._pending, [], reason
        sampling, experts = self.sampling, [token.experts_LK for token in tokens if token.experts_LK is not None]
        prompt, self.prompt = (None if self.prompt is None else self.prompt.report(self.num_cached)), None
        return Chunk(
            index=self.index,
            text=text,
            token_ids=tuple(token.id for token in tokens),
            logprobs=None if sampling.logprobs is None else tuple(token.logprob for token in tokens),
            top_logprobs=tuple(token.top for token in tokens) if sampling.logprobs else None,
            expert_ids_TLK=np.stack(experts) if experts else None,
            finish_reason=reason,
            error=error,
            prompt=prompt,
        )


class _PromptRecord:
    """What is gathered of a prompt while it is read."""

    def __init__(self, request: EngineRequest):
        self.scores = request.sampling.prompt_logprobs
        self.experts = request.with_expert_ids
        self._with_top = bool(request.sampling.logprobs)
        self._logprobs: list[float] = []
        self._top: list[Top] = []
        self._experts: list[np.ndarray] = []

    @property
    def wanted(self) -> bool:
        """Whether anybody asks."""
        return self.scores or self.experts

    def add(self, start: int, logprobs: list[float], top: list[Top], experts_TLK: np.ndarray | None) -> None:
        """What the tokens from `start` on gave, in the place of what they gave before a row had to give way."""
        self._logprobs[start:] = logprobs
        self._top[start:] = top
        if experts_TLK is not None:
            self._experts[start:] = list(experts_TLK)

    def report(self, num_cached: int) -> PromptReport:
        """All of it."""
        return PromptReport(
            num_cached=num_cached,
            logprobs=tuple(self._logprobs) if self.scores else None,
            top_logprobs=tuple(self._top) if self.scores and self._with_top else None,
            expert_ids_TLK=np.stack(self._experts) if self._experts else None,
        )


def _digests(request: EngineRequest, tokenizer: Codec) -> list[tuple[int, bytes]]:
    """The place of each picture's token in the prompt and what the picture is, in a few bytes."""
    if not request.pictures:
        return []
    places = [place for place, token in enumerate(request.prompt_ids) if token == tokenizer.image]
    seen = [picture.pixels.tobytes() + picture.valid.tobytes() for picture in request.pictures]
    return [(place, hashlib.blake2b(held, digest_size=16).digest()) for place, held in zip(places, seen, strict=True)]
