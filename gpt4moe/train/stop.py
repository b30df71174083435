"""Stopping on request: the first SIGINT or SIGTERM asks the loop to save and leave, a second one ends it at once.

Of several processes any one may be asked, and all stop after the same step: JAX's preemption service, which has a
handler for SIGTERM of its own, agrees on it. There a second signal changes nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, `agreed` turns true after the first signal, which gives the handlers back to their owners.

    Signals reach only the main thread; entered in another one it waits for nothing.
    """

    def __init__(self, signals: Sequence[int] = SIGNALS) -> None:
        self._signals = signals
        self._requested = False
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether this process has been asked."""
        return self._requested

    def agreed(self, step: int) -> bool:
        """Whether every process stops after `step`; to be asked by all of them after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.process_count() > 1:
            self._previous = {signal.SIGINT: signal.signal(signal.SIGINT, _hand_on)}
        else:
            self._previous = {number: signal.signal(number, self._request) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _request(self, *_: object) -> None:
        self._requested = True
        self.__exit__()


def _hand_on(*_: object) -> None:
    """Makes of a SIGINT the SIGTERM that the preemption service waits for."""
    signal.raise_signal(signal.SIGTERM)
