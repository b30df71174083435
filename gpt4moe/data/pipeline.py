"""Batches for training and evaluation out of a token store.

Training rows: packing plan -> grain row dataset -> shuffle and repeat per source, reshuffled each epoch -> exact
mixture -> the rows of this host. Any position is reached in the same time, and the rows of a position do not depend
on the number of hosts, so a run restores anywhere, on any number of them.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from gpt4moe.config.check import CallerError, require, require_count
from gpt4moe.config.data import DataConfig, SourceConfig
from gpt4moe.data.image_bytes import ImageBytes, image_bytes
from gpt4moe.data.image_rows import Decoding, ImageDecoder
from gpt4moe.data.mixture import MixedSource, Mixture
from gpt4moe.data.packing import ImageLimit, Plan, cached_plan
from gpt4moe.data.prepare import Progress, prepare
from gpt4moe.data.rows import PackedRows, Row, image_targets, stack_rows
from gpt4moe.data.store import REPORT_FILE, TokenStore
from gpt4moe.types import Batch


def open_store(
    config: DataConfig,
    directory: str | pathlib.Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """The token store of `config` below `directory`, prepared first where it is missing (see `prepare`)."""
    report = prepare(config, directory, workers=workers, progress=progress)
    return TokenStore(report.directory, config.held_out_tokens, config.tokenizer)


def reopen_store(config: DataConfig, directory: str | pathlib.Path, content_hash: str) -> TokenStore | None:
    """The store that a run began with, whatever its sources hold by now; None where it is gone."""
    path = pathlib.Path(directory) / f"store-{content_hash}"
    return TokenStore(path, config.held_out_tokens, config.tokenizer) if (path / REPORT_FILE).exists() else None


def row_plan(store: TokenStore, config: DataConfig, source: str, split: str) -> Plan:
    """The packing plan of one split of one source, kept beside the tokens."""
    key = f"{store.content_hash}/{source}/{split}"
    images, limit = store.images(source, split), None
    if images is not None:
        require(config.images is not None, "images", None, f"but source {source!r} has some", "give an ImageConfig")
        limit = ImageLimit(images.positions, config.images.per_row)
    return cached_plan(store.directory / "plans", key, store.offsets(source, split), config.sequence_length, limit)


class TrainRows:
    """Iterator over this host's rows of the global microbatches.

    `next()` gives a numpy Batch of [microbatch_rows // num_hosts, T]; the last one of a finite mixture is filled up
    with empty rows, after it comes StopIteration. `source_ids` number `store.source_names`; sources that are held out
    as a whole have no rows. With `config.images` the batches have images, of which those of the next one are decoded
    while the caller works with this one.
    """

    def __init__(
        self,
        store: TokenStore,
        config: DataConfig,
        *,
        microbatch_rows: int,
        num_hosts: int = 1,
        host: int = 0,
    ) -> None:
        """ValueError unless the hosts divide the rows. `config.sources` must be those that the store was made of."""
        require_count("microbatch_rows", microbatch_rows)
        divisible = microbatch_rows % num_hosts == 0
        require(divisible, "microbatch_rows", microbatch_rows, f"must be a multiple of the {num_hosts} hosts")
        require(0 <= host < num_hosts, "host", host, f"must be below the {num_hosts} hosts")
        self._store, self._config = store, config
        self._microbatch_rows, self._host_rows = microbatch_rows, microbatch_rows // num_hosts
        self._first_row = host * self._host_rows
        by_name = {source.name: source for source in config.sources}
        self._sources = tuple(by_name[name] for name in store.source_names if by_name[name].is_trained)
        self._plans = [row_plan(store, config, source.name, "train") for source in self._sources]
        kept = [_kept_rows(source, plan) for source, plan in zip(self._sources, self._plans, strict=True)]
        self._mixture = _mixture(self._sources, self._plans, kept, exhaust_together=config.exhaust_together)
        rows, numbers = [], []
        for source, plan, count in zip(self._sources, self._plans, kept, strict=True):
            seed = _seed(config.seed, source.name)
            rows.append(_endless(_packed_rows(store, plan, source.name, "train"), seed, count))
            numbers.append(_endless(range(plan.num_rows), seed, count))
        self._targets = [
            _row_targets(store, plan, source.name) for source, plan in zip(self._sources, self._plans, strict=True)
        ]
        self._decoder = _decoder(store, config, "train")
        # By the first row of a microbatch: its images, on their way.
        self._decoding: dict[int, Decoding] = {}
        self._rows = grain.MapDataset.select_from_datasets(rows, self._mixture)
        # The same order over row numbers alone, for the ledger of rows that other hosts read.
        self._order = numbers
        self._next_row = 0
        self._counted_row = 0
        self._ledger = {source.name: 0 for source in self._sources}

    def __iter__(self) -> TrainRows:
        return self

    def __next__(self) -> Batch:
        if self._next_row >= len(self._mixture):
            raise StopIteration
        position = self._next_row
        self._next_row = min(self._next_row + self._microbatch_rows, len(self._mixture))
        if self._decoder is None:
            return stack_rows(self._host_part(position), self._host_rows, self._config.sequence_length)
        decoding = self._decoding.pop(position, None) or self._begin_decoding(position)
        self.look_ahead(1)
        batch = stack_rows(decoding.rows, self._host_rows, self._config.sequence_length)
        return self._decoder.finish(decoding, batch)

    def look_ahead(self, count: int) -> None:
        """Begins to decode the images of the next `count` microbatches; of no other effect."""
        if self._decoder is None or not (self._config.images.workers or self._config.images.processes):
            return
        positions = [self._next_row + index * self._microbatch_rows for index in range(count)]
        for position in positions:
            if position < len(self._mixture) and position not in self._decoding:
                self._decoding[position] = self._begin_decoding(position)

    def _begin_decoding(self, position: int) -> Decoding:
        return self._decoder.begin(self._host_part(position), self._host_rows)

    def _host_part(self, position: int) -> list[Row]:
        """The rows of this host in the microbatch that begins at `position`."""
        first = position + self._first_row
        return [self._rows[row] for row in range(first, min(first + self._host_rows, len(self._mixture)))]

    def get_state(self) -> dict:
        """Where the iterator stands, JSON-able and the same on every host: next global row, ledger, and of what."""
        return {"next_row": self._next_row, "ledger": self.ledger(), "order": self._fingerprint()}

    def set_state(self, state: dict, *, allow_change: bool = False) -> None:
        """Goes to a state of `get_state`, from any number of hosts and any microbatch size.

        A state of other data, weights, seed or sequence length raises `CallerError`; where `allow_change`, the order
        of rows begins anew and the ledger is carried on.
        """
        same = state["order"] == self._fingerprint()
        if not same and not allow_change:
            raise CallerError(
                "the data has changed since the checkpoint (sources, weights, seed or sequence_length); restore it, "
                "give another workdir, or --allow_config_change to begin a new order of rows"
            )
        self._next_row = self._counted_row = int(state["next_row"]) if same else 0
        self._decoding.clear()
        self._ledger = {source.name: int(state["ledger"].get(source.name, 0)) for source in self._sources}

    def ledger(self) -> dict[str, int]:
        """Tokens (targets) delivered so far by source, over all hosts."""
        for position in range(self._counted_row, self._next_row):
            source, number = self._mixture[position]
            tokens = self._targets[source][self._order[source][number]]
            self._ledger[self._sources[source].name] += int(tokens)
        self._counted_row = self._next_row
        return dict(self._ledger)

    def epochs(self) -> dict[str, float]:
        """How many times every source has been seen, over all hosts."""
        return self._mixture.epochs(self._next_row)

    def exhausted(self) -> tuple[str, ...]:
        """Sources that have left the mixture."""
        return self._mixture.exhausted(self._next_row)

    def total_tokens(self) -> int | None:
        """Positions of all rows of the mixture, padding included; None where it has no end."""
        rows = len(self._mixture)
        return None if rows == sys.maxsize else rows * self._config.sequence_length

    def packing(self) -> dict[str, dict[str, float]]:
        """Rows, fill (share of positions that hold a token) and cut documents by source."""
        pairs = zip(self._sources, self._plans, strict=True)
        return {
            source.name: {"rows": plan.num_rows, "fill": plan.fill, "split_documents": plan.split_documents}
            for source, plan in pairs
        }

    def image_bytes(self, patch: tuple[int, int]) -> dict[str, ImageBytes]:
        """What the images of every source that has some cost in bytes; `patch` is the encoder's, height and width."""
        split = {source.name: self._store.images(source.name, "train") for source in self._sources}
        plans = {source.name: plan for source, plan in zip(self._sources, self._plans, strict=True)}
        return {
            name: image_bytes(
                self._config.images, images, plans[name], patch, self._store.stream(name, "train").itemsize
            )
            for name, images in split.items()
            if images is not None
        }

    def _fingerprint(self) -> str:
        """Changes with anything that the order of rows depends on."""
        config = self._config
        mixed = [_mixed(source) for source in config.sources if source.is_trained]
        fields = [self._store.digests, config.sequence_length, config.seed, config.exhaust_together, mixed]
        if self._store.sources_with_images:
            fields.append(config.images.per_row)
        return hashlib.blake2b(json.dumps(fields).encode(), digest_size=8).hexdigest()


def held_out_batches(store: TokenStore, config: DataConfig, *, rows: int) -> Iterator[tuple[str, Batch]]:
    """Every held-out token of every source once, as (source, [rows, T] numpy Batch), in a fixed order.

    The last batch of a source is filled up with empty rows.
    """
    for source in store.source_names:
        for batch in held_out_of_source(store, config, source, rows=rows):
            yield source, batch


def held_out_of_source(store: TokenStore, config: DataConfig, source: str, *, rows: int) -> Iterator[Batch]:
    """What `held_out_batches` has of one source; rows are read as they are asked for."""
    require_count("rows", rows)
    plan = row_plan(store, config, source, "held_out")
    packed = _packed_rows(store, plan, source, "held_out")
    decoder = _decoder(store, config, "held_out")
    starts = range(0, len(packed), rows)
    taken = ([packed[row] for row in range(first, min(first + rows, len(packed)))] for first in starts)
    if decoder is None:
        yield from (stack_rows(part, rows, config.sequence_length) for part in taken)
        return
    begun = (decoder.begin(part, rows) for part in taken)
    decoding = next(begun, None)
    while decoding is not None:
        following = next(begun, None)
        yield decoder.finish(decoding, stack_rows(decoding.rows, rows, config.sequence_length))
        decoding = following


def _packed_rows(store: TokenStore, plan: Plan, source: str, split: str) -> PackedRows:
    number = store.source_names.index(source)
    return PackedRows(store.stream(source, split), plan, number, store.images(source, split))


def _decoder(store: TokenStore, config: DataConfig, split: str) -> ImageDecoder | None:
    """What decodes the images of rows of `split`; None where batches have none."""
    if config.images is None:
        return None
    return ImageDecoder(config.images, lambda number: store.images(store.source_names[number], split))


def _row_targets(store: TokenStore, plan: Plan, source: str) -> np.ndarray:
    """Targets of every row of a plan of training rows, [rows] int64: its tokens, less those that are images."""
    images = store.images(source, "train")
    return plan.row_tokens if images is None else plan.row_tokens - image_targets(plan, images)


def _mixed(source: SourceConfig) -> tuple:
    limited = () if source.unique_tokens is None else (source.unique_tokens,)
    return (source.name, source.weight, source.max_epochs, *limited)


def _kept_rows(source: SourceConfig, plan: Plan) -> int:
    """Rows that `unique_tokens` leaves of a source, at least one; rows count as equally full."""
    if source.unique_tokens is None or not plan.num_rows:
        return plan.num_rows
    there = plan.num_tokens
    constraint = f"of source {source.name!r} must be at most its {there:,} training tokens"
    require(source.unique_tokens <= there, "unique_tokens", source.unique_tokens, constraint, "lower it, or add text")
    return max(round(source.unique_tokens * plan.num_rows / there), 1)


def _mixture(
    sources: Sequence[SourceConfig], plans: Sequence[Plan], kept: Sequence[int], *, exhaust_together: bool
) -> Mixture:
    mixed = [
        MixedSource(
            source.name, count, count * plan.num_tokens // max(plan.num_rows, 1), source.weight, source.max_epochs
        )
        for source, plan, count in zip(sources, plans, kept, strict=True)
    ]
    return Mixture(mixed, exhaust_together=exhaust_together)


def _endless(rows: PackedRows | range, seed: int, count: int) -> grain.MapDataset:
    """`count` of the rows, all of them in a new order every epoch."""
    if count < len(rows):
        # A slice of a shuffled dataset would be another one every epoch.
        order = grain.MapDataset.source(range(len(rows))).shuffle(seed=seed)
        rows = _Kept(rows, [order[index] for index in range(count)])
    return grain.MapDataset.source(rows).shuffle(seed=seed).repeat(None)


class _Kept:
    """The rows at `places`."""

    def __init__(self, rows: PackedRows | range, places: Sequence[int]) -> None:
        self._rows, self._places = rows, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Row | int:
        return self._rows[self._places[index]]


def _seed(seed: int, source: str) -> int:
    """A seed of its own for every source, so that sources of equal size are not shuffled alike."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{source}".encode(), digest_size=4).digest(), "big")
