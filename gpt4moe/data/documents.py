"""What a source yields: documents, and records that could not be read; which documents are held out."""

from __future__ import annotations

import dataclasses
import hashlib

IMAGE_MARKER = "<image>"
# A compressed file (PNG, JPEG, WebP), or those of the frames of a clip, which is one image to the model.
EncodedImage = bytes | tuple[bytes, ...]


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. Documents of one `group` stay on one side of the held-out split (None: the text is its own group).

    `images` stand where the markers `<image>` do, in their order; without markers all stand before the text. In a
    document without images `<image>` is plain text. `where` is what a bad record is named by: `file:line`.
    """

    text: str
    group: str | None = None
    images: tuple[EncodedImage, ...] = ()
    where: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that gives no document: `where` is `file:line` or `file:record`, `reason` what is wrong with it."""

    where: str
    reason: str


def texts_between(document: Document) -> tuple[str, ...]:
    """The texts before, between and behind the images; the text itself where there are none."""
    if not document.images:
        return (document.text,)
    texts = tuple(document.text.split(IMAGE_MARKER))
    return texts if len(texts) > 1 else ("",) * len(document.images) + texts


def marker_mismatch(text: str, num_images: int) -> str | None:
    """What is wrong where `text` does not have one marker an image, None where it has, or has no marker at all."""
    markers = text.count(IMAGE_MARKER)
    return None if markers in (0, num_images) else f"has {markers} {IMAGE_MARKER} markers and {num_images} images"


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether `document` is kept for evaluation: a hash of its group or text falls into the first `fraction`."""
    key = document.text if document.group is None else document.group
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
