"""The user's files: which ones a source names, and how large ones are cut into parts that can be read on their own."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterator

from etils import epath

from gpt4moe.config.check import CallerError, one_line, require
from gpt4moe.data.documents import BadRecord, Document
from gpt4moe.data.readers import READERS, Reader, read_errors

GLOB_LETTERS = "*?["


@dataclasses.dataclass(frozen=True)
class FilePart:
    """The records of `path` between `start` and `stop` (None: to the end); about `size` bytes.

    Bounds count bytes of .jsonl, row groups of .parquet; other kinds are read whole.
    """

    path: str
    size: int
    start: int = 0
    stop: int | None = None


def find_files(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Every readable file that `paths` (files, directories, globs; local or `gs://`, `s3://`) name, sorted.

    A directory gives the files below it that have a known suffix and are not hidden. ValueError where a path names
    none.
    """
    found = set()
    for path in paths:
        files = [file for file in _expand(path) if reader_of(file) is not None]
        require(bool(files), "paths", path, f"names no file of a known kind ({' '.join(READERS)})", "check the path")
        found.update(files)
    return tuple(sorted(found))


def file_identity(path: str) -> tuple[str, int, float]:
    """Path, bytes and time of last change, by which a prepared store knows that a file is still the same."""
    stat = epath.Path(path).stat()
    return path, stat.length, stat.mtime


def cut_file(path: str, target_bytes: int) -> list[FilePart]:
    """Parts of about `target_bytes` that hold every record of the file once between them, in order."""
    size = file_identity(path)[1]
    if size <= target_bytes:
        return [FilePart(path, size)]
    if path.endswith(".jsonl"):
        edges = [*range(0, size, target_bytes), size]
    elif path.endswith(".parquet"):
        edges = _row_group_edges(path, size, target_bytes)
    else:
        return [FilePart(path, size)]
    count = len(edges) - 1
    return [FilePart(path, size // count, edges[index], edges[index + 1]) for index in range(count)]


def read_documents(part: FilePart, text_field: str, group_field: str | None = None) -> Iterator[Document | BadRecord]:
    """Documents of a part in order, a `BadRecord` in the place of each that cannot be read.

    ValueError where the file itself cannot be opened or is damaged.
    """
    reader = reader_of(part.path)
    require(reader is not None, "paths", part.path, f"is of no known kind ({' '.join(READERS)})")
    try:
        yield from reader(part.path, part.start, part.stop, text_field, group_field)
    except read_errors() as error:
        raise _unreadable(part.path, error) from None


def reader_of(path: str) -> Reader | None:
    """The reader for the suffix of `path`, None for an unknown one."""
    return next((reader for suffix, reader in READERS.items() if path.endswith(suffix)), None)


def _expand(path: str) -> list[str]:
    root = epath.Path(path).expanduser()
    if any(letter in path for letter in GLOB_LETTERS):
        if "://" not in path:
            return [file for file in glob.glob(str(root), recursive=True) if os.path.isfile(file)]
        fixed = next(index for index, part in enumerate(root.parts) if any(letter in part for letter in GLOB_LETTERS))
        found = epath.Path(*root.parts[:fixed]).glob("/".join(root.parts[fixed:]))
        return [str(file) for file in found if file.is_file()]
    require(root.exists(), "paths", path, "does not exist", "check the path")
    return [str(file) for file in _files_below(root)]


def _files_below(root: epath.Path) -> Iterator[epath.Path]:
    """The file itself, or every file below a folder (object stores have no recursive glob)."""
    if not root.is_dir():
        yield root
        return
    for entry in root.iterdir():
        if not entry.name.startswith("."):
            yield from _files_below(entry)


def _row_group_edges(path: str, size: int, target_bytes: int) -> list[int]:
    from pyarrow import parquet

    try:
        with epath.Path(path).open("rb") as file:
            groups = parquet.ParquetFile(file).num_row_groups
    except read_errors() as error:
        raise _unreadable(path, error) from None
    step = max(groups * target_bytes // size, 1)
    return [*range(0, groups, step), groups]


def _unreadable(path: str, error: BaseException) -> CallerError:
    return CallerError(f"paths={path!r} cannot be read: {one_line(error)}; check, replace or leave out the file")
