"""Readers of images: every format gives the same documents; nothing outside the folder is read; bad ones are named."""

import base64
import io
import json
import os
import re
import tarfile

import pyarrow as pa
import pytest
from pyarrow import parquet

from gpt4moe.config.data import DataConfig, SourceConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.data.documents import BadRecord, Document
from gpt4moe.data.files import FilePart, cut_file, find_files, read_documents
from gpt4moe.data.prepare import prepare
from gpt4moe.data.sources import source_identity
from tests.data.image_documents import IMAGES, config_of, picture

CAPTIONS = {"a": "a red square", "b": "caf\u00e9", "c": "third\nof two lines"}
FILES = {name: picture(red) for red, name in enumerate(CAPTIONS, start=1)}
EXPECTED = [Document(text, images=(FILES[name],)) for name, text in CAPTIONS.items()]


def url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def write_images(folder, suffix=".png"):
    folder.mkdir(exist_ok=True)
    for name, data in FILES.items():
        (folder / f"{name}{suffix}").write_bytes(data)


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def jsonl(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def documents(path, **fields):
    found = []
    for file in find_files((str(path),), "images"):
        found += read_documents(FilePart(file, 0), **{"text_field": "text", "image_field": "images"} | fields)
    return found


def write_captioned(folder, suffix):
    write_images(folder)
    for name, text in CAPTIONS.items():
        content = text if suffix == ".txt" else json.dumps({"text": text})
        (folder / f"{name}{suffix}").write_text(content)


def write_table(folder, line_of):
    write_images(folder)
    jsonl(folder / "metadata.jsonl", *(line_of(name, text) for name, text in CAPTIONS.items()))


def write_parquet(folder, cell_of):
    folder.mkdir()
    columns = {"text": list(CAPTIONS.values()), "images": [cell_of(name) for name in CAPTIONS]}
    parquet.write_table(pa.table(columns), folder / "a.parquet", row_group_size=2)


WRITERS = {
    "captions in .txt": lambda folder: write_captioned(folder, ".txt"),
    "captions in .json": lambda folder: write_captioned(folder, ".json"),
    "metadata.jsonl": lambda folder: write_table(folder, lambda name, text: {"file_name": f"{name}.png", "text": text}),
    "a list of paths": lambda folder: write_table(
        folder, lambda name, text: {"images": [f"./{name}.png"], "text": text}
    ),
    "data: URLs": lambda folder: write_table(folder, lambda name, text: {"images": [url(FILES[name])], "text": text}),
    "parquet bytes": lambda folder: write_parquet(folder, FILES.get),
    "parquet structs": lambda folder: write_parquet(folder, lambda name: {"bytes": FILES[name], "path": None}),
    "parquet lists": lambda folder: write_parquet(folder, lambda name: [{"bytes": FILES[name], "path": "x"}]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path, name):
    WRITERS[name](tmp_path / "data")
    found = documents(tmp_path / "data")
    assert found == EXPECTED
    assert all(document.where.startswith(str(tmp_path)) for document in found)


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_a_webdataset_shard_gives_the_same_documents(tmp_path, suffix):
    members = []
    for name, text in CAPTIONS.items():
        content = text if suffix == "txt" else json.dumps({"text": text})
        members += [(f"{name}.png", FILES[name]), (f"{name}.{suffix}", content.encode())]
    write_tar(tmp_path / "a.tar", members)
    assert documents(tmp_path) == EXPECTED


def test_a_shard_with_several_images_a_sample_or_none(tmp_path):
    interleaved = [("x/1.0.png", FILES["a"]), ("x/1.1.png", FILES["b"]), ("x/1.txt", b"<image>one<image>two")]
    bad = [("x/2.txt", b"no image"), ("x/3.png", FILES["c"]), ("y/3.txt", b"of another folder")]
    write_tar(tmp_path / "a.tar", interleaved + bad)
    good, *others = documents(tmp_path)
    assert good == Document("<image>one<image>two", images=(FILES["a"], FILES["b"]))
    assert others == [
        BadRecord(f"{tmp_path}/a.tar:x/2", "has no image, but txt"),
        BadRecord(f"{tmp_path}/a.tar:x/3", "has no text, but png"),
        BadRecord(f"{tmp_path}/a.tar:y/3", "has no image, but txt"),
    ]


def test_interleaved_lines_clips_and_plain_text(tmp_path):
    write_images(tmp_path / "clip")
    (tmp_path / "clip" / "notes.md").write_text("no frame")
    frames = tuple(FILES.values())
    path = jsonl(
        tmp_path / "a.jsonl",
        {"text": "<image>one<image>two", "images": ["clip/b.png", url(FILES["a"])]},
        {"text": "0 red\n1 green", "images": ["clip"]},
        {"text": "a list of frames", "images": [["clip/c.png", url(FILES["a"])]]},
        {"text": "no image"},
    )
    assert documents(path) == [
        Document("<image>one<image>two", images=(FILES["b"], FILES["a"])),
        Document("0 red\n1 green", images=(frames,)),
        Document("a list of frames", images=((FILES["c"], FILES["a"]),)),
        Document("no image"),
    ]


def test_a_marker_without_an_image_is_no_text(tmp_path):
    """Of functions and of sources without images it is; here a field was forgotten, or is misspelt in one line."""
    write_images(tmp_path)
    path = jsonl(
        tmp_path / "a.jsonl",
        {"text": "<image>one", "images": ["a.png"]},
        {"text": "<image>two", "image": ["b.png"]},
        {"text": "<image><image>", "images": None},
    )
    lost = [
        BadRecord(f"{path}:{line}", f"has {line - 1} <image> markers and nothing in field 'images'") for line in (2, 3)
    ]
    assert documents(path)[1:] == lost
    table = pa.table({"text": ["x", "<image>y", "z"], "images": [FILES["a"], None, None]})
    parquet.write_table(table, tmp_path / "b.parquet")
    lost = BadRecord(f"{tmp_path}/b.parquet:2", "has 1 <image> markers and nothing in field 'images'")
    assert documents(tmp_path / "b.parquet")[1:] == [lost, Document("z")]
    assert list(read_documents(FilePart(str(path), 0), "text"))[1] == Document("<image>two")
    given = [Document("<image> is how HTML does not say it"), Document("seen", images=(FILES["a"],))]
    store = prepare(config_of(given), tmp_path / "store")
    assert (store.sources[0].documents, store.sources[0].bad_records, store.sources[0].images) == (2, 0, 1)


def test_a_file_without_the_field_is_one_line(tmp_path):
    write_images(tmp_path)
    lines = [{"text": f"<image>{index}", "image": ["a.png"]} for index in range(20)]
    path = jsonl(tmp_path / "a.jsonl", *lines, [1], "words")
    with pytest.raises(
        ValueError, match=rf"^image_field='images' must be a field of some line of {path} [^\n]*'image'"
    ):
        documents(path)
    config = SourceConfig("pictures", paths=str(path), image_field="images")
    with pytest.raises(ValueError, match="image_field='images' must be a field"):
        prepare(config_of((), sources=(config,)), tmp_path / "store")
    late = jsonl(tmp_path / "b.jsonl", *({"text": "words"} for _ in range(20)), {"text": "x", "images": ["a.png"]})
    assert sum(bool(document.images) for document in documents(late)) == 1
    assert len(documents(jsonl(tmp_path / "c.jsonl"))) == 0


def broken_files(folder):
    """Names of images of the folder that cannot be read, and why."""
    (folder / "d.png").symlink_to(folder / "nothing.png")
    (folder / "e.PNG").symlink_to(folder / "e.PNG")
    os.mkfifo(folder / "f.png")
    names = ["d.png", "e.PNG", "f.png"]
    if os.geteuid():  # to root every file is open
        (folder / "g.png").write_bytes(FILES["a"])
        (folder / "g.png").chmod(0)
        names.append("g.png")
    return names


REASON = r"(is not a file|cannot be read \(Permission denied\))"


@pytest.mark.parametrize("paths", ["", "*"])
def test_a_link_to_nothing_and_what_is_no_file_are_named(tmp_path, paths):
    write_captioned(folder := tmp_path / "data", ".txt")
    broken = broken_files(folder)
    if paths:
        (folder / broken.pop(2)).unlink()  # a pattern is of files and links
    for name in broken:
        (folder / f"{name[0]}.txt").write_text("lost")
    source = SourceConfig("pictures", paths=os.path.join(folder, paths), image_field="images")
    (report,) = prepare(config_of((), sources=(source,)), tmp_path / "store").sources
    assert (report.documents, report.bad_records) == (3, len(broken))
    for example, name in zip(report.bad_examples, broken, strict=True):
        assert re.fullmatch(f"{folder}/{name} {REASON}", example)


def test_a_line_that_names_what_cannot_be_read_is_a_bad_record(tmp_path):
    write_images(tmp_path / "clip")
    broken = [f"clip/{name}" for name in broken_files(tmp_path / "clip")]
    path = jsonl(tmp_path / "a.jsonl", *({"text": "x", "images": [name]} for name in [*broken, "clip"]))
    for name, record in zip([*broken, broken[0]], documents(path), strict=True):
        assert isinstance(record, BadRecord) and re.fullmatch(
            f"names the image '{name}', which {REASON}", record.reason
        )


def test_a_caption_that_cannot_be_read_is_a_bad_record(tmp_path):
    write_images(tmp_path)
    for name in FILES:
        (tmp_path / f"{name}.txt").mkdir()
    assert [record.reason for record in documents(tmp_path)] == ["is not a file"] * 3


def test_suffixes_may_be_in_capitals(tmp_path):
    write_captioned(tmp_path / "data", ".txt")
    for name in FILES:
        (tmp_path / "data" / f"{name}.png").rename(tmp_path / "data" / f"{name}.PNG")
    (tmp_path / "data/a.txt").rename(tmp_path / "data/a.TXT")
    (tmp_path / "data/b.txt").unlink()
    (tmp_path / "data/b.JSON").write_text(json.dumps({"text": CAPTIONS["b"]}))
    assert documents(tmp_path / "data") == EXPECTED
    source = SourceConfig("pictures", paths=str(tmp_path / "data"), image_field="images")
    assert [os.path.basename(file[0]) for file in source_identity(source)["files"]] == [
        "a.PNG", "b.PNG", "c.PNG", "a.TXT", "b.JSON", "c.txt"]  # fmt: skip
    write_tar(tmp_path / "A.TAR", [("1.JPG", FILES["a"]), ("1.TXT", CAPTIONS["a"].encode())])
    assert documents(tmp_path / "A.TAR") == EXPECTED[:1]
    table = jsonl(tmp_path / "data" / "B.JSONL", *({"text": str(index), "images": ["a.PNG"]} for index in range(20)))
    assert len(documents(tmp_path / "data")) == 20, "what a table speaks of is no document of its own"
    parts = cut_file(str(table), 200)
    assert len(parts) > 3 and sum(len(list(read_documents(part, "text", None, "images"))) for part in parts) == 20
    (tmp_path / "C.TXT").write_text("text")
    assert list(read_documents(FilePart(str(tmp_path / "C.TXT"), 0), "text")) == [Document("text")]


def test_bitmaps_are_read_by_every_reader(tmp_path):
    bitmap = picture(9, kind="BMP")
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a.bmp").write_bytes(bitmap)
    (tmp_path / "one/a.txt").write_text("x")
    write_tar(tmp_path / "two.tar", [("a.bmp", bitmap), ("a.txt", b"x")])
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/0.bmp").write_bytes(bitmap)
    line = jsonl(tmp_path / "three.jsonl", {"text": "x", "images": ["one/a.bmp"]}, {"text": "y", "images": ["clip"]})
    assert documents(tmp_path / "one") == documents(tmp_path / "two.tar") == [Document("x", images=(bitmap,))]
    assert documents(line) == [Document("x", images=(bitmap,)), Document("y", images=((bitmap,),))]


def test_parts_of_a_file_hold_every_record_once(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *({"text": str(index), "images": [url(picture(index))]} for index in range(20)))
    parts = cut_file(str(path), 700)
    assert len(parts) > 3
    joined = [document for part in parts for document in read_documents(part, "text", None, "images")]
    assert joined == documents(path) and [one.where for one in joined] == [f"{path}:{line}" for line in range(1, 21)]


OUTSIDE = ["../secret.png", "/etc/passwd", "clip/../../secret.png", "http://example.org/a.png", "file:///etc/passwd"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_the_folder_is_read(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(FILES["a"])
    write_images(tmp_path / "data")
    jsonl(tmp_path / "data" / "a.jsonl", {"text": "x", "images": [name]}, {"text": "y", "file_name": name})
    parquet.write_table(
        pa.table({"text": ["z"], "images": [{"bytes": None, "path": name}]}), tmp_path / "data" / "b.parquet"
    )
    found = documents(tmp_path / "data")
    assert [one.reason for one in found] == [f"names the image {name!r}, which is not in the folder of the file"] * 3
    assert [one.where.rsplit("/")[-1] for one in found] == ["a.jsonl:1", "a.jsonl:2", "b.parquet:1"]


def test_links_in_the_folder_are_followed_and_names_through_them_do_not_lead_out(tmp_path):
    """Folders of links are common, and the user's own; what a record says may come from anyone."""
    write_images(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "one.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "data" / "clip").symlink_to(tmp_path / "elsewhere")
    names = ["one.png", "clip/b.png", "clip", "clip/../../elsewhere/a.png"]
    path = jsonl(tmp_path / "data" / "a.jsonl", *({"text": name, "images": [name]} for name in names))
    *found, out = documents(path)
    assert [one.images for one in found] == [(FILES["a"],), (FILES["b"],), (tuple(FILES.values()),)]
    assert out.reason == f"names the image {names[-1]!r}, which is not in the folder of the file"


def test_an_absolute_path_into_the_folder_is_one_of_its_files(tmp_path):
    write_images(tmp_path)
    path = jsonl(tmp_path / "a.jsonl", {"text": "x", "images": [str(tmp_path / "a.png")]})
    assert documents(path) == [Document("x", images=(FILES["a"],))]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"text": "<image>", "images": []}, "has 1 <image> markers and 0 images"),
        ({"text": "<image><image>", "images": ["a.png"]}, "has 2 <image> markers and 1 images"),
        ({"text": "x", "images": ["none.png"]}, "names the image 'none.png', which is not a file"),
        ({"text": "x", "images": ["pipe"]}, "names the image 'pipe', which is not a file"),
        ({"text": "x", "images": ["data:image/png;base64,%%%"]}, "has a data: URL that is not base64"),
        ({"text": "x", "images": ["data:text/plain,hello"]}, "has a data: URL that is not base64"),
        ({"text": "x", "images": [7]}, "has an image that is neither a path nor a data: URL"),
        ({"text": "x", "images": [None]}, "has an image that is neither a path nor a data: URL"),
        ({"images": ["a.png"]}, "has no text in field 'text'"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, reason):
    write_images(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    path = jsonl(tmp_path / "a.jsonl", {"text": "good", "images": ["a.png"]}, line)
    assert documents(path)[1:] == [BadRecord(f"{path}:2", reason)]


def test_an_image_without_a_caption_and_a_damaged_shard(tmp_path):
    write_images(tmp_path / "data")
    assert documents(tmp_path / "data")[0] == BadRecord(f"{tmp_path}/data/a.png", "has no caption in a.txt or a.json")
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(ValueError, match=r"^paths='[^\n]*a.tar' cannot be read: [^\n]+$"):
        documents(tmp_path / "a.tar")
    write_parquet(tmp_path / "table", FILES.get)
    with pytest.raises(ValueError, match="image_field='picture' must be a column"):
        documents(tmp_path / "table", image_field="picture")


def test_a_changed_caption_or_image_is_another_source(tmp_path):
    write_captioned(tmp_path / "one", ".txt")
    write_table(tmp_path / "two", lambda name, text: {"file_name": f"{name}.png", "text": text})
    for folder, changed in (("one", "a.txt"), ("one", "a.png"), ("two", "a.png"), ("two", "metadata.jsonl")):
        source = SourceConfig("pictures", paths=(str(tmp_path / folder),), image_field="images")
        before = source_identity(source)
        os.utime(tmp_path / folder / changed, (0, 0))
        assert source_identity(source) != before


def test_a_folder_goes_through_prepare(tmp_path):
    write_captioned(tmp_path / "data", ".txt")
    (tmp_path / "data" / "d.png").write_bytes(b"")
    (tmp_path / "data" / "d.txt").write_text("empty")
    source = SourceConfig("pictures", paths=(str(tmp_path / "data"),), image_field="images")
    config = DataConfig((source,), 16, TokenizerConfig(byte_level_only=True), held_out_fraction=0.0, images=IMAGES)
    (report,) = prepare(config, tmp_path / "store").sources
    assert (report.documents, report.images, report.bad_records) == (3, 3, 1)
    assert report.bad_examples == (f"{tmp_path}/data/d.png has an image of zero bytes",)


def test_image_field_is_for_files_only():
    with pytest.raises(ValueError, match="image_field='images' is for files at paths, not for documents"):
        SourceConfig("a", documents=list, image_field="images")
