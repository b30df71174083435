"""Documents of a source function on disk, so that they can be read again and in parallel."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable

from gpt4moe.config.check import require
from gpt4moe.config.data import SourceConfig
from gpt4moe.data.documents import Document, EncodedImage
from gpt4moe.data.sources import function_documents

# Fields of text, group and images.
SPOOL_FIELDS = ("text", "group", "images")
DATA_URL = "data:;base64,"


def spool_documents(
    source: SourceConfig, folder: pathlib.Path, file_bytes: int, progress: Callable[[str], None]
) -> tuple[str, ...]:
    """Writes the documents of `source` to .jsonl files of about `file_bytes` in `folder`, once; returns their paths."""
    if not folder.exists():
        documents = function_documents(source.documents)
        progress(f"collecting documents of {source.name}")
        scratch = folder.with_name(f"{folder.name}.writing-{os.getpid()}")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        with contextlib.ExitStack() as files:
            written = file_bytes
            for document in documents:
                if written >= file_bytes:
                    files.close()
                    name = f"{len(list(scratch.iterdir())):06d}.jsonl"
                    file, written = files.enter_context((scratch / name).open("w", encoding="utf-8")), 0
                written += file.write(_line(document))
        os.replace(scratch, folder)
    paths = tuple(str(path) for path in sorted(folder.iterdir()))
    require(bool(paths), "source", source.name, f"has no documents: {source.documents!r} yielded none")
    return paths


def _line(document: Document) -> str:
    text, group, images = SPOOL_FIELDS
    fields = {text: document.text, group: document.group}
    if document.images:
        fields[images] = [_as_url(image) for image in document.images]
    return json.dumps(fields) + "\n"


def _as_url(image: EncodedImage) -> str | list[str]:
    if isinstance(image, bytes):
        return DATA_URL + base64.b64encode(image).decode()
    return [_as_url(frame) for frame in image]
