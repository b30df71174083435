"""Finished parts of one source to the files of the store, and a held-out side for sources of very few documents."""

from __future__ import annotations

import hashlib
import pathlib
import shutil

import numpy as np

from gpt4moe.data import image_store
from gpt4moe.data.encode import BAD_EXAMPLES, SPLITS, Unit, UnitCounts, token_dtype
from gpt4moe.data.store import SourceReport
from gpt4moe.data.tokenizer import Tokenizer


def assemble(
    name: str,
    done: list[tuple[Unit, UnitCounts]],
    directory: pathlib.Path,
    tokenizer: Tokenizer,
    held_out_fraction: float,
) -> SourceReport:
    """Writes `NAME.SPLIT.tokens`, `.offsets.npy`, `.bytes.npy` and `NAME.train.counts.npy`; returns the counts.

    And the files of its images where it has any (see `data.image_store`).
    """
    lengths = {split: _joined(done, split, "lengths") for split in SPLITS}
    num_bytes = {split: _joined(done, split, "bytes") for split in SPLITS}
    for split in SPLITS:
        with (directory / f"{name}.{split}.tokens").open("wb") as out:
            for unit, _ in done:
                with (unit.folder / f"{split}.tokens").open("rb") as part:
                    shutil.copyfileobj(part, out, 1 << 24)
        parts = [(unit.folder / split, counts.tokens[split]) for unit, counts in done]
        image_store.join_images(parts, directory / f"{name}.{split}")
    if 0 < held_out_fraction < 1 and not (len(lengths["train"]) and len(lengths["held_out"])):
        _hold_out_a_tail(name, directory, tokenizer, held_out_fraction, lengths, num_bytes)
    dtype = token_dtype(tokenizer.vocab_size)
    for split in SPLITS:
        with (directory / f"{name}.{split}.tokens").open("ab") as out:
            out.write(np.asarray([tokenizer.end_of_text], dtype).tobytes())
        np.save(directory / f"{name}.{split}.offsets.npy", np.concatenate([[0], np.cumsum(lengths[split])]))
        np.save(directory / f"{name}.{split}.bytes.npy", num_bytes[split])
    digest = _save_counts(directory, name, dtype, tokenizer)
    images = {split: image_store.stored_images(directory / f"{name}.{split}") for split in SPLITS}
    return SourceReport(
        name=name,
        documents=len(lengths["train"]),
        tokens=int(lengths["train"].sum()),
        bytes=int(num_bytes["train"].sum()),
        held_out_documents=len(lengths["held_out"]),
        held_out_tokens=int(lengths["held_out"].sum()),
        held_out_bytes=int(num_bytes["held_out"].sum()),
        bad_records=sum(counts.bad_records for _, counts in done),
        bad_examples=tuple(example for _, counts in done for example in counts.bad_examples)[:BAD_EXAMPLES],
        empty_documents=sum(counts.empty_documents for _, counts in done),
        digest=digest,
        images=len(images["train"] or ()),
        held_out_images=len(images["held_out"] or ()),
        image_bytes=sum(found.num_bytes(len(found)) for found in images.values() if found),
    )


def _joined(done: list[tuple[Unit, UnitCounts]], split: str, kind: str) -> np.ndarray:
    return np.concatenate([np.load(unit.folder / f"{split}.{kind}.npy") for unit, _ in done])


def _hold_out_a_tail(
    name: str, directory: pathlib.Path, tokenizer: Tokenizer, fraction: float, lengths: dict, num_bytes: dict
) -> None:
    """Where the hash left a side empty (one large file): the end of the longest document becomes the held-out side."""
    full = "train" if len(lengths["train"]) else "held_out"
    dtype = token_dtype(tokenizer.vocab_size)
    tokens = np.fromfile(directory / f"{name}.{full}.tokens", dtype)
    starts = np.cumsum(lengths[full]) - lengths[full]
    longest = int(np.argmax(lengths[full]))
    cut = min(max(round(fraction * len(tokens)), 1), int(lengths[full][longest]) // 2)
    if cut == 0:
        return
    end = int(starts[longest] + lengths[full][longest])
    tail = tokens[end - cut : end]
    tail_bytes = tokenizer.count_bytes(tail)
    end_of_text = np.asarray([tokenizer.end_of_text], dtype)
    np.delete(tokens, np.s_[end - cut : end]).tofile(directory / f"{name}.train.tokens")
    np.concatenate([end_of_text, tail]).tofile(directory / f"{name}.held_out.tokens")
    rest, rest_bytes = lengths[full].copy(), num_bytes[full].copy()
    rest[longest] -= cut
    rest_bytes[longest] -= tail_bytes
    lengths.update(train=rest, held_out=np.asarray([cut + 1], np.int64))
    prefixes = {split: directory / f"{name}.{split}" for split in SPLITS}
    image_store.move_images(prefixes[full], end - cut, end, **prefixes)
    num_bytes.update(train=rest_bytes, held_out=np.asarray([tail_bytes], np.int64))


def _save_counts(directory: pathlib.Path, name: str, dtype: np.dtype, tokenizer: Tokenizer) -> str:
    """Saves how often every id is a target in training, [V] int64, for the unigram entropy; returns a hash of all.

    The token of an image is never a target.
    """
    stream = np.memmap(directory / f"{name}.train.tokens", dtype, "r")
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    digest = hashlib.blake2b(digest_size=8)
    for start in range(1, len(stream), 1 << 24):
        targets = stream[start : start + (1 << 24)]
        counts += np.bincount(targets, minlength=tokenizer.vocab_size)
        digest.update(targets)
    if tokenizer.image is not None:
        counts[tokenizer.image] = 0
    image_store.add_to_digest(digest, directory / f"{name}.train")
    np.save(directory / f"{name}.train.counts.npy", counts)
    return digest.hexdigest()
