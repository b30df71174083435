"""The text that merges are learned from: a bounded sample of the training documents of all sources."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

from gpt4moe.config.data import DataConfig
from gpt4moe.data.documents import BadRecord, Document, is_held_out, marker_mismatch, texts_between
from gpt4moe.data.encode import Unit
from gpt4moe.data.files import read_documents


def training_texts(config: DataConfig, units: Sequence[Unit]) -> Iterator[str]:
    """Training documents for the merges, at most `train_bytes`; each source gets an equal share, or all it has.

    Parts of files are taken in the order of a hash of their number, so that a large folder is sampled all over and
    the same files give the same merges wherever they lie. Sources that are held out as a whole are not read.
    """
    left = config.tokenizer.train_bytes
    sizes = {source.name: 0 for source in config.sources if source.is_trained}
    for unit in units:
        if unit.source in sizes:
            sizes[unit.source] += unit.size
    for rank, name in enumerate(sorted(sizes, key=sizes.get)):
        share = left / (len(sizes) - rank)
        spent = 0
        for text in _source_texts(name, units, config.held_out_fraction, share):
            spent += len(text.encode())
            yield text
        left -= spent


def _source_texts(name: str, units: Sequence[Unit], held_out_fraction: float, share: float) -> Iterator[str]:
    """Documents of one source that are not held out, cut off at `share` bytes.

    Where the hash holds out all of them (a source of one file, whose tail is held out instead), all are taken.
    """
    for fraction in (held_out_fraction, 0.0):
        spent = 0
        for document in _sampled(name, units):
            if not is_held_out(document, fraction):
                text = "".join(texts_between(document))[: math.ceil(share - spent)]
                spent += len(text.encode())
                yield text
            if spent >= share:
                break
        if spent:
            return


def _sampled(source: str, units: Sequence[Unit]) -> Iterator[Document]:
    files = [(file, unit) for unit in units if unit.source == source for file in unit.files]
    for number in sorted(range(len(files)), key=lambda number: hashlib.blake2b(str(number).encode()).digest()):
        file, unit = files[number]
        for record in read_documents(file, unit.text_field, unit.group_field, unit.image_field):
            bad = isinstance(record, BadRecord) or (record.images and marker_mismatch(record.text, len(record.images)))
            if not bad:
                yield record
