"""`gpt4moe serve`: listens, serves, and on SIGTERM or Ctrl-C lets the requests that run end before it does."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable

import anyio
import uvicorn

from gpt4moe.config.check import CallerError
from gpt4moe.config.serve import ServeConfig
from gpt4moe.serve.app import make_app
from gpt4moe.serve.service import Service

# For the bytes of answers that are complete to leave.
FLUSH_SECONDS = 10


def bind(config: ServeConfig) -> socket.socket:
    """A socket at the address, which does not listen yet; raises `CallerError` where the address cannot be had."""
    bound = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((config.host, config.port))
    except (OSError, UnicodeError) as error:
        bound.close()
        said = getattr(error, "strerror", None) or str(error)
        raise CallerError(f"host={config.host!r}, port={config.port} cannot be listened on: {said}") from None
    return bound


def address(listening: socket.socket) -> str:
    """The URL of a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(service: Service, listening: socket.socket, progress: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT; then requests that run may end, for `drain_seconds`, and new ones get 503.

    A second signal ends them at once, and so does a fault that the engine's thread could not recover from: `fault` of
    the engine tells. progress: called with a line of text.
    """
    service.engine.run_in_thread()
    try:
        DrainingServer(service, progress).run([listening])
    finally:
        service.engine.close()


class DrainingServer(uvicorn.Server):
    """uvicorn, but it goes on listening while it drains, so that callers are told and not cut off."""

    def __init__(self, service: Service, progress: Callable[[str], None]):
        config = uvicorn.Config(
            make_app(service),
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        super().__init__(config)
        self._service, self._progress = service, progress
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: object) -> None:
        """A signal: the first drains, the second hurries. It is not raised again: this is an end in good order."""
        seconds = 0.0 if self._service.draining else self._service.config.drain_seconds
        self._service.draining = True
        self._deadline = time.monotonic() + seconds
        name, running = signal.Signals(sig).name, self._service.active
        self._progress(f"{name}: no new requests; {running} running ones have {seconds:g} s to end")

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        if self._service.engine.fault is not None:
            self._service.draining = True
            return True
        if self._deadline is not None:
            if self._service.active == 0:
                return True
            if time.monotonic() >= self._deadline:
                await anyio.to_thread.run_sync(self._service.engine.close)
                return True
        return await super().on_tick(counter)
