"""The door of everything below /v1: the API key, the number of requests at a time, a server that is ending."""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt4moe.serve.errors import AUTHENTICATION, BUSY, ApiError, draining
from gpt4moe.serve.monitor import Traffic
from gpt4moe.serve.service import Service

RETRY_SECONDS = 1


class Gate:
    """ASGI middleware that counts a request as active until its last byte is sent."""

    def __init__(self, app: ASGIApp, service: Service, traffic: Traffic):
        self._app, self._service, self._traffic = app, service, traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI side; raises `ApiError` for whom it does not let in."""

        begun = False

        async def counting(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._traffic.count(scope["path"], message["status"])
            await send(message)

        service = self._service
        try:
            self._let_in(Headers(scope=scope))
        except ApiError as error:
            self._traffic.count(scope["path"], error.status)
            raise
        service.active += 1
        try:
            await self._app(scope, receive, counting)
        except Exception:
            if not begun:  # the outermost layer answers it
                self._traffic.count(scope["path"], 500)
            raise
        finally:
            service.active -= 1

    def _let_in(self, headers: Headers) -> None:
        service = self._service
        key = service.config.api_key
        if key is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # In constant time: how long a comparison takes must not tell how much of a key is right.
            fits = secrets.compare_digest(given.strip().encode("latin-1"), key.encode())  # bytes as they were sent
            if not fits or scheme.lower() != "bearer":
                wanted = {"WWW-Authenticate": "Bearer"}
                said = "give the server's API key as Authorization: Bearer KEY"
                raise ApiError(401, said, AUTHENTICATION, code="invalid_api_key", headers=wanted)
        if service.draining:
            raise draining()
        if service.active >= service.config.max_concurrent:
            retry = {"Retry-After": str(RETRY_SECONDS)}
            said = f"{service.active} requests are being answered, the most at a time; try again in {RETRY_SECONDS} s"
            raise ApiError(429, said, BUSY, code="too_many_requests", headers=retry)
