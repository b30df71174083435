"""The user's files: which ones a source names, and the documents inside them."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tokenize
import zlib
from collections.abc import Callable, Iterator

import zstandard
from etils import epath

from gpt4moe.config.check import require
from gpt4moe.data.documents import BadRecord, Document

Records = Iterator[Document | BadRecord]
# Yields (record number, text or mapping or the error that replaces it); the file is open in binary mode.
GLOB_LETTERS = "*?["


def find_files(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Every readable file that `paths` (files, directories, globs; local or `gs://`, `s3://`) name, sorted.

    A directory gives the files below it that have a known suffix. ValueError where a path names none.
    """
    found = set()
    for path in paths:
        files = [file for file in _expand(path) if reader_of(file) is not None]
        require(bool(files), "paths", path, f"names no file of a known kind {tuple(READERS)}", "check the path")
        found.update(files)
    return tuple(sorted(found))


def file_identity(path: str) -> tuple[str, int, float]:
    """Path, bytes and time of last change, by which a prepared store knows that a file is still the same."""
    stat = epath.Path(path).stat()
    return path, stat.length, stat.mtime


def read_documents(path: str, text_field: str, group_field: str | None = None) -> Records:
    """Documents of one file in order, a `BadRecord` in the place of each that cannot be read.

    ValueError where the file itself cannot be opened or is damaged.
    """
    reader = reader_of(path)
    require(reader is not None, "paths", path, f"is of no known kind {tuple(READERS)}")
    try:
        yield from reader(path, text_field, group_field)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, _arrow_error()) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"paths={path!r} cannot be read: {reason}; check, replace or leave out the file") from None


def reader_of(path: str) -> Callable[[str, str, str | None], Records] | None:
    """The reader for the suffix of `path`, None for an unknown one."""
    return next((reader for suffix, reader in READERS.items() if path.endswith(suffix)), None)


def _expand(path: str) -> list[str]:
    if not any(letter in path for letter in GLOB_LETTERS):
        root = epath.Path(path).expanduser()
        require(root.exists(), "paths", path, "does not exist")
        return [str(file) for file in root.rglob("*") if file.is_file()] if root.is_dir() else [str(root)]
    parts = epath.Path(path).expanduser().parts
    fixed = next(index for index, part in enumerate(parts) if any(letter in part for letter in GLOB_LETTERS))
    root = epath.Path(*parts[:fixed]) if fixed else epath.Path(".")
    return [str(file) for file in root.glob("/".join(parts[fixed:])) if file.is_file()]


def _read_text(path: str, text_field: str, group_field: str | None) -> Records:
    raw = epath.Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield BadRecord(f"{path}:{line}", "is not UTF-8")
        return
    yield Document(text.replace("\r\n", "\n"))


def _read_python(path: str, text_field: str, group_field: str | None) -> Records:
    raw = epath.Path(path).read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        text = raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError) as error:
        yield BadRecord(f"{path}:1", f"is not in its declared encoding ({str(error).splitlines()[0]})")
        return
    yield Document(text.replace("\r\n", "\n"))


def _read_jsonl(path: str, text_field: str, group_field: str | None) -> Records:
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(epath.Path(path).open("rb"))
        if path.endswith(".gz"):
            file = stack.enter_context(gzip.open(file))
        elif path.endswith(".zst"):
            file = stack.enter_context(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
            file = io.BufferedReader(file)
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_record(line, f"{path}:{number}", text_field, group_field)


def _json_record(line: bytes, where: str, text_field: str, group_field: str | None) -> Document | BadRecord:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRecord(where, f"is not JSON ({str(error).splitlines()[0]})")
    if not isinstance(fields, dict) or not isinstance(fields.get(text_field), str):
        return BadRecord(where, f"has no text in field {text_field!r}")
    return _checked(fields[text_field], where, fields.get(group_field) if group_field else None)


def _checked(text: str, where: str, group: str | None = None) -> Document | BadRecord:
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadRecord(where, "holds half of a surrogate pair, which UTF-8 cannot express")
    return Document(text, group)


def _read_parquet(path: str, text_field: str, group_field: str | None) -> Records:
    from pyarrow import parquet

    with epath.Path(path).open("rb") as file:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        require(text_field in names, "text_field", text_field, f"must be a column of {path} {tuple(names)}")
        number = 0
        for batch in table.iter_batches(columns=[text_field], batch_size=1024):
            for text in batch.column(0).to_pylist():
                number += 1
                where = f"{path}:{number}"
                yield _checked(text, where) if isinstance(text, str) else BadRecord(where, "is no text")


def _read_array_record(path: str, text_field: str, group_field: str | None) -> Records:
    """Records are UTF-8 text, or JSON objects with the text field."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(path)
    try:
        for start in range(0, reader.num_records(), 1024):
            chunk = reader.read(start, min(start + 1024, reader.num_records()))
            for number, record in enumerate(chunk, start=start + 1):
                yield _array_record(record, f"{path}:{number}", text_field, group_field)
    except RuntimeError as error:
        raise OSError(str(error)) from None
    finally:
        reader.close()


def _array_record(record: bytes, where: str, text_field: str, group_field: str | None) -> Document | BadRecord:
    if record.lstrip()[:1] == b"{":
        document = _json_record(record, where, text_field, group_field)
        if isinstance(document, Document):
            return document
    try:
        return Document(record.decode())
    except UnicodeDecodeError:
        return BadRecord(where, "is neither UTF-8 text nor JSON")


def _arrow_error() -> type[Exception]:
    import pyarrow

    return pyarrow.ArrowException


READERS: dict[str, Callable[[str, str, str | None], Records]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_python,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".parquet": _read_parquet,
    ".array_record": _read_array_record,
}
