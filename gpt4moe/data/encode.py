"""One unit of work of `prepare`: some files of one source in, one folder of tokens out. Runs in worker processes."""

from __future__ import annotations

import array
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import shutil
import threading
from collections.abc import Iterator

import numpy as np

from gpt4moe.config.check import CallerError, require
from gpt4moe.data.documents import BadRecord, Document, is_held_out, marker_mismatch, texts_between
from gpt4moe.data.files import FilePart, read_documents
from gpt4moe.data.image_store import ImageWriter
from gpt4moe.data.images import image_problem
from gpt4moe.data.tokenizer import IMAGE_NAMES, Tokenizer

SPLITS = ("train", "held_out")
# Bad records of a source that its report names.
BAD_EXAMPLES = 100


@dataclasses.dataclass(frozen=True)
class Unit:
    """Files that are tokenised together; `folder` is where the tokens go, which exists once it is complete.

    `held_out_fraction` of their documents is held out. `image_field` is that of the source; `max_pixels` what an image
    may unfold to (None: documents with images are refused). `spelled`: text becomes bytes, without merges.
    """

    source: str
    folder: pathlib.Path
    files: tuple[FilePart, ...]
    text_field: str
    group_field: str | None
    held_out_fraction: float
    image_field: str | None = None
    max_pixels: int | None = None
    spelled: bool = False

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.files)


@dataclasses.dataclass(frozen=True)
class UnitCounts:
    """What one unit read: records that were bad (the first of them described) or empty, documents of each split."""

    documents: dict[str, int]
    tokens: dict[str, int]
    bytes: dict[str, int]
    bad_records: int
    bad_examples: tuple[str, ...]
    empty_documents: int


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest unsigned integer that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def encode_unit(unit: Unit, tokenizer: Tokenizer, stop_at_bad: bool) -> UnitCounts:
    """Writes the tokens, lengths and byte counts of `unit`'s documents to its folder; at once if that exists.

    Every document is stored as end-of-text followed by its tokens, of which an image is one. A document with an image
    that cannot be decoded is a bad record. ValueError at a bad record if `stop_at_bad`.
    """
    if (unit.folder / "counts.json").exists():
        return UnitCounts(**json.loads((unit.folder / "counts.json").read_text()))
    scratch = unit.folder.with_name(f"{unit.folder.name}.writing-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    writers = {split: _SplitWriter(scratch, split, tokenizer, unit.spelled) for split in SPLITS}
    bad: list[str] = []
    empty = 0
    for record in _records(unit):
        problem = _problem(record, unit, tokenizer)
        if problem:
            bad.append(f"{problem.where} {problem.reason}")
            if stop_at_bad:
                raise CallerError(f"bad_records='stop' met {bad[-1]}; mend the record or set bad_records='count'")
        elif not record.text:
            empty += 1
        else:
            writers["held_out" if is_held_out(record, unit.held_out_fraction) else "train"].add(record)
    documents, tokens, num_bytes = zip(*(writers[split].close() for split in SPLITS), strict=True)
    per_split = [dict(zip(SPLITS, counts, strict=True)) for counts in (documents, tokens, num_bytes)]
    counts = UnitCounts(*per_split, len(bad), tuple(bad[:BAD_EXAMPLES]), empty)
    (scratch / "counts.json").write_text(json.dumps(dataclasses.asdict(counts)))
    os.replace(scratch, unit.folder)
    return counts


def end_with_parent() -> None:
    """Lets this worker process die with its parent: one that was killed would leave it waiting for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _records(unit: Unit) -> Iterator[Document | BadRecord]:
    for file in unit.files:
        yield from read_documents(file, unit.text_field, unit.group_field, unit.image_field)


def _problem(record: Document | BadRecord, unit: Unit, tokenizer: Tokenizer) -> BadRecord | None:
    """What keeps a record from being stored, None where nothing does; `CallerError` where no image may be."""
    if isinstance(record, BadRecord) or not record.images:
        return record if isinstance(record, BadRecord) else None
    require(unit.max_pixels is not None, "images", None, f"but source {unit.source!r} has some", "give an ImageConfig")
    require(tokenizer.image is not None, "tokenizer.path", "", f"has none of {IMAGE_NAMES} for images", "add it")
    where = record.where or f"a document of {unit.source}"
    reason = marker_mismatch(record.text, len(record.images))
    problems = (image_problem(image, unit.max_pixels) for image in record.images)
    reason = reason or next((problem for problem in problems if problem), None)
    return BadRecord(where, reason) if reason else None


class _SplitWriter:
    """Appends documents of one split to a token file; lengths and bytes are kept and written at the end."""

    def __init__(self, folder: pathlib.Path, split: str, tokenizer: Tokenizer, spelled: bool) -> None:
        self._encode = tokenizer.spell_array if spelled else tokenizer.encode_array
        self._folder, self._split, self._tokenizer = folder, split, tokenizer
        self._file = (folder / f"{split}.tokens").open("wb")
        self._lengths, self._bytes = array.array("q"), array.array("q")
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._start = np.asarray([tokenizer.end_of_text], self._dtype).tobytes()
        self._images, self._position = ImageWriter(folder, split), 0

    def add(self, document: Document) -> None:
        texts = texts_between(document)
        parts = [self._encode(text) for text in texts]
        length = 1 + len(parts[0])
        for image, part in zip(document.images, parts[1:], strict=True):
            self._images.add(image, self._position + length)
            length += 1 + len(part)
        ids = parts[0] if len(parts) == 1 else self._around_images(parts)
        self._file.write(self._start)
        self._file.write(ids.astype(self._dtype).tobytes())
        self._position += length
        self._lengths.append(length)
        self._bytes.append(sum(len(text.encode()) for text in texts))

    def _around_images(self, parts: list[np.ndarray]) -> np.ndarray:
        image = np.asarray([self._tokenizer.image], np.uint32)
        return np.concatenate([parts[0], *(piece for part in parts[1:] for piece in (image, part))])

    def close(self) -> tuple[int, int, int]:
        self._file.close()
        self._images.close()
        for name, values in (("lengths", self._lengths), ("bytes", self._bytes)):
            np.save(self._folder / f"{self._split}.{name}.npy", np.asarray(values, np.int64))
        return len(self._lengths), sum(self._lengths), sum(self._bytes)
