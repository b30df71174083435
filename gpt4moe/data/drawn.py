"""Documents drawn by as many processes as there are cores: in the same order, and the same, whatever their number."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator

from gpt4moe.config.check import require_count
from gpt4moe.data.documents import Document

Drawing = Callable[..., Iterator[Document]]


def in_chunks(size: int) -> Callable[[Drawing], Drawing]:
    """Makes of `draw(count, seed, ...)` a function of the same parameters that draws `size` documents by a seed each.

    The first chunk has the seed itself, number i has "seed.i". Where there are several, other processes draw them; only
    arguments that cannot be sent there, such as a function typed into a notebook, are a reason to draw here.
    """

    def decorated(draw: Drawing) -> Drawing:
        @functools.wraps(draw)
        def documents(*args: object, **kwargs: object) -> Iterator[Document]:
            bound = inspect.signature(draw).bind(*args, **kwargs)
            bound.apply_defaults()
            count, seed = bound.arguments["count"], bound.arguments["seed"]
            require_count(f"{draw.__name__}.count", count)  # at the call, before anything is drawn
            chunks = [
                bound.arguments
                | {"count": min(size, count - start), "seed": f"{seed}.{start // size}" if start else seed}
                for start in range(0, count, size)
            ]
            return _drawn(draw, chunks)

        return documents

    return decorated


def _drawn(draw: Drawing, chunks: list[dict]) -> Iterator[Document]:
    workers = min(len(os.sched_getaffinity(0)), len(chunks))
    if workers > 1 and _can_be_sent(chunks[0]):
        yield from _in_processes(draw, chunks, workers)
    else:
        for chunk in chunks:
            yield from draw(**chunk)


def _can_be_sent(arguments: dict) -> bool:
    try:
        return b"__main__" not in pickle.dumps(arguments)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False


def _in_processes(draw: Drawing, chunks: list[dict], workers: int) -> Iterator[Document]:
    """Process w draws chunks w, w + workers, ...; a full pipe lets it wait until it is read."""
    # Not `multiprocessing`, whose children begin with the caller's script: one without a guard would run in each.
    command, environment = [sys.executable, "-m", __name__], os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(workers)]
    try:
        for index, process in enumerate(processes):
            with process.stdin:
                pickle.dump((draw.__module__, draw.__qualname__, chunks[index::workers]), process.stdin)
        for index in range(len(chunks)):
            try:
                drawn = pickle.load(processes[index % workers].stdout)
            except (EOFError, pickle.UnpicklingError):
                raise RuntimeError(f"a process that draws {draw.__name__} died: out of memory, or see above") from None
            if isinstance(drawn, Exception):
                raise drawn
            yield from drawn
    finally:
        for process in processes:
            process.kill()
            process.stdout.close()
            process.wait()


def _main() -> None:
    """Draws the chunks that standard input names and writes a list of documents for each to standard output."""
    # What the text function's module prints, if only at its import, is not to stand among the documents.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    module, name, chunks = pickle.load(sys.stdin.buffer)
    draw = inspect.unwrap(getattr(importlib.import_module(module), name))
    for chunk in chunks:
        try:
            drawn: list[Document] | Exception = list(draw(**chunk))
        except ValueError as error:  # the caller's mistake, to be told by the caller's process
            drawn = error
        pickle.dump(drawn, out)
        out.flush()


if __name__ == "__main__":
    _main()
