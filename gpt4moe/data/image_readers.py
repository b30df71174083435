"""Readers of files with images and text, one a format: a source whose `image_field` is given is read by these.

* Image files with a caption of the same name: `a.png` and `a.txt`, or `a.json` whose text field is the caption.
  Suffixes in small or capital letters, here as everywhere.
* JSON lines, also in a folder of images (`captions.jsonl`, `metadata.jsonl`): the image field (or `file_name`) holds
  one image or a list of them, which stand where the text has its `<image>` markers. An image is a path below the file's
  folder, a base64 `data:` URL, or a clip: a list of these, or a folder of frames, taken in the order of their names.
* WebDataset `.tar`: members of one name up to the first dot are one document, images in the order of the archive, its
  `.txt` or `.json` the text.
* `.parquet`: the column holds image files, or structs of `bytes` and `path` as in Hugging Face datasets, or lists.

A record without images is a document too; one with `<image>` in its text is a bad record then, and a file of which no
record has the field is an error. Of an animated file the first frame is read.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from gpt4moe.config.check import CallerError
from gpt4moe.data.documents import IMAGE_MARKER, BadRecord, Document, EncodedImage, marker_mismatch
from gpt4moe.data.readers import Records, json_fields, read_lines

ImageReader = Callable[[str, int, int | None, str, str | None, str], Records]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
CAPTION_SUFFIXES = (".txt", ".json", ".TXT", ".JSON")
FILE_NAME = "file_name"
# Raise when another document is read from the same files.
READERS_VERSION = 2
SHOWN_FIELDS = 8
# Rows of a Parquet file that are in memory at once.
ROWS_AT_ONCE = 64


class _BadImageError(Exception):
    """An image that a record speaks of and that cannot be had; the text says why."""


def read_image_file(
    path: str, start: int, stop: int | None, text_field: str, group_field: str | None, image_field: str
) -> Records:
    """An image with its caption in the .txt or .json of the same name: one document."""
    caption = caption_of(path)
    if caption is None:
        stem = epath.Path(os.path.splitext(path)[0]).name
        yield BadRecord(path, f"has no caption in {stem}.txt or {stem}.json")
        return
    try:
        found = _caption(_content(caption), caption.suffix.lower(), path, text_field)
        yield found if isinstance(found, BadRecord) else _document(path, found, [_content(epath.Path(path))])
    except _BadImageError as error:
        yield BadRecord(path, str(error))


def caption_of(path: str) -> epath.Path | None:
    """The file with the text of an image file, None where there is none."""
    stem = os.path.splitext(path)[0]
    return next((file for suffix in CAPTION_SUFFIXES if (file := epath.Path(stem + suffix)).exists()), None)


def read_image_jsonl(
    path: str, start: int, stop: int | None, text_field: str, group_field: str | None, image_field: str
) -> Records:
    """Lines that begin in bytes start..stop-1; `CallerError` where no line of the file has a field of images.

    Lines with a group are those of a source function (`data.spool`), which says itself what has images.
    """
    folder, of_function = os.path.dirname(path), group_field is not None
    if start == 0 and not of_function:
        _require_field(path, image_field)

    def parse(line: bytes) -> Document | BadRecord:
        fields = json_fields(line, path, text_field)
        if isinstance(fields, BadRecord):
            return fields
        group = fields.get(group_field) if group_field else None
        named = fields.get(image_field, fields.get(FILE_NAME))
        if named is None and of_function:
            return Document(fields[text_field], group)
        if named is None:
            return _without_images(path, fields[text_field], image_field)
        try:
            images = [_named(one, folder) for one in (named if isinstance(named, list) else [named])]
        except _BadImageError as error:
            return BadRecord(path, str(error))
        return _document(path, fields[text_field], images, group)

    return read_lines(path, start, stop, parse)


def read_image_tar(
    path: str, start: int, stop: int | None, text_field: str, group_field: str | None, image_field: str
) -> Records:
    """An uncompressed WebDataset shard. Nothing is unpacked to the disk, so that names in it can do no harm."""
    with epath.Path(path).open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for key, members in _samples(archive):
            yield _tar_document(f"{path}:{key}", members, text_field)


def read_image_parquet(
    path: str, start: int, stop: int | None, text_field: str, group_field: str | None, image_field: str
) -> Records:
    """Rows of row groups start..stop-1."""
    from pyarrow import parquet

    folder = os.path.dirname(path)
    with epath.Path(path).open("rb") as file:
        table = parquet.ParquetFile(file)
        for setting, name in (("text_field", text_field), ("image_field", image_field)):
            if name not in table.schema_arrow.names:
                raise CallerError(f"{setting}={name!r} must be a column of {path} ({table.schema_arrow.names})")
        stop = table.num_row_groups if stop is None else stop
        number = sum(table.metadata.row_group(group).num_rows for group in range(start))
        columns, groups = [text_field, image_field], list(range(start, stop))
        for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=columns):
            texts, cells = (batch.column(name).to_pylist() for name in columns)
            for text, cell in zip(texts, cells, strict=True):
                number += 1
                yield _parquet_document(f"{path}:{number}", text, cell, folder, text_field, image_field)


def _document(where: str, text: str, images: list[EncodedImage], group: str | None = None) -> Document | BadRecord:
    reason = marker_mismatch(text, len(images))
    return BadRecord(where, reason) if reason else Document(text, group, tuple(images), where)


def _without_images(where: str, text: str, image_field: str) -> Document | BadRecord:
    """A record that has no image. Its markers would be trained on as text, were they not a mistake."""
    markers = text.count(IMAGE_MARKER)
    reason = f"has {markers} {IMAGE_MARKER} markers and nothing in field {image_field!r}"
    return BadRecord(where, reason) if markers else Document(text)


def _require_field(path: str, image_field: str) -> None:
    """Raises `CallerError` where no line has the field, which is then misspelt: all images would be lost.

    The first line of a file mostly answers; one without any image is read to its end.
    """
    seen: dict[str, None] = {}
    with epath.Path(path).open("rb") as file:
        for line in file:
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):  # counted where it is read
                continue
            if isinstance(fields, dict) and (image_field in fields or FILE_NAME in fields):
                return
            seen |= dict.fromkeys(fields if isinstance(fields, dict) else ())
    if seen:
        shown = list(seen)[:SHOWN_FIELDS]
        raise CallerError(f"image_field={image_field!r} must be a field of some line of {path} ({shown})")


def _caption(raw: bytes, suffix: str, where: str, text_field: str) -> str | BadRecord:
    if suffix == ".json":
        fields = json_fields(raw, where, text_field)
        return fields if isinstance(fields, BadRecord) else fields[text_field]
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError:
        return BadRecord(where, "has a caption that is not UTF-8")


def _named(image: Any, folder: str) -> EncodedImage:
    """The image that a record names by path, `data:` URL or struct, or the clip that a list or a folder is."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
        return image["bytes"]
    if isinstance(image, dict):
        image = image.get("path")
    if isinstance(image, list):
        return tuple(frame for one in image for frame in _frames(_named(one, folder)))
    if not isinstance(image, str) or not image:
        raise _BadImageError("has an image that is neither a path nor a data: URL")
    return _from_url(image) if image.startswith("data:") else _from_path(image, folder)


def _frames(image: EncodedImage) -> tuple[bytes, ...]:
    return (image,) if isinstance(image, bytes) else image


def _from_url(url: str) -> bytes:
    head, comma, content = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise _BadImageError("has a data: URL that is not base64")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise _BadImageError("has a data: URL that is not base64") from None


def _from_path(name: str, folder: str) -> EncodedImage:
    """A file below `folder`, or what a link there points to: folders of links are common, and the user's own.

    A name does not lead out of the folder. Data may come from anyone: no other file of the machine is read for it.
    """
    is_remote = "://" in folder
    below = posixpath.normpath(name) if is_remote else os.path.relpath(os.path.join(folder, name), folder or ".")
    if "://" in name or below.startswith(("/", "..")):
        raise _BadImageError(f"names the image {name!r}, which is not in the folder of the file")
    found = epath.Path(folder) / below
    if not found.is_dir():
        return _named_content(found, name)
    frames = sorted(frame.name for frame in found.iterdir() if frame.name.lower().endswith(IMAGE_SUFFIXES))
    return tuple(_named_content(found / frame, f"{name}/{frame}") for frame in frames)


def _named_content(file: epath.Path, name: str) -> bytes:
    try:
        return _content(file)
    except _BadImageError as error:
        raise _BadImageError(f"names the image {name!r}, which {error}") from None


def _content(file: epath.Path) -> bytes:
    """The bytes of a file; `_BadImageError` for one that is not there or may not be read, and for what is no file."""
    # Nor is a device or a pipe read, which may never end.
    if "://" not in os.fspath(file) and not os.path.isfile(file):
        raise _BadImageError("is not a file")
    try:
        return file.read_bytes()
    except (FileNotFoundError, PermissionError) as error:
        raise _BadImageError(f"cannot be read ({error.strerror or type(error).__name__})") from None


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Members of one name up to its first dot, which follow one another, as (name, content by the rest of the name)."""
    key, members = None, {}
    for member in archive:
        base = member.name.rpartition("/")[2]
        if not member.isfile() or base.startswith("."):
            continue
        stem, _, rest = base.partition(".")
        name = member.name[: len(member.name) - len(base)] + stem
        if name != key and members:
            yield key, members
            members = {}
        key = name
        members[rest.lower()] = archive.extractfile(member).read()
    if members:
        yield key, members


def _tar_document(where: str, members: dict[str, bytes], text_field: str) -> Document | BadRecord:
    images = [content for rest, content in members.items() if f".{rest}".endswith(IMAGE_SUFFIXES)]
    suffix = next((suffix for suffix in ("txt", "json") if suffix in members), None)
    if suffix is None or not images:
        return BadRecord(where, f"has no {'text' if images else 'image'}, but {' '.join(members)}")
    found = _caption(members[suffix], f".{suffix}", where, text_field)
    return found if isinstance(found, BadRecord) else _document(where, found, images)


def _parquet_document(
    where: str, text: Any, cell: Any, folder: str, text_field: str, image_field: str
) -> Document | BadRecord:
    if not isinstance(text, str):
        return BadRecord(where, f"has no text in {text_field!r}")
    if cell is None:
        return _without_images(where, text, image_field)
    try:
        images = [_named(image, folder) for image in (cell if isinstance(cell, list) else [cell])]
    except _BadImageError as error:
        return BadRecord(where, str(error))
    return _document(where, text, images)


IMAGE_READERS: dict[str, ImageReader] = {
    **dict.fromkeys(IMAGE_SUFFIXES, read_image_file),
    ".jsonl": read_image_jsonl,
    ".tar": read_image_tar,
    ".parquet": read_image_parquet,
}
