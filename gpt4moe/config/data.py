"""What a run reads: sources, their weights and epoch caps, tokenizer, rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from gpt4moe.config.check import (
    require,
    require_count,
    require_flag,
    require_fraction,
    require_instance,
    require_not_negative,
    require_positive,
    require_seed,
    require_text,
    require_texts,
)
from gpt4moe.config.tokenizer import TokenizerConfig

BAD_RECORD_ACTIONS = ("count", "stop")
FITS = ("squash", "pad", "crop", "tile", "lines")
# Fits that make several pieces of one image.
PIECES = ("tile", "lines")
# Pixels below which a piece cannot hold a line of text.
LEAST_SIDE = 8


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One named source of documents, with or without images: files at `paths`, or `documents`, a function.

    `paths` are files, directories or globs of .txt .md .py .jsonl[.gz|.zst] .parquet .array_record; `text_field` is
    the text column or key of those that have one. `image_field` says that the files hold images with text, and
    names the column or key of the images (see `gpt4moe.data.image_readers`): .parquet, .jsonl and .tar, or .png
    .jpg .jpeg .webp .gif .bmp with a .txt or .json of the same name. `documents` is behind the contract of
    `gpt4moe.data.sources`; it gives images by itself. `weight` is the share of training tokens (relative to the
    other sources); 0: the source is never trained on and all of it is held out, to see how well a model does on a
    kind of text that it has not met. `max_epochs` caps how often the source is seen, after which it leaves the
    mixture (None: no cap). `unique_tokens` keeps only so many of its training tokens (whole rows, drawn by the
    data's seed; fewer are among more), to study repetition. `spelled` keeps its text as bytes, a token each, without
    merges (BPE-dropout of rate 1, Provilkov et al. 2020), which decodes to the same text: what is to be read off an
    image is learned far sooner by its letters than by thousands of pieces that are seen seldom.
    """

    name: str
    paths: tuple[str, ...] = ()
    documents: Callable | None = None
    text_field: str = "text"
    image_field: str | None = None
    weight: float = 1.0
    max_epochs: float | None = None
    unique_tokens: int | None = None
    spelled: bool = False

    def __post_init__(self) -> None:
        require(isinstance(self.name, str), "name", self.name, "must be a plain word")
        require(bool(self.name) and self.name.replace("_", "").isalnum(), "name", self.name, "must be a plain word")
        object.__setattr__(self, "paths", require_texts("paths", self.paths))
        require(
            bool(self.paths) != (self.documents is not None),
            "paths",
            self.paths,
            f"of source {self.name!r}: give either paths or documents",
            "set DATA_PATHS to files or folders, or SourceConfig.documents to a function",
        )
        require_text("image_field", self.image_field)
        of_function = self.image_field is not None and self.documents is not None
        require(not of_function, "image_field", self.image_field, "is for files at paths, not for documents")
        require_not_negative("weight", self.weight)
        if self.max_epochs is not None:
            require_positive("max_epochs", self.max_epochs)
            never = f"of source {self.name!r} has no meaning with weight=0: it is never trained on"
            require(self.is_trained, "max_epochs", self.max_epochs, never, "set max_epochs to None")
        if self.unique_tokens is not None:
            require_count("unique_tokens", self.unique_tokens)
        require_flag("spelled", self.spelled)

    @property
    def is_trained(self) -> bool:
        """Whether the source is trained on, and not held out as a whole."""
        return self.weight > 0


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How images come into a batch: size, how many a row, how they are fitted, what is refused.

    Every image of a row is `height` by `width` pixels after `fit`: "squash" to the size, "pad" to it with the scale
    kept, "crop" the centre at the size's shorter side, "tile" a page into up to `frames` pieces of the size, or give
    each of its "lines" of text a piece, laid straight (`gpt4moe.data.page_lines`; tiles where there are more than
    `frames`). `frames` above 1 are those of a clip or the pieces of a page, one image to the model. `per_row` bounds
    the images of a packed row. `max_pixels` bounds what a file may unfold to. Images stay compressed in the store and
    are decoded by `workers` threads, or by `processes` processes where there are any: threads share one interpreter,
    which hands out a few thousand images a second on any number of cores, enough for a CPU's steps, not for a GPU's.
    """

    height: int
    width: int
    per_row: int
    frames: int = 1
    fit: str = "squash"
    max_pixels: int = 40_000_000
    workers: int = 2
    processes: int = 0

    def __post_init__(self) -> None:
        for name in ("height", "width", "per_row", "frames", "max_pixels"):
            require_count(f"ImageConfig.{name}", getattr(self, name))
        for name in ("workers", "processes"):
            require_count(f"ImageConfig.{name}", getattr(self, name), least=0)
        require(self.fit in FITS, "ImageConfig.fit", self.fit, f"must be in {FITS}")
        pieces = self.fit not in PIECES or self.frames > 1
        require(pieces, "ImageConfig.frames", self.frames, f"must be above 1 where fit is {self.fit!r}")
        wide = self.fit != "lines" or min(self.height, self.width) >= LEAST_SIDE
        require(wide, "ImageConfig.height, width", (self.height, self.width), f"must be {LEAST_SIDE} or more for lines")
        constraint = f"must hold what the model sees, height x width ({self.height} x {self.width} pixels)"
        fits = self.height * self.width <= self.max_pixels
        require(fits, "ImageConfig.max_pixels", self.max_pixels, constraint, "raise it, or lower height and width")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources, tokenizer and rows of a run.

    `exhaust_together` ignores the weights and spreads every source evenly until all reach `max_epochs` at the
    same token. `held_out_fraction` of the documents, chosen by a hash of their text (or of the group that their
    source gives them), is kept for evaluation, of which at most `held_out_tokens` a source are used. `store` is where
    tokens are kept (None: `data/` under the work directory; a shared folder lets several runs use one).
    `bad_records` says whether a record that cannot be read is counted and passed over or stops the run. `images`: how
    those of sources that have any come into batches (None: such sources are refused).
    """

    sources: tuple[SourceConfig, ...]
    sequence_length: int
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    exhaust_together: bool = False
    held_out_fraction: float = 0.02
    held_out_tokens: int = 100_000
    store: str | None = None
    bad_records: str = "count"
    seed: int = 0
    images: ImageConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        require(bool(self.sources), "sources", self.sources, "must name at least one source")
        for source in self.sources:
            require_instance("sources", source, SourceConfig)
        require_instance("tokenizer", self.tokenizer, TokenizerConfig)
        require_instance("images", self.images, ImageConfig, optional=True)
        names = [source.name for source in self.sources]
        require(len(set(names)) == len(names), "sources", names, "must have different names")
        trained = any(source.is_trained for source in self.sources)
        require(trained, "weight", 0, "of every source: none would be trained on", "give one of them a weight")
        require_count("sequence_length", self.sequence_length)
        require_fraction("held_out_fraction", self.held_out_fraction)
        require_count("held_out_tokens", self.held_out_tokens)
        require(
            self.bad_records in BAD_RECORD_ACTIONS, "bad_records", self.bad_records, f"must be in {BAD_RECORD_ACTIONS}"
        )
        require_seed("seed", self.seed)
        require_text("store", self.store)
        require_flag("exhaust_together", self.exhaust_together)
        if self.exhaust_together:
            capped = all(source.max_epochs is not None for source in self.sources if source.is_trained)
            require(capped, "exhaust_together", True, "needs max_epochs on every source")

    def held_out_fraction_of(self, source: SourceConfig) -> float:
        """The share of a source's documents that is held out."""
        return self.held_out_fraction if source.is_trained else 1.0
