"""Heartbeats of a job: a process that dies, hangs or fails ends all of them within a bounded time, with one reason.

Every process posts that it lives, and how long its work has been at the same place, to the key-value store of the JAX
coordinator, which is in process 0. Process 0 watches all, the others watch process 0: the load grows with their number,
not with its square. Ending means `_exit`: a collective that waits for a dead process cannot be interrupted in any other
way.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
import time
from typing import Any, Protocol

FAULT = 1
VERDICT, PROCESSES = "gpt4moe/verdict/", "gpt4moe/process/"
START_MS = 300_000
# A beat every so many of the allowed silence, but not more often than needed.
BEATS_IN_SILENCE, LONGEST_INTERVAL = 10, 2.0
# Beats that process 0 outlives its verdict, so that the others can read it: the store dies with process 0.
LINGER_BEATS = 4


class KeyValueStore(Protocol):
    """The part of JAX's distributed client that is used here."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


class Watch:
    """Beats for this process and ends it, by exit code and a line on stderr, when another has fallen silent or failed.

    silence: seconds without a beat after which a process counts as gone. stall: seconds without a `mark` after which
    one that beats counts as hanging. prefix: begins the line.
    """

    def __init__(
        self, store: KeyValueStore, process: int, num_processes: int, *, silence: float, stall: float, prefix: str
    ) -> None:
        self._store, self._process = store, process
        self._silence, self._stall, self._prefix = silence, stall, prefix
        self._at, self._since = "its beginning", time.monotonic()
        self._interval = min(silence / BEATS_IN_SILENCE, LONGEST_INTERVAL)
        self._hosts: dict[int, str] = {}
        watched = range(1, num_processes) if process == 0 else (0,)
        self._heard = {other: (None, time.monotonic()) for other in watched}
        self._post: dict[str, Any] = {"host": socket.gethostname(), "beat": 0, "end": None, "at": "", "seconds": 0.0}
        self._stopped, self._ending = threading.Event(), threading.Lock()
        # Two threads: a call to a store that hangs must not keep the silence from being noticed.
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._exchange, self._listen)]

    def start(self) -> None:
        """Begins to beat and to watch; returns when the watched processes have begun too."""
        self._beat()
        for other in self._heard:
            self._hosts[other] = json.loads(self._store.blocking_key_value_get(_key(other), START_MS))["host"]
            self._heard[other] = (None, time.monotonic())
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the watch; to be called when every process has said that it is done."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(self._silence)

    def mark(self, place: str, *, waiting: bool = False) -> None:
        """Says where the work of this process is; `waiting` for another one it may be there for ever."""
        self._at, self._since = place, math.inf if waiting else time.monotonic()

    def take_over(self) -> None:
        """Leaves the ending of this process to the caller, unless the watch has begun to end it: then never returns."""
        self._ending.acquire()
        self._stopped.set()

    def tell_failure(self, code: int, line: str) -> None:
        """Tells the others that this process ends with `code` because of `line`; after `take_over`, before `_exit`."""
        self._tell(code, f"process {self._process} ({self._post['host']}) ended the job: {line}")

    def await_verdict(self) -> None:
        """Gives the watch time to find out that another process is gone, which ends this one; else returns."""
        time.sleep(self._silence + LINGER_BEATS * self._interval)

    def _exchange(self) -> None:
        while not self._stopped.wait(self._interval):
            self._post["beat"] += 1
            try:
                self._beat()
                posts = self._store.key_value_dir_get(PROCESSES if self._process == 0 else VERDICT)
            except Exception:  # whatever it was, `_listen` counts the silence
                continue
            self._read(posts)

    def _beat(self) -> None:
        self._post |= {"at": self._at, "seconds": max(time.monotonic() - self._since, 0.0)}
        self._store.key_value_set(_key(self._process), json.dumps(self._post), allow_overwrite=True)

    def _read(self, posts: list[tuple[str, str]]) -> None:
        for key, text in posts:
            other, post = _of(key), json.loads(text)
            if self._heard[other][0] != post["beat"]:
                self._heard[other] = (post["beat"], time.monotonic())
            if post["end"]:
                time.sleep(2 * self._interval)  # a process that fails in the same way says so itself
                self._end(*post["end"])
        if self._process == 0:
            self._end_a_stall([(self._process, self._post), *((_of(key), json.loads(text)) for key, text in posts)])

    def _end_a_stall(self, posts: list[tuple[int, dict]]) -> None:
        """Others wait for the one that hangs, and stop a little later than it."""
        process, post = max(posts, key=lambda item: item[1]["seconds"])
        if post["seconds"] > self._stall:
            hangs = f"process {process} ({post['host']}) beats but has been at {post['at']} for {self._stall:g} s"
            self._end(FAULT, f"{hangs}; the same command goes on from the last checkpoint")

    def _listen(self) -> None:
        while not self._stopped.wait(self._interval):
            now = time.monotonic()
            for other, (_, heard) in self._heard.items():
                if now - heard > self._silence:
                    gone = f"process {other} ({self._hosts[other]}) has not been heard from for {self._silence:g} s"
                    self._end(FAULT, f"{gone}; the same command goes on from the last checkpoint")

    def _end(self, code: int, line: str) -> None:
        with self._ending:
            print(f"{self._prefix}{line}", file=sys.stderr, flush=True)
            if self._process == 0:
                self._tell(code, line)
            os._exit(code)

    def _tell(self, code: int, line: str) -> None:
        """Posts the end, as far as the store still answers; process 0, which holds it, stays until it has been read."""
        self._post["end"] = (code, line)
        posting = threading.Thread(target=self._beat, daemon=True)
        posting.start()
        posting.join(LINGER_BEATS * self._interval)
        if self._process == 0:
            time.sleep(LINGER_BEATS * self._interval)


def _of(key: str) -> int:
    """The process that posts under `key`."""
    return int(key.rpartition("/")[2])


def _key(process: int) -> str:
    """Where a process posts: process 0, which all the others read, in a folder of its own."""
    return f"{PROCESSES if process else VERDICT}{process}"
