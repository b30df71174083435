"""The caller's end: every chunk once and in order, in a loop of its own, and none that breaks the engine's thread."""

import asyncio
import threading

from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.engine.handle import RequestHandle
from gpt4moe.infer.engine.request import Chunk, EngineRequest


def handle_of(n=1):
    return RequestHandle(EngineRequest([0], SamplingConfig(n=n)), "r", advance=lambda: False)


def push_all(handle, chunks):
    for chunk in chunks:
        handle.push(chunk)


def chunks_of(index, count):
    texts = [str(number) for number in range(count)]
    return [Chunk(index, text, (number,), finish_reason=None) for number, text in enumerate(texts)] + [
        Chunk(index, "!", (count,), finish_reason="stop")
    ]


def test_an_event_loop_hears_every_chunk_of_another_thread():
    handle = handle_of(n=2)
    chunks = [chunk for pair in zip(chunks_of(0, 200), chunks_of(1, 200), strict=True) for chunk in pair]

    async def heard():
        thread = threading.Thread(target=push_all, args=(handle, chunks))
        thread.start()
        taken = [chunk async for chunk in handle]
        thread.join()
        return taken

    assert asyncio.run(heard()) == chunks
    handle.push(Chunk(0, "late"))  # the loop is closed, which is no fault of the engine's


def test_a_thread_that_waits_gets_the_joined_continuations():
    handle = handle_of(n=2)
    thread = threading.Thread(target=push_all, args=(handle, chunks_of(1, 3) + chunks_of(0, 5)))
    thread.start()
    first, second = handle.result()
    thread.join()
    assert (first.text, first.token_ids, first.finish_reason) == ("01234!", (0, 1, 2, 3, 4, 5), "stop")
    assert second.text == "012!" and handle.done
    assert handle.result() == [first, second]
