"""The images of rows, decoded by threads while the step before runs: rows in, the image fields of a Batch out."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from gpt4moe.config.check import RunError, one_line
from gpt4moe.config.data import ImageConfig
from gpt4moe.data.image_store import StoredImages
from gpt4moe.data.images import DECODE_ERRORS, decode_into
from gpt4moe.data.rows import Row
from gpt4moe.types import Batch

# Enough for one call of a thread that small images do not cost more to hand out than to decode.
IMAGES_A_JOB = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Decoding:
    """Rows of which the images are being decoded.

    images_BIFHW3: uint8, F frames; valid_BIF: bool; each is complete once `jobs` are done.
    """

    rows: Sequence[Row]
    images_BIFHW3: np.ndarray
    valid_BIF: np.ndarray
    jobs: Sequence[concurrent.futures.Future | None]


class ImageDecoder:
    """Decodes the images of rows on `config.workers` threads (Pillow lets go of the interpreter), or at once with 0."""

    def __init__(self, config: ImageConfig, images_of: Callable[[int], StoredImages | None]) -> None:
        """`images_of` gives the stored images of a source by its number in `Row.source`."""
        self._config, self._images_of = config, images_of
        self._pool = None
        if config.workers:
            self._pool = concurrent.futures.ThreadPoolExecutor(config.workers, thread_name_prefix="images")

    def begin(self, rows: Sequence[Row], num_rows: int) -> Decoding:
        """Starts on the images of `rows`; `num_rows` is how many the batch has, those that are lacking being empty."""
        config = self._config
        shape = (num_rows, config.per_row, config.frames)
        images = np.zeros((*shape, config.height, config.width, 3), np.uint8)
        valid = np.zeros(shape, bool)
        places = [(row, image) for row in range(len(rows)) for image in range(len(rows[row].images))]
        jobs = []
        for first in range(0, len(places), IMAGES_A_JOB):
            given = (rows, places[first : first + IMAGES_A_JOB], images, valid)
            jobs.append(self._pool.submit(self._decode, *given) if self._pool else self._decode(*given))
        return Decoding(rows, images, valid, jobs)

    def finish(self, decoding: Decoding, batch: Batch) -> Batch:
        """`batch` of the same rows with its images, waiting for those that are not done."""
        for job in decoding.jobs:
            if job is not None:
                job.result()
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
            number, stored = rows[row].images[place], self._images_of(rows[row].source)
            try:
                decode_into(stored[number], self._config, images[row, place], valid[row, place])
            except DECODE_ERRORS as error:
                # It could be when it was stored.
                raise RunError(f"image {number} of {stored.path} cannot be decoded: {one_line(error)}") from None
