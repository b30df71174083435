"""A caller that speaks ASGI to the application itself, and leaves when the test says so."""

import asyncio


class Caller:
    """Sends a request whose body has these parts, and then nothing; `sent` is what the application answers."""

    def __init__(self, app, path, parts):
        self._app, self._parts, self.gone, self.sent = app, list(parts), asyncio.Event(), []
        self._scope = {
            **{"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""},
            **{"headers": [(b"content-type", b"application/json")], "root_path": "", "scheme": "http"},
            **{"asgi": {"spec_version": "2.3"}, "server": ("test", 80)},
        }

    async def call(self):
        await self._app(self._scope, self._receive, self._send)

    async def _receive(self):
        if self._parts:
            return {"type": "http.request"} | self._parts.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        self.sent.append(message)
