"""The images of rows, decoded while the step before runs: rows in, the image fields of a Batch out."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from gpt4moe.config.check import RunError
from gpt4moe.config.data import ImageConfig
from gpt4moe.data.image_processes import ImageProcesses, SharedImages
from gpt4moe.data.image_store import StoredImages
from gpt4moe.data.images import DECODE_ERRORS, decode_into, why_broken
from gpt4moe.data.rows import Row
from gpt4moe.types import Batch

# Enough for one call of a thread that small images do not cost more to hand out than to decode.
IMAGES_A_JOB = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Decoding:
    """Rows of which the images are being decoded.

    images_BIFHW3: uint8, F frames; valid_BIF: bool; each is complete once all of `waits` have been called.
    """

    rows: Sequence[Row]
    images_BIFHW3: np.ndarray
    valid_BIF: np.ndarray
    waits: Sequence[Callable[[], object]]


class ImageDecoder:
    """Decodes the images of rows on `config.processes` processes, without any on `config.workers` threads, or at once.

    Pillow lets go of the interpreter, so that a few threads bring something.
    """

    def __init__(self, config: ImageConfig, images_of: Callable[[int], StoredImages | None]) -> None:
        """`images_of` gives the stored images of a source by its number in `Row.source`."""
        self._config, self._images_of = config, images_of
        self._pool = self._processes = None
        if config.processes:
            self._processes = ImageProcesses(config)
        elif config.workers:
            self._pool = concurrent.futures.ThreadPoolExecutor(config.workers, thread_name_prefix="images")

    def begin(self, rows: Sequence[Row], num_rows: int) -> Decoding:
        """Starts on the images of `rows`; `num_rows` is how many the batch has, those that are lacking being empty."""
        config = self._config
        shape = (num_rows, config.per_row, config.frames)
        valid, pixels = np.zeros(shape, bool), (config.height, config.width, 3)
        places = [(row, image) for row in range(len(rows)) for image in range(len(rows[row].images))]
        jobs = [places[first : first + IMAGES_A_JOB] for first in range(0, len(places), IMAGES_A_JOB)]
        if self._processes and jobs:
            shared = SharedImages((*shape, *pixels))
            waits = [self._send(rows, job, shared, valid) for job in jobs]
            return Decoding(rows, shared.array, valid, [*waits, shared.forget])
        images = np.zeros((*shape, *pixels), np.uint8)
        waits = []
        for job in jobs:
            if self._pool:
                waits.append(self._pool.submit(self._decode, rows, job, images, valid).result)
            else:
                self._decode(rows, job, images, valid)
        return Decoding(rows, images, valid, waits)

    def finish(self, decoding: Decoding, batch: Batch) -> Batch:
        """`batch` of the same rows with its images, waiting for those that are not done."""
        for wait in decoding.waits:
            wait()
        images, valid = decoding.images_BIFHW3, decoding.valid_BIF
        if self._config.frames == 1:
            images, valid = images[:, :, 0], valid[:, :, 0]
        seen = {name: np.full(batch.tokens.shape, -1, np.int32) for name in ("image_index", "first_image")}
        for index, row in enumerate(decoding.rows):
            for name in seen if row.seen is not None else ():
                seen[name][index] = getattr(row.seen, name)
        return dataclasses.replace(batch, images=images, image_valid=valid, **seen)

    def _decode(
        self, rows: Sequence[Row], places: Sequence[tuple[int, int]], images: np.ndarray, valid: np.ndarray
    ) -> None:
        for row, place in places:
            number, stored = self._stored(rows, row, place)
            try:
                decode_into(stored[number], self._config, images[row, place], valid[row, place])
            except DECODE_ERRORS as error:
                raise _broken(number, stored, why_broken(error)) from None

    def _send(
        self, rows: Sequence[Row], places: Sequence[tuple[int, int]], images: SharedImages, valid: np.ndarray
    ) -> Callable[[], None]:
        """Has a process decode some images; what is returned waits for it and says in `valid` what is there."""
        found = [self._stored(rows, *place) for place in places]
        work = [(place, stored[number]) for place, (number, stored) in zip(places, found, strict=True)]
        job = self._processes.submit(images, work)

        def wait() -> None:
            done = self._processes.result(job)
            for (row, place), (number, stored), frames in zip(places, found, done, strict=True):
                if isinstance(frames, str):
                    raise _broken(number, stored, frames)
                valid[row, place, :frames] = True

        return wait

    def _stored(self, rows: Sequence[Row], row: int, place: int) -> tuple[int, StoredImages]:
        return rows[row].images[place], self._images_of(rows[row].source)


def _broken(number: int, stored: StoredImages, why: str) -> RunError:
    """For an image that could be decoded when it was stored."""
    return RunError(f"image {number} of {stored.path} cannot be decoded: {why}")
