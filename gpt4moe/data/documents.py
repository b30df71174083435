"""What a source yields: documents, and records that could not be read; which documents are held out."""

from __future__ import annotations

import dataclasses
import hashlib


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. Documents of one `group` stay on one side of the held-out split (None: the text is its own group)."""

    text: str
    group: str | None = None


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that gives no document: `where` is `file:line` or `file:record`, `reason` what is wrong with it."""

    where: str
    reason: str


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether `document` is kept for evaluation: a hash of its group or text falls into the first `fraction`."""
    key = document.text if document.group is None else document.group
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
