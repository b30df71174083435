"""The token store: the tokens of every source and split on disk, memory-mapped, with what was counted on the way."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib

import numpy as np

from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.data.encode import token_dtype
from gpt4moe.data.image_store import StoredImages, stored_images
from gpt4moe.data.tokenizer import Tokenizer, load_tokenizer

REPORT_FILE = "report.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """What preparing one source met; `bad_examples` are its first bad records, at most `encode.BAD_EXAMPLES`.

    `tokens` count one end-of-text a document; bytes are those of the UTF-8 text. `digest` is a hash of the training
    tokens and images, the same wherever and from whichever copy of the files they were made. `image_bytes` are
    compressed, of both splits.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    held_out_documents: int
    held_out_tokens: int
    held_out_bytes: int
    bad_records: int
    bad_examples: tuple[str, ...]
    empty_documents: int
    digest: str
    images: int = 0
    held_out_images: int = 0
    image_bytes: int = 0

    @property
    def has_images(self) -> bool:
        """Whether any of its documents has an image."""
        return bool(self.images or self.held_out_images)


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """Where the store is, its tokenizer's size, and one report a source."""

    directory: str
    content_hash: str
    vocab_size: int
    sources: tuple[SourceReport, ...]

    def to_json(self) -> str:
        """The text of `report.json`; sources without images say nothing of them."""
        fields = dataclasses.asdict(self)
        for report, source in zip(self.sources, fields["sources"], strict=True):
            if not report.has_images:
                for name in ("images", "held_out_images", "image_bytes"):
                    del source[name]
        return json.dumps(fields, indent=1)


class TokenStore:
    """Read access to a prepared store.

    A document of n tokens lies on disk as end-of-text and its n tokens; the stream of a split ends with one more
    end-of-text, so that inputs are `stream[a:b]` and targets `stream[a+1:b+1]`, and every token of every document
    is a target exactly once, as is the end of every document. At most `held_out_limit` held-out tokens a source
    count as held out (whole documents, at least one). An image is one token of its document, and no target.
    """

    def __init__(
        self, directory: str | pathlib.Path, held_out_limit: int = 2**62, tokenizer: TokenizerConfig | None = None
    ) -> None:
        self.directory = pathlib.Path(directory)
        self.report = read_report(self.directory)
        self.content_hash = self.report.content_hash
        self.source_names = tuple(source.name for source in self.report.sources)
        self._held_out_limit, self._tokenizer = held_out_limit, tokenizer

    @property
    def digests(self) -> tuple[str, ...]:
        """Hash of the training tokens of every source."""
        return tuple(source.digest for source in self.report.sources)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the tokens were made with."""
        return load_tokenizer(self.directory / TOKENIZER_FILE, self._tokenizer)

    @functools.cache  # noqa: B019 - a store lives as long as the process that trains from it
    def stream(self, source: str, split: str) -> np.ndarray:
        """All tokens of a split, memory-mapped, [tokens + 1] uint16 or uint32."""
        return np.asarray(np.memmap(self._path(source, split, "tokens"), token_dtype(self.report.vocab_size), "r"))

    @functools.cache  # noqa: B019
    def offsets(self, source: str, split: str) -> np.ndarray:
        """Where the documents of a split start in its stream and where the last one ends, [documents + 1] int64."""
        offsets = np.load(self._path(source, split, "offsets.npy"))
        if split == "held_out":
            within = int(np.searchsorted(offsets, self._held_out_limit, side="right")) - 1
            offsets = offsets[: max(within, min(1, len(offsets) - 1)) + 1]
        return offsets

    def num_tokens(self, source: str, split: str) -> int:
        """Tokens of a split."""
        return int(self.offsets(source, split)[-1])

    def num_targets(self, source: str, split: str) -> int:
        """Targets of a split: as many as tokens, less those that are images."""
        images, tokens = self.images(source, split), self.num_tokens(source, split)
        return tokens if images is None else tokens - images.within(0, tokens)[1]

    @functools.cache  # noqa: B019
    def images(self, source: str, split: str) -> StoredImages | None:
        """The images of a split, memory-mapped; None where it has none."""
        return stored_images(self.directory / f"{source}.{split}")

    @property
    def sources_with_images(self) -> tuple[str, ...]:
        """Names of the sources of which any document has an image."""
        return tuple(source.name for source in self.report.sources if source.has_images)

    def held_out_bytes(self, source: str) -> int:
        """UTF-8 bytes that the held-out targets of `source` spell: nats / ln 2 / this is bits per byte."""
        counts = np.load(self._path(source, "held_out", "bytes.npy"))
        return int(counts[: len(self.offsets(source, "held_out")) - 1].sum())

    @functools.cache  # noqa: B019
    def unigram_nats(self, source: str) -> float:
        """Nats a target of the held-out text costs under token frequencies of the source's training text.

        Of all training text where the source has none. Frequencies are counts plus one over all ids; what a model
        that ignores the context could reach.
        """
        trained = (source,) if self.num_tokens(source, "train") else self.source_names
        counts = sum(np.load(self._path(name, "train", "counts.npy")) for name in trained) + 1.0
        held_out = self.stream(source, "held_out")[1 : self.num_tokens(source, "held_out") + 1]
        if source in self.sources_with_images:
            held_out = held_out[held_out != self.tokenizer.image]
        return float(np.mean(math.log(counts.sum()) - np.log(counts[held_out]))) if len(held_out) else math.nan

    def unigram_bits_per_byte(self, source: str) -> float:
        """`unigram_nats` in bits a byte of the held-out text."""
        num_bytes = self.held_out_bytes(source)
        targets = self.num_targets(source, "held_out")
        return self.unigram_nats(source) * targets / math.log(2) / num_bytes if num_bytes else math.nan

    def _path(self, source: str, split: str, kind: str) -> pathlib.Path:
        return self.directory / f"{source}.{split}.{kind}"


def read_report(directory: pathlib.Path) -> PrepareReport:
    """The report of a complete store; FileNotFoundError where there is none."""
    fields = json.loads((directory / REPORT_FILE).read_text())
    sources = tuple(
        SourceReport(**source | {"bad_examples": tuple(source["bad_examples"])}) for source in fields["sources"]
    )
    return PrepareReport(**fields | {"directory": str(directory), "sources": sources})
