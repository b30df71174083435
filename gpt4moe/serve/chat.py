"""POST /v1/chat/completions: the next turn of a chat of texts and images."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from gpt4moe.infer.pictures import Picture
from gpt4moe.serve.answer import Answer, Asked, Piece, TokenScore
from gpt4moe.serve.chat_template import IMAGE, Marks
from gpt4moe.serve.continuations import continue_texts
from gpt4moe.serve.errors import ApiError
from gpt4moe.serve.image_urls import read_image
from gpt4moe.serve.prompts import Prompt, check_characters, check_length, engine_requests, sampling_of
from gpt4moe.serve.requests import ChatRequest, Message, PlainFormat, TextPart
from gpt4moe.serve.responses import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    TokenLogprob,
    TopLogprob,
)
from gpt4moe.serve.service import Service

# Characters: the library takes seconds to prepare a schema of hundreds of thousands, and nothing else runs meanwhile.
MAX_SCHEMA = 50_000
ANY_OBJECT = '{"type": "object"}'


async def chat(request: Request, service: Service) -> Response:
    """Answers one request."""
    return await continue_texts(request, service, ChatRequest, _begin, _Reply)


def _begin(service: Service, body: ChatRequest) -> Answer:
    prompt = chat_prompt(service, body.messages)
    sampling = sampling_of(
        body,
        max_new_tokens=body.max_completion_tokens or body.max_tokens or service.engine.max_length,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        template_stops=service.template.stops,
        json_schema=_schema(body),
    )
    asked = Asked(token_ids=bool(body.return_token_ids))
    return Answer(service.engine, [prompt], engine_requests(service, body, [prompt], sampling), asked)


def chat_prompt(service: Service, messages: list[Message]) -> Prompt:
    """The turns by the template, with special tokens where the template writes them and images where they stand."""
    tokenizer, pictures = service.tokenizer, []
    marks = Marks(list(tokenizer.specials))
    turns = [
        {"role": _role(message), "content": _content(service, message, place, marks, pictures)}
        for place, message in enumerate(messages)
    ]
    ids: list[int] = []
    for piece in service.template.render(turns, marks):
        if isinstance(piece, str):
            ids += tokenizer.encode(piece)
        else:
            ids.append(tokenizer.image if piece.name == IMAGE else tokenizer.specials[piece.name])
    if not ids:
        raise ApiError(400, "messages give an empty prompt with this chat template", param="messages")
    check_length(service, len(ids), "messages")
    return Prompt(ids, "", pictures=tuple(pictures))


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role


def _content(service: Service, message: Message, place: int, marks: Marks, pictures: list[Picture]) -> str:
    """The text of a message, with a mark for each of its images, which are added to `pictures`."""
    if isinstance(message.content, str):
        check_characters(service, message.content, f"messages.{place}.content")
        return marks.guard(message.content)
    texts = []
    for part in message.content:
        if isinstance(part, TextPart):
            check_characters(service, part.text, f"messages.{place}.content")
            texts.append(marks.guard(part.text))
        else:
            most = service.engine.config.max_pictures
            if len(pictures) == most:
                raise ApiError(400, f"messages hold more than {most} images; send fewer", param="messages")
            pictures.append(read_image(service, part.image_url.url))
            texts.append(marks.image)
    return "".join(texts)


def _schema(body: ChatRequest) -> str | None:
    wanted = body.response_format
    if wanted is None:
        return None
    if isinstance(wanted, PlainFormat):
        return ANY_OBJECT if wanted.type == "json_object" else None
    schema = json.dumps(wanted.json_schema.schema_)
    if len(schema) > MAX_SCHEMA:
        said = f"response_format.json_schema.schema has {len(schema)} characters, at most {MAX_SCHEMA}; make it smaller"
        raise ApiError(400, said, param="response_format")
    return schema


class _Reply:
    """Says what an answer gains in OpenAI's words."""

    def __init__(self, service: Service, answer: Answer):
        self._service, self._answer = service, answer
        self._named = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.config.model_name,
        }

    async def whole(self) -> ChatCompletion:
        choices = [
            ChatChoice(message=AnswerMessage(content=piece.text), **self._common(piece))
            for piece in await self._answer.whole()
        ]
        return ChatCompletion(**self._named, choices=choices, usage=self._answer.usage())

    async def chunks(self, with_usage: bool) -> AsyncIterator[ChatChunk]:
        begun: set[int] = set()
        async for piece in self._answer.pieces():
            role = None if piece.index in begun else "assistant"
            begun.add(piece.index)
            choice = ChatChunkChoice(delta=Delta(role=role, content=piece.text), **self._common(piece))
            yield ChatChunk(**self._named, choices=[choice], usage=None)
        if with_usage:
            yield ChatChunk(**self._named, choices=[], usage=self._answer.usage())

    def _common(self, piece: Piece) -> dict:
        scores = piece.scores
        logprobs = None if scores is None else ChatLogprobs(content=[self._score(score) for score in scores])
        return {"logprobs": logprobs, **piece.told(self._answer.asked)}

    def _score(self, score: TokenScore) -> TokenLogprob:
        top = [TopLogprob(**self._named_token(token), logprob=logprob) for token, logprob in score.top]
        return TokenLogprob(**self._named_token(score.id), logprob=score.logprob, top_logprobs=top)

    def _named_token(self, token: int) -> dict:
        data = self._service.token_bytes(token)
        return {"token": self._service.token_name(token), "bytes": None if data is None else list(data)}
