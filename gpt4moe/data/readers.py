"""One reader a file format: path, bounds and field names in, documents and bad records out."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import tarfile
import tokenize
import zlib
from collections.abc import Callable, Iterator

import zstandard
from etils import epath

from gpt4moe.config.check import CallerError
from gpt4moe.data.documents import BadRecord, Document

Records = Iterator[Document | BadRecord]
# (path, start, stop, text field, group field); what the bounds count is said in `files.FilePart`.
Reader = Callable[[str, int, int | None, str, str | None], Records]
RECORDS_AT_ONCE = 1024
COUNT_BYTES = 1 << 22


def read_errors() -> tuple[type[BaseException], ...]:
    """What the formats raise for a file that cannot be opened or is damaged."""
    import pyarrow

    return OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException, tarfile.TarError


def read_text(path: str, start: int, stop: int | None, text_field: str, group_field: str | None) -> Records:
    """A file of UTF-8 text: one document."""
    raw = epath.Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield BadRecord(f"{path}:{line}", "is not UTF-8")
        return
    yield Document(text.replace("\r\n", "\n"))


def read_python(path: str, start: int, stop: int | None, text_field: str, group_field: str | None) -> Records:
    """A Python file in its declared encoding: one document."""
    raw = epath.Path(path).read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        text = raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError) as error:
        yield BadRecord(f"{path}:1", f"is not in its declared encoding ({str(error).splitlines()[0]})")
        return
    yield Document(text.replace("\r\n", "\n"))


def read_jsonl(path: str, start: int, stop: int | None, text_field: str, group_field: str | None) -> Records:
    """Uncompressed JSON lines that begin in bytes start..stop-1."""
    return read_lines(path, start, stop, lambda line: _json_record(line, path, text_field, group_field))


def read_lines(path: str, start: int, stop: int | None, parse: Callable[[bytes], Document | BadRecord]) -> Records:
    """What `parse` makes of every line that is not empty and begins in bytes start..stop-1, with file and line."""
    lines_before = None
    with epath.Path(path).open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the rest of a line that began before
        position = file.tell()
        for index, line in enumerate(file):
            if stop is not None and position >= stop:
                return
            position += len(line)
            record = parse(line) if line.strip() else None
            if isinstance(record, BadRecord) or getattr(record, "images", None):
                lines_before = _count_lines(path, start) if lines_before is None else lines_before
                record = dataclasses.replace(record, where=f"{path}:{lines_before + index + 1}")
            if record is not None:
                yield record


def read_compressed_jsonl(path: str, start: int, stop: int | None, text_field: str, group_field: str | None) -> Records:
    """JSON lines under gzip or Zstandard."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(epath.Path(path).open("rb"))
        if path.lower().endswith(".gz"):
            file = stack.enter_context(gzip.open(file))
        else:
            plain = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            file = stack.enter_context(io.BufferedReader(plain))
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_record(line, f"{path}:{number}", text_field, group_field)


def read_parquet(path: str, start: int, stop: int | None, text_field: str, group_field: str | None) -> Records:
    """Rows of row groups start..stop-1; the text is a column."""
    from pyarrow import parquet

    with epath.Path(path).open("rb") as file:
        table = parquet.ParquetFile(file)
        if text_field not in table.schema_arrow.names:
            raise CallerError(f"text_field={text_field!r} must be a column of {path} ({table.schema_arrow.names})")
        stop = table.num_row_groups if stop is None else stop
        number = sum(table.metadata.row_group(group).num_rows for group in range(start))
        batches = table.iter_batches(RECORDS_AT_ONCE, row_groups=list(range(start, stop)), columns=[text_field])
        for batch in batches:
            for text in batch.column(0).to_pylist():
                number += 1
                where = f"{path}:{number}"
                yield Document(text) if isinstance(text, str) else BadRecord(where, f"has no text in {text_field!r}")


def read_array_record(path: str, start: int, stop: int | None, text_field: str, group_field: str | None) -> Records:
    """Records of an ArrayRecord shard: JSON objects with the text field, or plain UTF-8 text."""
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(path)
        total = reader.num_records()
        for first in range(0, total, RECORDS_AT_ONCE):
            records = reader.read(first, min(first + RECORDS_AT_ONCE, total))
            for number, record in enumerate(records, start=first + 1):
                yield _array_record(record, f"{path}:{number}", text_field, group_field)
        reader.close()
    except RuntimeError as error:
        raise OSError(str(error)) from None


def json_fields(line: bytes, where: str, text_field: str) -> dict | BadRecord:
    """The object of a JSON line that has a text in `text_field`, or what is wrong with it."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRecord(where, f"is not JSON ({str(error).splitlines()[0]})")
    if not isinstance(fields, dict) or not isinstance(fields.get(text_field), str):
        return BadRecord(where, f"has no text in field {text_field!r}")
    try:
        fields[text_field].encode()
    except UnicodeEncodeError:
        return BadRecord(where, "holds half of a surrogate pair, which UTF-8 cannot express")
    return fields


def _json_record(line: bytes, where: str, text_field: str, group_field: str | None) -> Document | BadRecord:
    fields = json_fields(line, where, text_field)
    if isinstance(fields, BadRecord):
        return fields
    return Document(fields[text_field], fields.get(group_field) if group_field else None)


def _array_record(record: bytes, where: str, text_field: str, group_field: str | None) -> Document | BadRecord:
    if record.lstrip()[:1] == b"{":
        document = _json_record(record, where, text_field, group_field)
        if isinstance(document, Document):
            return document
    try:
        return Document(record.decode())
    except UnicodeDecodeError:
        return BadRecord(where, "is neither UTF-8 text nor JSON")


def _count_lines(path: str, position: int) -> int:
    """Lines of a file that begin before byte `position`."""
    count = 0
    with epath.Path(path).open("rb") as file:
        while file.tell() < position:
            count += file.read(min(COUNT_BYTES, position - file.tell())).count(b"\n")
        if position:
            file.seek(position - 1)
            count += file.read(1) != b"\n"
    return count


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_text,
    ".py": read_python,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_compressed_jsonl,
    ".jsonl.zst": read_compressed_jsonl,
    ".parquet": read_parquet,
    ".array_record": read_array_record,
}
