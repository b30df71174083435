"""POST /v1/completions: text after text, and what the model thinks of a text (echo with logprobs)."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from gpt4moe.serve.answer import Answer, Asked, Piece, TokenScore
from gpt4moe.serve.continuations import continue_texts
from gpt4moe.serve.prompts import completion_prompts, engine_requests, sampling_of
from gpt4moe.serve.requests import CompletionRequest
from gpt4moe.serve.responses import Completion, CompletionChoice, CompletionLogprobs
from gpt4moe.serve.service import Service

DEFAULT_MAX_TOKENS = 16


async def complete(request: Request, service: Service) -> Response:
    """Answers one request."""
    return await continue_texts(request, service, CompletionRequest, _begin, _Reply)


def _begin(service: Service, body: CompletionRequest) -> Answer:
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    # A text is scored by reading it; the one token that is drawn after it is thrown away.
    without_tokens = max_tokens == 0
    with_scores = body.logprobs is not None
    sampling = sampling_of(
        body,
        max_new_tokens=max(max_tokens, 1),
        logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and with_scores,
    )
    prompts = completion_prompts(service, body)
    asked = Asked(bool(body.echo), without_tokens, bool(body.return_token_ids))
    return Answer(service.engine, prompts, engine_requests(service, body, prompts, sampling), asked)


class _Reply:
    """Says what an answer gains in OpenAI's words."""

    def __init__(self, service: Service, answer: Answer):
        self._service, self._answer = service, answer
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._offsets: dict[int, _Offset] = {}

    async def whole(self) -> Completion:
        pieces = await self._answer.whole()
        return self._completion([self._choice(piece) for piece in pieces], usage=self._answer.usage())

    async def chunks(self, with_usage: bool) -> AsyncIterator[Completion]:
        async for piece in self._answer.pieces():
            yield self._completion([self._choice(piece)])
        if with_usage:
            yield self._completion([], usage=self._answer.usage())

    def _completion(self, choices: list[CompletionChoice], usage=None) -> Completion:
        name = self._service.config.model_name
        return Completion(id=self._id, created=self._created, model=name, choices=choices, usage=usage)

    def _choice(self, piece: Piece) -> CompletionChoice:
        scores = piece.scores
        logprobs = None if scores is None else self._logprobs(piece.index, scores)
        return CompletionChoice(text=piece.text, logprobs=logprobs, **piece.told(self._answer.asked))

    def _logprobs(self, index: int, scores: list[TokenScore]) -> CompletionLogprobs:
        service, offset = self._service, self._offsets.setdefault(index, _Offset())
        top = [self._likeliest(score) for score in scores]
        return CompletionLogprobs(
            tokens=[service.token_name(score.id) for score in scores],
            token_logprobs=[score.logprob for score in scores],
            top_logprobs=top if any(top) else None,
            text_offset=[offset.step(service.token_bytes(score.id) or b"") for score in scores],
        )

    def _likeliest(self, score: TokenScore) -> dict[str, float] | None:
        """Of one place: the token that stands there is told too, as by OpenAI, where it is not among them."""
        if not score.top:
            return None
        told = {token: logprob for token, logprob in score.top} | {score.id: score.logprob}
        return {self._service.token_name(token): logprob for token, logprob in told.items()}


class _Offset:
    """Where in a text its tokens begin, in characters; what ends a character belongs to where it began."""

    def __init__(self):
        self._decoder, self._characters = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def step(self, data: bytes) -> int:
        """The place of the token with these bytes; they come in order."""
        begin = self._characters
        self._characters += len(self._decoder.decode(data))
        return begin
