"""The readers: every format gives the same documents, bad records are named by file and line, parts add up."""

import gzip
import json

import pyarrow as pa
import pytest
import zstandard
from array_record.python import array_record_module
from pyarrow import parquet

from gpt4moe.data.documents import BadRecord, Document
from gpt4moe.data.files import FilePart, cut_file, find_files, read_documents

TEXTS = ["first document\n", "caf\u00e9 \U0001f642", "third,\nof two lines\n"]


def write_all(folder):
    """The same documents in every format."""
    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    parquet.write_table(pa.table({"text": TEXTS, "n": [1, 2, 3]}), folder / "d.parquet", row_group_size=1)
    writer = array_record_module.ArrayRecordWriter(str(folder / "e.array_record"), "group_size:1")
    for text in TEXTS:
        writer.write(json.dumps({"text": text}).encode())
    writer.close()


def documents(path, text_field="text"):
    return list(read_documents(FilePart(str(path), 0), text_field))


def test_every_format_gives_the_same_documents(tmp_path):
    write_all(tmp_path)
    files = find_files((str(tmp_path),))
    assert len(files) == 5
    for file in files:
        assert [document.text for document in documents(file)] == TEXTS, file


def test_plain_files_are_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "b.md").write_text("# title")
    (tmp_path / "c.py").write_bytes("# -*- coding: latin-1 -*-\n'caf\u00e9'".encode("latin-1"))
    assert documents(tmp_path / "a.txt") == [Document("one\ntwo")]
    assert documents(tmp_path / "b.md") == [Document("# title")]
    assert documents(tmp_path / "c.py")[0].text.endswith("'caf\u00e9'")


def test_bad_records_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n{"text": \n{"other": 1}\n[1]\n{"text": "\\ud800"}\n{"text": "also good"}')
    found = documents(path)
    assert [item.where.rsplit(":")[-1] for item in found if isinstance(item, BadRecord)] == ["3", "4", "5", "6"]
    assert [item.text for item in found if isinstance(item, Document)] == ["good", "also good"]
    (tmp_path / "b.txt").write_bytes(b"one\ntwo \xff")
    assert documents(tmp_path / "b.txt") == [BadRecord(f"{tmp_path}/b.txt:2", "is not UTF-8")]


@pytest.mark.parametrize("target", [1, 7, 40, 100, 10_000])
def test_parts_of_a_file_hold_every_record_once(tmp_path, target):
    lines = [json.dumps({"text": "x" * (7 * index % 50)}) if index % 9 else "broken" for index in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    parquet.write_table(
        pa.table({"text": [str(index) for index in range(40)]}), tmp_path / "b.parquet", row_group_size=7
    )
    for path in map(str, (tmp_path / "a.jsonl", tmp_path / "b.parquet")):
        parts = cut_file(path, target)
        joined = [document for part in parts for document in read_documents(part, "text")]
        assert joined == documents(path)
    bad = [int(item.where.rsplit(":")[1]) for item in documents(tmp_path / "a.jsonl") if isinstance(item, BadRecord)]
    assert bad == [1, 10, 19, 28, 37]


def test_globs_directories_and_files_are_found_once_and_sorted(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.md", "deep/ignored.bin", ".hidden/d.md"):
        (tmp_path / name).write_text("x")
    names = ["a.txt", "b.txt", "deep/c.md"]
    assert find_files((str(tmp_path), f"{tmp_path}/*.txt")) == tuple(f"{tmp_path}/{name}" for name in names)
    assert find_files((f"{tmp_path}/**/*.md",)) == (f"{tmp_path}/deep/c.md",)


@pytest.mark.parametrize("path", ["nothing/here.txt", "*.nothing", "deep"])
def test_paths_that_name_nothing_are_one_line_errors(tmp_path, path):
    (tmp_path / "deep").mkdir()
    with pytest.raises(ValueError, match=r"^paths=[^\n]+$"):
        find_files((f"{tmp_path}/{path}",))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000)[:-12]),
        ("a.jsonl.gz", b"not gzip"),
        ("a.jsonl.zst", b"not zstandard"),
        ("a.parquet", b"not parquet"),
        ("a.array_record", b"not array record" * 10_000),
    ],
    # Names that every process that runs tests finds alike: compressed bytes hold the time.
    ids=["cut gzip", "gzip", "zstandard", "parquet", "array record"],
)
def test_damaged_files_are_one_line_errors(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^paths='[^\n]*{name}' cannot be read: [^\n]+$"):
        documents(tmp_path / name)


def test_a_column_that_is_not_there_is_a_one_line_error(tmp_path):
    write_all(tmp_path)
    with pytest.raises(ValueError, match="text_field='body' must be a column"):
        documents(tmp_path / "d.parquet", "body")
    assert all(isinstance(item, BadRecord) for item in documents(tmp_path / "a.jsonl", "body"))
