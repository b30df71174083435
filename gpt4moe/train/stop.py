"""Stopping on request: the first SIGINT or SIGTERM asks the loop to save and leave, a second one ends it at once."""

from __future__ import annotations

import signal
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, `requested` turns true at the first signal, which gives the handlers back to their owners.

    Signals reach only the main thread; entered in another one it waits for nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _request(self, *_: object) -> None:
        self.requested = True
        self.__exit__()
