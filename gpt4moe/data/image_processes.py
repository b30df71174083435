"""Images decoded by processes, straight into the memory of the batch they are for.

Threads share one interpreter, which bounds them at a few thousand images a second however many cores there are: too few
for an accelerator that takes small images by the hundred.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np

from gpt4moe.config.check import RunError
from gpt4moe.config.data import ImageConfig
from gpt4moe.data.documents import EncodedImage
from gpt4moe.data.encode import end_with_parent
from gpt4moe.data.images import DECODE_ERRORS, decode_into, why_broken

# Where files are memory, on Linux; elsewhere the pages of a short-lived file seldom reach the disk.
MEMORY = pathlib.Path("/dev/shm")

Place = tuple[int, int]


class ImageProcesses:
    """`config.processes` processes that decode what they are sent; they end with this one, or with this object.

    Raises `RunError` where one of them has died.
    """

    def __init__(self, config: ImageConfig) -> None:
        self._config = config
        # spawn: forking a process that runs JAX threads can deadlock.
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(config.processes, context, initializer=end_with_parent)

    def submit(
        self, images: SharedImages, work: Sequence[tuple[Place, EncodedImage]]
    ) -> concurrent.futures.Future[list[int | str]]:
        """Starts on images for their (row, place) in a batch.

        Gives how many frames of each there are, or in one line why it cannot be decoded.
        """
        with _explained():
            return self._pool.submit(_decode, str(images.path), images.array.shape, list(work), self._config)

    def result(self, job: concurrent.futures.Future[list[int | str]]) -> list[int | str]:
        """What a job gives."""
        with _explained():
            return job.result()


class SharedImages:
    """A zeroed array [B, I, F, height, width, 3] uint8 that processes find by `path` until `forget` is called."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        file, name = tempfile.mkstemp(prefix="gpt4moe-images-", dir=MEMORY if MEMORY.is_dir() else None)
        self.path = pathlib.Path(name)
        try:
            os.truncate(file, int(np.prod(shape)))
            self.array = np.memmap(name, np.uint8, "r+", shape=shape)
        except BaseException:
            self.forget()
            raise
        finally:
            os.close(file)

    def forget(self) -> None:
        """Takes the name away; the memory stays as long as the array."""
        self.path.unlink(missing_ok=True)

    def __del__(self) -> None:
        self.forget()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except concurrent.futures.process.BrokenProcessPool:
        guard = "out of memory, or a script without `if __name__ == '__main__':`"
        raise RunError(f"a process that decodes images died ({guard}); ImageConfig.processes=0 uses threads") from None


def _decode(
    path: str, shape: tuple[int, ...], work: list[tuple[Place, EncodedImage]], config: ImageConfig
) -> list[int | str]:
    images = np.memmap(path, np.uint8, "r+", shape=shape)
    done: list[int | str] = []
    for (row, place), image in work:
        valid = np.zeros(config.frames, bool)
        try:
            decode_into(image, config, images[row, place], valid)
            done.append(int(valid.sum()))
        except DECODE_ERRORS as error:
            done.append(why_broken(error))
    return done
