"""Bodies in, answers out: JSON within limits, whole or as a stream; a caller that leaves frees its slots."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import anyio
import pydantic
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gpt4moe.serve.answer import Answer
from gpt4moe.serve.errors import ApiError, api_error

Body = TypeVar("Body", bound=pydantic.BaseModel)
Result = TypeVar("Result")
EVENTS_END = "data: [DONE]\n\n"


async def read_body(request: Request, kind: type[Body], max_bytes: int, seconds: float) -> Body:
    """The checked body; raises the refusal of one that is too large, too slow, not JSON or not what `kind` says."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(415, f"content-type {media_type!r} must be application/json", code="unsupported_media_type")
    try:
        with anyio.fail_after(seconds):
            data = await _read(request, max_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body had not come after {seconds:g} s", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the body ended early") from None
    return await anyio.to_thread.run_sync(kind.model_validate_json, data)


async def _read(request: Request, max_bytes: int) -> bytes:
    refusal = ApiError(413, f"the body must have at most {max_bytes} bytes", code="body_too_large")
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > max_bytes:
        raise refusal
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > max_bytes:
            raise refusal
    return bytes(data)


async def while_connected(request: Request, work: Callable[[], Awaitable[Result]]) -> Result:
    """The result of `work`, which is cancelled when the caller goes away."""
    result = []

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        tasks.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            result.append(await work())
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:  # of the one that failed
        raise group.exceptions[0] from None
    if not result:
        raise ApiError(499, "the caller went away")
    return result[0]


def json_response(answer: pydantic.BaseModel) -> Response:
    """One answer."""
    return Response(answer.model_dump_json(), media_type="application/json")


class EventStream(StreamingResponse):
    """Server-sent events, one a chunk and `[DONE]` at the end; an error on the way is the last event.

    However it ends, the answer is cancelled, so that its slots are free at the engine's next step.
    """

    def __init__(self, answer: Answer, chunks: AsyncIterator[pydantic.BaseModel]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(chunks), media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI side."""
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self._answer.cancel()


async def _events(chunks: AsyncIterator[pydantic.BaseModel]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield f"data: {chunk.model_dump_json()}\n\n"
    except Exception as error:
        told = api_error(error)
        if told.status >= 500:
            logging.getLogger(__name__).exception("a stream failed")
        yield f"data: {json.dumps(told.body())}\n\n"
    yield EVENTS_END
