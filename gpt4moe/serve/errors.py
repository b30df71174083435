"""Refusals and faults in OpenAI's form: a status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import pydantic
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from gpt4moe.config.check import CallerError
from gpt4moe.infer.engine.request import EngineClosed, QueueFull
from gpt4moe.serve.requests import FIELDS

INVALID, AUTHENTICATION, BUSY, FAULT = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)
DRAIN_RETRY_SECONDS = 5
SETTING = re.compile(r"([\w ]+)=")
MAX_MESSAGE = 500


@dataclasses.dataclass
class ApiError(Exception):
    """A request that gets `status` and one line instead of an answer; `param` is the field that is at fault."""

    status: int
    message: str
    kind: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict:
        """What is sent: also in a stream that has begun."""
        message = self.message if len(self.message) <= MAX_MESSAGE else self.message[:MAX_MESSAGE] + "..."
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}


def api_error(error: Exception) -> ApiError:
    """What a request is told of an error."""
    match error:
        case ApiError():
            return error
        case pydantic.ValidationError():
            return _invalid_fields(error)
        case QueueFull():
            retry = {"Retry-After": str(max(1, round(error.retry_after_seconds)))}
            return ApiError(429, f"the queue is full: {error}", BUSY, code="queue_full", headers=retry)
        case EngineClosed():
            return draining()
        case CallerError():
            setting = SETTING.match(str(error))
            return ApiError(400, str(error), param=setting and setting[1])
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "the server failed; its log says how", FAULT, code="internal_error")


def draining() -> ApiError:
    """The answer of a server that is about to end."""
    retry = {"Retry-After": str(DRAIN_RETRY_SECONDS), "Connection": "close"}
    return ApiError(503, "the server is shutting down", FAULT, code="shutting_down", headers=retry)


async def respond(request: Request, error: Exception) -> JSONResponse:
    """The response to a request whose handler raised."""
    answer = api_error(error)
    return JSONResponse(answer.body(), answer.status, answer.headers)


def _nearness(found: Mapping) -> tuple:
    """The further a form of a field was understood, the likelier it was meant."""
    is_type = found["type"].endswith("_type")
    return found["type"] == "extra_forbidden", not is_type or len(found["loc"]) == 1, len(found["loc"])


def _invalid_fields(error: pydantic.ValidationError) -> ApiError:
    """One of all that is wrong; where a field may have several forms, what keeps it from the one it is closest to."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    found = max(errors, key=_nearness)
    is_extra = found["type"] == "extra_forbidden"
    # Inside a union the path also names which of its members was tried.
    path = [str(part) for part in found["loc"][: -1 if is_extra else None] if isinstance(part, int) or part in FIELDS]
    if is_extra:
        where = ".".join([*path, str(found["loc"][-1])])
        return ApiError(400, f"unknown or unsupported parameter: {where}", param=where, code="unsupported_parameter")
    where, said = ".".join(path) or None, found["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{where}: {said}" if where else said, param=where, code=found["type"])
