"""A request while it is answered: its prompts in the engine, and what every continuation gains, piece by piece.

In: prompts and their engine requests. Out: `Piece`s of all continuations as they come, and the count of tokens.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence

import numpy as np

from gpt4moe.infer.engine.engine import Engine
from gpt4moe.infer.engine.handle import RequestHandle
from gpt4moe.infer.engine.request import Chunk, EngineRequest, PromptReport
from gpt4moe.serve.errors import FAULT, ApiError
from gpt4moe.serve.prompts import Prompt
from gpt4moe.serve.responses import Experts, PromptTokensDetails, Usage

Top = tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """A token, its log-probability (None: the first of all has none) and the likeliest instead of it."""

    id: int
    logprob: float | None
    top: Top


@dataclasses.dataclass(frozen=True)
class Asked:
    """How a caller wants continuations told: with the prompt before them, with none of their tokens, ..."""

    echo: bool = False
    without_tokens: bool = False
    token_ids: bool = False


@dataclasses.dataclass
class Piece:
    """What the choice `index` gained; joined, its pieces are all of it. The optional ones are None if nobody asked."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    scores: list[TokenScore] | None = None
    expert_ids: Experts | None = None
    prompt_ids: tuple[int, ...] | None = None
    prompt_expert_ids: Experts | None = None
    finish_reason: str | None = None

    def told(self, asked: Asked) -> dict:
        """The fields that a choice of a completion and one of a chat have in common."""
        return {
            "index": self.index,
            "finish_reason": self.finish_reason,
            "token_ids": list(self.token_ids) if asked.token_ids else None,
            "prompt_token_ids": None if self.prompt_ids is None else list(self.prompt_ids),
            "expert_ids": self.expert_ids,
            "prompt_expert_ids": self.prompt_expert_ids,
        }


class Answer:
    """Takes the requests into the engine, or none of them: raises as `Engine.submit` does.

    `cancel` must be called in the end, whatever happens: it frees the slots of what has not ended.
    """

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], requests: Sequence[EngineRequest], asked: Asked):
        self._prompts, self._requests, self.asked = prompts, requests, asked
        self._handles: list[RequestHandle] = []
        self._begun: set[int] = set()
        self._num_new = self._num_cached = 0
        try:
            for request in requests:
                self._handles.append(engine.submit(request))
        except Exception:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends what has not ended at the engine's next step."""
        for handle in self._handles:
            handle.cancel()

    def usage(self) -> Usage:
        """Tokens so far, every prompt counted once."""
        num_prompt = sum(len(prompt.ids) for prompt in self._prompts)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=self._num_new,
            total_tokens=num_prompt + self._num_new,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._num_cached),
        )

    async def pieces(self) -> AsyncIterator[Piece]:
        """What the choices gain, as it comes; choice i is continuation i % n of prompt i // n."""
        reports: dict[int, PromptReport] = {}
        held: dict[int, list[Chunk]] = {}  # until what they must begin with is known
        async for place, chunk in _merged(self._handles):
            if chunk.error is not None:
                raise ApiError(500, f"the model failed: {chunk.error}", FAULT, code="model_error")
            if chunk.prompt is not None:
                reports[place] = chunk.prompt
                self._num_cached += chunk.prompt.num_cached
            held.setdefault(place, []).append(chunk)
            if place in reports or not self._awaits_report(place):
                for ready in held.pop(place):
                    yield self._piece(place, ready, reports.get(place))

    async def whole(self) -> list[Piece]:
        """All of every choice, by index."""
        parts: dict[int, list[Piece]] = {}
        async for piece in self.pieces():
            parts.setdefault(piece.index, []).append(piece)
        return [_joined(parts[index]) for index in sorted(parts)]

    def _awaits_report(self, place: int) -> bool:
        request = self._requests[place]
        return request.with_expert_ids or request.sampling.prompt_logprobs

    def _piece(self, place: int, chunk: Chunk, report: PromptReport | None) -> Piece:
        sampling = self._requests[place].sampling
        piece = Piece(place * sampling.n + chunk.index, chunk.text, chunk.token_ids, finish_reason=chunk.finish_reason)
        piece.scores = (
            None if sampling.logprobs is None else _scores(chunk.token_ids, chunk.logprobs, chunk.top_logprobs)
        )
        if self._requests[place].with_expert_ids:
            piece.expert_ids = _as_lists(chunk.expert_ids_TLK)
        if self.asked.without_tokens:
            piece = Piece(piece.index, scores=None if piece.scores is None else [], finish_reason=piece.finish_reason)
            piece.finish_reason = "length" if piece.finish_reason == "stop" else piece.finish_reason
        self._num_new += len(piece.token_ids)
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            self._begin(piece, self._prompts[place], report)
        return piece

    def _begin(self, piece: Piece, prompt: Prompt, report: PromptReport | None) -> None:
        """Puts before the first piece of a choice what is told of its prompt."""
        shown = tuple(prompt.ids[prompt.num_hidden :])
        if self.asked.token_ids:
            piece.prompt_ids = tuple(prompt.ids)
        if report is not None and report.expert_ids_TLK is not None:
            piece.prompt_expert_ids = report.expert_ids_TLK.tolist()
        if self.asked.echo:
            piece.text, piece.token_ids = prompt.text + piece.text, shown + tuple(piece.token_ids)
            if piece.scores is not None:
                piece.scores = _prompt_scores(prompt, report) + piece.scores


def _prompt_scores(prompt: Prompt, report: PromptReport) -> list[TokenScore]:
    """Of the tokens that the caller gave; a prompt that ended before it was read has scores of a part of it."""
    missing = len(prompt.ids) - 1 - len(report.logprobs)
    logprobs = (None, *report.logprobs, *[None] * missing)
    top = None if report.top_logprobs is None else ((), *report.top_logprobs, *[()] * missing)
    hidden = prompt.num_hidden
    return _scores(prompt.ids[hidden:], logprobs[hidden:], None if top is None else top[hidden:])


def _scores(ids: Sequence[int], logprobs: Sequence[float | None], top: Sequence[Top] | None) -> list[TokenScore]:
    likeliest = [()] * len(ids) if top is None else top
    return [TokenScore(*of) for of in zip(ids, logprobs, likeliest, strict=True)]


def _as_lists(experts_TLK: np.ndarray | None) -> Experts:
    return [] if experts_TLK is None else experts_TLK.tolist()


def _joined(parts: Sequence[Piece]) -> Piece:
    first, last = parts[0], parts[-1]

    def all_of(name: str) -> list | None:
        of_parts = [getattr(part, name) for part in parts]
        return None if of_parts[0] is None else [item for of_part in of_parts for item in of_part]

    return dataclasses.replace(
        first,
        text="".join(part.text for part in parts),
        token_ids=tuple(all_of("token_ids")),
        scores=all_of("scores"),
        expert_ids=all_of("expert_ids"),
        finish_reason=last.finish_reason,
    )


async def _merged(handles: Sequence[RequestHandle]) -> AsyncIterator[tuple[int, Chunk]]:
    """Chunks of all handles as they come, each with the place of its handle."""
    streams = [aiter(handle) for handle in handles]
    waiting = {asyncio.ensure_future(anext(stream)): place for place, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.get):
                place = waiting.pop(task)
                try:
                    chunk = task.result()
                except StopAsyncIteration:
                    continue
                yield place, chunk
                waiting[asyncio.ensure_future(anext(streams[place]))] = place
    finally:
        for task in waiting:
            task.cancel()
