"""How well a model reads: held-out images transcribed, character error rate, with the images and without them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.data.store import TokenStore
from gpt4moe.infer.batches import batches
from gpt4moe.infer.generate import generate_ids
from gpt4moe.infer.pictures import Picture, fitted_picture
from gpt4moe.infer.spelled import spell
from gpt4moe.infer.trained import Trained

ROWS = 64


@dataclasses.dataclass(frozen=True)
class Transcription:
    """Held-out transcriptions of one source.

    character_error_rate: edits a character of the references, blanks run together, Unicode NFC; exact_match: share
    without any. *_without_image: the same of what the model writes when it may not look: what it knows of the language.
    examples: the first references with what was read. *_spelled: of what the encoder spells by itself, None of one that
    has not learned it.
    """

    documents: int
    character_error_rate: float
    exact_match: float
    character_error_rate_without_image: float
    exact_match_without_image: float
    examples: tuple[tuple[str, str], ...]
    character_error_rate_spelled: float | None = None
    exact_match_spelled: float | None = None


def transcribe(
    trained: Trained, store: TokenStore, *, limit: int = 256, progress: Callable[[str], None] | None = None
) -> dict[str, Transcription]:
    """Reads at most `limit` held-out documents of each source of one image first and its text behind it, greedily.

    progress: called with a line of text before every `ROWS` of them, with the images and without.
    """
    say = progress or (lambda line: None)
    results = {}
    for source in store.source_names:
        prompts, references, images = held_out_images(store, source, limit)
        if prompts:
            pictures = [fitted_picture(image, trained.config.data.images) for image in images]
            blank = [Picture(picture.pixels, np.zeros_like(picture.valid)) for picture in pictures]
            seen, blind = (
                read(trained, prompts, references, each, functools.partial(_tell, say, what))
                for each, what in ((pictures, source), (blank, f"{source} without its images"))
            )
            vision = trained.model.config.vision
            spelled = spell(trained.model, pictures) if vision is not None and vision.spelling else None
            results[source] = _scored(trained, references, seen, blind, spelled)
    return results


def _tell(say: Callable[[str], None], what: str, done: int, total: int) -> None:
    say(f"reading {what}: {done} of {total} held-out documents")


def format_transcriptions(results: dict[str, Transcription]) -> str:
    """The table that a run which reads images ends with."""
    if not results:
        return ""
    width = max(len("read"), *map(len, results))
    spells = any(result.character_error_rate_spelled is not None for result in results.values())
    also = "  by the encoder   exact" if spells else ""
    lines = [f"{'read':{width}}  character errors  exact  without image   exact{also}  documents"]
    for source, result in results.items():
        seeing = f"{result.character_error_rate:16.1%} {result.exact_match:6.1%}"
        blind = f"{result.character_error_rate_without_image:14.1%} {result.exact_match_without_image:7.1%}"
        alone = f"{result.character_error_rate_spelled:16.1%} {result.exact_match_spelled:7.1%}" if spells else ""
        lines.append(f"{source:{width}}  {seeing} {blind}{alone} {result.documents:10,d}")
    return "\n".join(lines)


def edit_distance(one: str, other: str) -> int:
    """Insertions, deletions and replacements of characters that make `other` of `one` (Levenshtein 1966)."""
    letters, at = np.array([*other]), np.arange(len(other) + 1)
    row = at
    for count, letter in enumerate(one, start=1):
        # Without insertions first; then each place is reached from the best one before it.
        replaced = np.minimum(row[1:] + 1, row[:-1] + (letters != letter))
        row = np.minimum.accumulate(np.concatenate([[count], replaced]) - at) + at
    return int(row[-1])


def held_out_images(store: TokenStore, source: str, limit: int) -> tuple[list, list, list]:
    """Prompts of ids up to their image, the ids behind it and the compressed image of documents that begin with one."""
    images = store.images(source, "held_out")
    if images is None:
        return [], [], []
    prompts, references, encoded = [], [], []
    stream, offsets = store.stream(source, "held_out"), store.offsets(source, "held_out")
    for start, end in itertools.pairwise(offsets.tolist()):
        first, last = images.within(start, end)
        if last - first == 1 and images.positions[first] == start + 1 and len(prompts) < limit:
            prompts.append(stream[start : start + 2].tolist())
            references.append(stream[start + 2 : end].tolist())
            encoded.append(images[first])
    return prompts, references, encoded


def read(
    trained: Trained,
    prompts: list,
    references: list,
    pictures: Sequence[Picture],
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """What the model writes after each prompt, half as much again as there is to read at most.

    progress: called with how many are read and are to be, before every `ROWS` of them.
    """
    most = max(map(len, references))
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=most + most // 2 + 1)
    made = []
    for rows in batches(len(prompts), ROWS):
        if progress:
            progress(rows[0], len(prompts))
        ids, of_rows = [prompts[row] for row in rows], [[pictures[row]] for row in rows]
        made += generate_ids(trained.model, trained.tokenizer, ids, sampling, of_rows)
    return made[: len(prompts)]


def _scored(trained: Trained, references: list, read: list, blind: list, spelled: list | None = None) -> Transcription:
    texts, seen, unseen, alone = (
        [normalised(trained.tokenizer.decode(ids)) for ids in each or []] for each in (references, read, blind, spelled)
    )
    length = max(sum(map(len, texts)), 1)
    of_encoder = {}
    if spelled is not None:
        wrong, right = sum(map(edit_distance, texts, alone)) / length, _exact(texts, alone)
        of_encoder = {"character_error_rate_spelled": wrong, "exact_match_spelled": right}
    return Transcription(
        documents=len(texts),
        character_error_rate=sum(map(edit_distance, texts, seen)) / length,
        exact_match=_exact(texts, seen),
        character_error_rate_without_image=sum(map(edit_distance, texts, unseen)) / length,
        exact_match_without_image=_exact(texts, unseen),
        examples=tuple(zip(texts[:5], seen[:5], strict=True)),
        **of_encoder,
    )


def _exact(texts: list[str], read: list[str]) -> float:
    return sum(a == b for a, b in zip(texts, read, strict=True)) / len(texts)


def normalised(text: str) -> str:
    """The text that is compared: Unicode NFC, blanks and line ends run together."""
    return " ".join(unicodedata.normalize("NFC", text).split())
