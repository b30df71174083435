"""Offline batches: requests from a file of JSON lines through the engine, continuations out in the same order.

In: lines such as `{"prompt": "def f(", "temperature": 0, "id": "a"}`; besides `id`, `images`, `priority` the keys are
fields of `SamplingConfig`, and what a line leaves out comes from the defaults. Out: a dict for each line.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gpt4moe.config.check import CallerError, near, require
from gpt4moe.config.data import ImageConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.codec import prompt_ids
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.infer.engine.handle import RequestHandle
from gpt4moe.infer.engine.request import Continuation, EngineRequest, QueueFull
from gpt4moe.infer.pictures import Picture, read_picture

FIELDS = tuple(field.name for field in dataclasses.fields(SamplingConfig))
KEYS = ("prompt", "id", "images", "priority", *FIELDS)
REPORT_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class FileRequest:
    """One line of the file: where it stands ("FILE:LINE"), the text, how to continue it, the caller's name for it."""

    place: str
    prompt: str
    sampling: SamplingConfig
    id: Any = None
    images: tuple[str, ...] = ()
    priority: int = 0


def read_requests(path: str, defaults: SamplingConfig) -> list[FileRequest]:
    """The requests of a file; `CallerError` names file and line of the first that is none."""
    file = pathlib.Path(path)
    require(file.is_file(), "--requests", path, "is not a file")
    requests = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if line.strip():
            requests.append(_request(f"{path}:{number}", line, defaults))
    require(bool(requests), "--requests", path, "holds no request", 'write lines such as {"prompt": "..."}')
    return requests


def run_requests(
    engine: Engine,
    requests: Sequence[FileRequest],
    images: ImageConfig | None = None,
    progress: Callable[[str], None] | None = None,
) -> Iterator[dict]:
    """What the model wrote for each request, in their order.

    images: how the run's images were fitted. Every request is checked before the first is served: `CallerError` names
    file and line of one that the model cannot serve.
    """
    first_draws = itertools.accumulate((request.sampling.n for request in requests), initial=0)
    asked = [_checked(engine, request, images, draw) for request, draw in zip(requests, first_draws, strict=False)]
    return _served(engine, requests, asked, progress or (lambda line: None))


def write_lines(documents: Iterable[dict], output: str | None) -> None:
    """Writes each as a line of JSON as soon as it is there, to a file or (None) to standard output."""
    with open(output, "w", encoding="utf-8") if output else contextlib.nullcontext(sys.stdout) as file:
        for document in documents:
            print(json.dumps(document, ensure_ascii=False), file=file, flush=True)


def _served(
    engine: Engine, requests: Sequence[FileRequest], asked: Sequence[EngineRequest], say: Callable[[str], None]
) -> Iterator[dict]:
    waiting, running = collections.deque(zip(requests, asked, strict=True)), collections.deque()
    started = told = time.perf_counter()
    num_done = 0
    while waiting or running:
        _submit(engine, waiting, running)
        engine.step()
        while running and running[0][1].done:
            request, handle = running.popleft()
            num_done += 1
            yield _document(request, handle)
        if time.perf_counter() - told > REPORT_SECONDS:
            told = time.perf_counter()
            say(_line(engine, num_done, len(requests), told - started))
    say(_line(engine, num_done, len(requests), time.perf_counter() - started))


def _request(place: str, line: bytes, defaults: SamplingConfig) -> FileRequest:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CallerError(f"{place}: is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise CallerError(f"{place}: must be a JSON object, not {type(given).__name__}")
    unknown = [key for key in given if key not in KEYS]
    if unknown:
        raise CallerError(f"{place}: has no key {unknown[0]!r}; there are {near(unknown[0], KEYS)}")
    try:
        require(isinstance(given.get("prompt"), str), "prompt", given.get("prompt"), "must be text")
        images = given.get("images", [])
        listed = isinstance(images, list) and all(isinstance(path, str) for path in images)
        require(listed, "images", images, "must be a list of files")
        settings = {key: value for key, value in given.items() if key in FIELDS}
        if isinstance(settings.get("logit_bias"), dict):  # the keys of a JSON object are text
            settings["logit_bias"] = {_token(key): value for key, value in settings["logit_bias"].items()}
        sampling = dataclasses.replace(defaults, **settings)
    except CallerError as error:
        raise CallerError(f"{place}: {error}") from None
    return FileRequest(place, given["prompt"], sampling, given.get("id"), tuple(images), given.get("priority", 0))


def _token(key: str) -> int | str:
    return int(key) if key.isdecimal() else key


def _checked(engine: Engine, request: FileRequest, images: ImageConfig | None, draw: int) -> EngineRequest:
    try:
        pictures: list[Picture] = [read_picture(path, images, "images") for path in request.images]
        ids = prompt_ids(engine.tokenizer, request.prompt, len(pictures))
        asked = EngineRequest(ids, request.sampling, pictures, priority=request.priority, draw=draw)
        engine.check(asked)
    except CallerError as error:
        raise CallerError(f"{request.place}: {error}") from None
    return asked


def _submit(engine: Engine, waiting: collections.deque, running: collections.deque) -> None:
    """As many as the engine takes."""
    while waiting:
        request, asked = waiting[0]
        try:
            running.append((request, engine.submit(asked)))
        except QueueFull:
            return
        waiting.popleft()


def _document(request: FileRequest, handle: RequestHandle) -> dict:
    named = {} if request.id is None else {"id": request.id}
    made = [_plain(continuation) for continuation in handle.result()]
    prompt = handle.result()[0].prompt
    scores = {} if prompt.logprobs is None else {"prompt_logprobs": prompt.logprobs}
    num_prompt = len(handle.request.prompt_ids)
    return {**named, "prompt": request.prompt, "num_prompt_tokens": num_prompt, **scores, "continuations": made}


def _plain(continuation: Continuation) -> dict:
    names = ("text", "token_ids", "logprobs", "top_logprobs", "finish_reason", "error")
    values = {name: getattr(continuation, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _line(engine: Engine, num_done: int, total: int, seconds: float) -> str:
    metrics = engine.metrics()
    rate = metrics.new_tokens / seconds
    return f"{num_done} of {total} requests done, {metrics.new_tokens:,} tokens, {rate:,.0f} tokens/s"
