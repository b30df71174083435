"""The images of a source and split on disk, beside its tokens: compressed files end to end, and where each belongs.

    NAME.SPLIT.images                 the compressed frames of all images, in the order of their tokens
    NAME.SPLIT.image_offsets.npy      [frames + 1] int64, where the frames start in it and where the last one ends
    NAME.SPLIT.image_frames.npy       [images + 1] int64, number of an image's first frame, then of all frames
    NAME.SPLIT.image_positions.npy    [images] int64, where the image's token stands in the stream, ascending

A source without images has none of these files.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
import itertools
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np

from gpt4moe.data.documents import EncodedImage
from gpt4moe.data.images import frames_of

ARRAYS = ("image_offsets", "image_frames", "image_positions")


class ImageWriter:
    """Appends images to the file of one split of one part; makes no file where there is none."""

    def __init__(self, folder: pathlib.Path, split: str) -> None:
        self._path = folder / f"{split}.images"
        self._file = None
        self._offsets, self._frames, self._positions = array.array("q", [0]), array.array("q", [0]), array.array("q")

    def add(self, image: EncodedImage, position: int) -> None:
        """`position` is that of the image's token among the split's tokens of this part."""
        self._file = self._file or self._path.open("wb")
        for data in frames_of(image):
            self._file.write(data)
            self._offsets.append(self._offsets[-1] + len(data))
        self._frames.append(len(self._offsets) - 1)
        self._positions.append(position)

    def close(self) -> None:
        """Writes the arrays."""
        if self._file is None:
            return
        self._file.close()
        for name, values in zip(ARRAYS, (self._offsets, self._frames, self._positions), strict=True):
            np.save(self._path.with_name(f"{self._path.stem}.{name}.npy"), np.asarray(values, np.int64))


@dataclasses.dataclass(frozen=True, eq=False)
class StoredImages:
    """Read access to the images of one split, memory-mapped; for the arrays see the head of the file."""

    path: pathlib.Path
    offsets: np.ndarray
    frames: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    @functools.cached_property
    def _data(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, "r")

    def __getitem__(self, index: int) -> tuple[bytes, ...]:
        first, last = self.frames[index : index + 2].tolist()
        edges = self.offsets[first : last + 1].tolist()
        return tuple(self._data[start:end].tobytes() for start, end in itertools.pairwise(edges))

    def within(self, start: int, stop: int) -> tuple[int, int]:
        """Images first .. last-1 are those whose token stands at start .. stop-1 of the stream."""
        first, last = np.searchsorted(self.positions, (start, stop))
        return int(first), int(last)

    def num_bytes(self, stop: int) -> int:
        """Compressed bytes of the first `stop` images."""
        return int(self.offsets[self.frames[stop]])


def stored_images(prefix: pathlib.Path) -> StoredImages | None:
    """The images of `prefix` (FOLDER/NAME.SPLIT, or FOLDER/SPLIT in a part); None where there are none."""
    path = prefix.with_name(f"{prefix.name}.images")
    if not path.exists():
        return None
    return StoredImages(path, *(np.load(prefix.with_name(f"{prefix.name}.{name}.npy")) for name in ARRAYS))


def join_images(parts: Sequence[tuple[pathlib.Path, int]], prefix: pathlib.Path) -> None:
    """Joins the images of parts, each its prefix and how many tokens it has, into the files of `prefix`."""
    starts = itertools.accumulate((tokens for _, tokens in parts), initial=0)
    found = [(stored_images(part), before) for (part, _), before in zip(parts, starts, strict=False)]
    found = [(images, before) for images, before in found if images is not None]
    if not found:
        return
    with prefix.with_name(f"{prefix.name}.images").open("wb") as out:
        for images, _ in found:
            with images.path.open("rb") as part:
                shutil.copyfileobj(part, out, 1 << 24)
    sizes = np.concatenate([np.diff(images.offsets) for images, _ in found])
    frames = np.concatenate([np.diff(images.frames) for images, _ in found])
    _save(prefix, sizes, frames, np.concatenate([images.positions + before for images, before in found]))


def move_images(full: pathlib.Path, start: int, stop: int, train: pathlib.Path, held_out: pathlib.Path) -> None:
    """Splits the images of `full` as its tokens are: start .. stop-1 go to `held_out` behind one token, the rest stays.

    `full` is `train` or `held_out`, and is replaced.
    """
    images = stored_images(full)
    if images is None:
        return
    first, last = images.within(start, stop)
    sizes, frames = np.diff(images.offsets), np.diff(images.frames)
    kept, positions = np.r_[:first, last : len(images)], images.positions
    kept_frames = np.r_[: images.frames[first], images.frames[last] : len(sizes)]
    edges = images.offsets[images.frames[[first, last]]].tolist()
    data = images.path.read_bytes()
    rest_positions = positions[kept] - (stop - start) * (positions[kept] >= stop)
    rest = (data[: edges[0]] + data[edges[1] :], sizes[kept_frames], frames[kept], rest_positions)
    moved_frames = np.s_[images.frames[first] : images.frames[last]]
    moved = np.s_[first:last]
    tail = (data[edges[0] : edges[1]], sizes[moved_frames], frames[moved], positions[moved] - start + 1)
    for name in ("images", *(f"{name}.npy" for name in ARRAYS)):
        full.with_name(f"{full.name}.{name}").unlink()
    for prefix, (content, *arrays) in ((train, rest), (held_out, tail)):
        if content:
            prefix.with_name(f"{prefix.name}.images").write_bytes(content)
            _save(prefix, *arrays)


def add_to_digest(digest: hashlib.blake2b, prefix: pathlib.Path) -> None:
    """Takes the images of `prefix` into a hash; nothing where there are none."""
    images = stored_images(prefix)
    if images is not None:
        with images.path.open("rb") as file:
            for chunk in iter(lambda: file.read(1 << 24), b""):
                digest.update(chunk)
        digest.update(images.positions)


def _save(prefix: pathlib.Path, sizes: np.ndarray, frames: np.ndarray, positions: np.ndarray) -> None:
    arrays = (np.concatenate([[0], np.cumsum(sizes)]), np.concatenate([[0], np.cumsum(frames)]), positions)
    for name, values in zip(ARRAYS, arrays, strict=True):
        np.save(prefix.with_name(f"{prefix.name}.{name}.npy"), values.astype(np.int64))
