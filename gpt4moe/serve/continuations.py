"""What requests for completions and for chats go through alike, from the body to the last event."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

import anyio
import pydantic
from starlette.requests import Request
from starlette.responses import Response

from gpt4moe.serve.answer import Answer
from gpt4moe.serve.exchange import Body, EventStream, json_response, read_body, while_connected
from gpt4moe.serve.model_names import check_model
from gpt4moe.serve.service import Service


class Reply(Protocol):
    """Says what an answer gains in the words of one kind of request."""

    async def whole(self) -> pydantic.BaseModel: ...

    def chunks(self, with_usage: bool) -> AsyncIterator[pydantic.BaseModel]: ...


async def continue_texts(
    request: Request,
    service: Service,
    kind: type[Body],
    begin: Callable[[Service, Body], Answer],
    reply_of: Callable[[Service, Answer], Reply],
) -> Response:
    """Answers a request whose body is of `kind`: whole, or as a stream where it says so."""
    body = await read_body(request, kind, service.config.max_body_bytes, service.config.body_seconds)
    check_model(service, body.model)
    answer = await anyio.to_thread.run_sync(begin, service, body)
    reply = reply_of(service, answer)
    if body.stream:
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return EventStream(answer, reply.chunks(with_usage))
    try:
        return json_response(await while_connected(request, reply.whole))
    finally:
        answer.cancel()
