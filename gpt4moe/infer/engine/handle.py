"""The caller's end of a request: chunks as they come, to a thread or to an event loop; cancelling."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import numpy as np

from gpt4moe.infer.engine.request import Chunk, Continuation, EngineRequest


class RequestHandle:
    """Gives the chunks of a request once each, by iteration or `async for`; any thread may call any method.

    `advance` is called by an iteration that finds no chunk, and returns whether it made the engine work; where it did
    not, the iteration waits.
    """

    def __init__(self, request: EngineRequest, request_id: str, advance: Callable[[], bool]):
        self.request, self.request_id = request, request_id
        self.cancelled = False
        self._advance = advance
        self._arrived = threading.Condition()
        self._chunks: collections.deque[Chunk] = collections.deque()
        self._running = request.sampling.n
        self._result: list[Continuation] | None = None
        self._wake: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def cancel(self) -> None:
        """Ends the request at the engine's next step: its rows are free after it. Harmless when it has ended."""
        self.cancelled = True

    @property
    def done(self) -> bool:
        """Whether every continuation has ended; chunks may still wait to be taken."""
        return self._running == 0

    def push(self, chunk: Chunk) -> None:
        """The engine's side: one more chunk."""
        with self._arrived:
            self._chunks.append(chunk)
            self._running -= chunk.finish_reason is not None
            self._arrived.notify_all()
            wake = self._wake
        if wake is not None:
            loop, event = wake
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(event.set)

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            chunk, ended = self._next()
            if chunk is not None:
                yield chunk
            elif ended:
                return
            elif not self._advance():
                with self._arrived:
                    self._arrived.wait_for(lambda: self._chunks or self.done)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Only while the engine runs in a thread of its own."""
        event = asyncio.Event()
        with self._arrived:
            self._wake = asyncio.get_running_loop(), event
        while True:
            event.clear()
            chunk, ended = self._next()
            if chunk is not None:
                yield chunk
            elif ended:
                return
            else:
                await event.wait()

    def take(self) -> list[Chunk]:
        """The chunks that are there, without waiting; none where there is none yet, or none any more."""
        with self._arrived:
            chunks = list(self._chunks)
            self._chunks.clear()
        return chunks

    def result(self) -> list[Continuation]:
        """Waits for the end and returns the continuations, by index; instead of an iteration, not after one."""
        if self._result is None:
            chunks, num = list(self), self.request.sampling.n
            self._result = [_joined(index, [chunk for chunk in chunks if chunk.index == index]) for index in range(num)]
        return self._result

    def _next(self) -> tuple[Chunk | None, bool]:
        with self._arrived:
            return (self._chunks.popleft(), False) if self._chunks else (None, self.done)


def _joined(index: int, chunks: list[Chunk]) -> Continuation:
    def all_of(name: str) -> tuple | None:
        parts = [getattr(chunk, name) for chunk in chunks]
        return None if any(part is None for part in parts) else tuple(item for part in parts for item in part)

    experts = [chunk.expert_ids_TLK for chunk in chunks if chunk.expert_ids_TLK is not None]
    prompts = [chunk.prompt for chunk in chunks if chunk.prompt is not None]
    return Continuation(
        index=index,
        text="".join(chunk.text for chunk in chunks),
        token_ids=all_of("token_ids"),
        logprobs=all_of("logprobs"),
        top_logprobs=all_of("top_logprobs"),
        expert_ids_TLK=np.concatenate(experts) if experts else None,
        finish_reason=chunks[-1].finish_reason,
        error=chunks[-1].error,
        prompt=prompts[0] if prompts else None,
    )
