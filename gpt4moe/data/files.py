"""The user's files: which ones a source names, and how large ones are cut into parts that can be read on their own."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Callable, Iterator, Mapping

from etils import epath

from gpt4moe.config.check import CallerError, one_line, require
from gpt4moe.data.documents import BadRecord, Document
from gpt4moe.data.image_readers import IMAGE_READERS, IMAGE_SUFFIXES, caption_of
from gpt4moe.data.readers import READERS, read_errors

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


def find_files(paths: tuple[str, ...], image_field: str | None = None) -> tuple[str, ...]:
    """Every readable file that `paths` (files, directories, globs; local or `gs://`, `s3://`) name, sorted.

    A directory gives the files below it that have a known suffix, in letters of any case, and are not hidden; a link to
    nothing is left to its reader. Image files below a folder whose .jsonl is among them are what that speaks of, and no
    documents of their own. ValueError where a path names none.
    """
    readers = _readers(image_field)
    found = set()
    for path in paths:
        files = [file for file in _expand(path) if _of_suffix(file, readers) is not None]
        require(bool(files), "paths", path, f"names no file of a known kind ({' '.join(readers)})", "check the path")
        found.update(files)
    tables = {os.path.dirname(file) for file in found if _has_suffix(file, ".jsonl")} if image_field else set()
    listed = {file for file in found if _has_suffix(file, IMAGE_SUFFIXES) and _is_below(file, tables)}
    return tuple(sorted(found - listed))


def files_beside(files: tuple[str, ...]) -> tuple[str, ...]:
    """What the image readers read beside `files`: captions of images, and the images below a folder with a .jsonl."""
    folders = {os.path.dirname(file) for file in files if _has_suffix(file, ".jsonl")}
    images = {file for folder in folders for file in _expand(folder) if _has_suffix(file, IMAGE_SUFFIXES)}
    # In an object store each would be a request.
    captioned = (file for file in files if _has_suffix(file, IMAGE_SUFFIXES) and "://" not in file)
    captions = {os.fspath(caption) for file in captioned if (caption := caption_of(file))}
    return tuple(sorted((images | captions) - set(files)))


def file_identity(path: str) -> tuple[str, int, float]:
    """Path, bytes and time of last change, by which a prepared store knows that a file is still the same.

    Of a link to nothing both are 0.
    """
    try:
        stat = epath.Path(path).stat()
    except OSError:
        if os.path.islink(path):
            return path, 0, 0.0
        raise
    return path, stat.length, stat.mtime


def cut_file(path: str, target_bytes: int) -> list[FilePart]:
    """Parts of about `target_bytes` that hold every record of the file once between them, in order."""
    size = file_identity(path)[1]
    if size <= target_bytes:
        return [FilePart(path, size)]
    if _has_suffix(path, ".jsonl"):
        edges = [*range(0, size, target_bytes), size]
    elif _has_suffix(path, ".parquet"):
        edges = _row_group_edges(path, size, target_bytes)
    else:
        return [FilePart(path, size)]
    count = len(edges) - 1
    return [FilePart(path, size // count, edges[index], edges[index + 1]) for index in range(count)]


def read_documents(
    part: FilePart, text_field: str, group_field: str | None = None, image_field: str | None = None
) -> Iterator[Document | BadRecord]:
    """Documents of a part in order, a `BadRecord` in the place of each that cannot be read.

    With images where `image_field` says that there are some. ValueError where the file itself cannot be opened or is
    damaged.
    """
    readers = _readers(image_field)
    reader = _of_suffix(part.path, readers)
    require(reader is not None, "paths", part.path, f"is of no known kind ({' '.join(readers)})")
    fields = (text_field, group_field) if image_field is None else (text_field, group_field, image_field)
    try:
        yield from reader(part.path, part.start, part.stop, *fields)
    except read_errors() as error:
        raise _unreadable(part.path, error) from None


def _readers(image_field: str | None) -> Mapping[str, Callable[..., Iterator[Document | BadRecord]]]:
    return READERS if image_field is None else IMAGE_READERS


def _of_suffix(path: str, readers: Mapping[str, Callable]) -> Callable | None:
    """The reader for the suffix of `path`, None for an unknown one."""
    return next((reader for suffix, reader in readers.items() if _has_suffix(path, suffix)), None)


def _has_suffix(path: str, suffix: str | tuple[str, ...]) -> bool:
    """Whether a file is of a kind; cameras and Windows write suffixes in capitals."""
    return path.lower().endswith(suffix)


def _is_below(path: str, folders: set[str]) -> bool:
    while path != (path := os.path.dirname(path)):
        if path in folders:
            return True
    return False


def _expand(path: str) -> list[str]:
    root = epath.Path(path).expanduser()
    if any(letter in path for letter in GLOB_LETTERS):
        if "://" not in path:
            found = glob.glob(str(root), recursive=True)
            return [
                file for file in found if os.path.isfile(file) or (os.path.islink(file) and not os.path.isdir(file))
            ]
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
