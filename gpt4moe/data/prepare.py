"""Documents to a token store: resumable, in several processes, complete or not there at all.

`DIRECTORY/building-HASH/` collects finished parts, so that a run that was killed goes on where it was;
`DIRECTORY/store-HASH/` appears by one rename when everything is done. HASH covers what is read (files with size and
time of change, or the code of a function), the tokenizer and the split.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from gpt4moe.config.check import CallerError, require
from gpt4moe.config.data import DataConfig, SourceConfig
from gpt4moe.data.assemble import assemble
from gpt4moe.data.encode import Unit, UnitCounts, encode_unit, end_with_parent
from gpt4moe.data.files import FilePart, cut_file, find_files
from gpt4moe.data.image_readers import READERS_VERSION
from gpt4moe.data.sample import training_texts
from gpt4moe.data.sources import source_identity
from gpt4moe.data.spool import SPOOL_FIELDS, spool_documents
from gpt4moe.data.store import REPORT_FILE, TOKENIZER_FILE, PrepareReport, SourceReport, read_report
from gpt4moe.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer

Progress = Callable[[str], None]
# Raise when the bytes of a store change for the same configuration.
STORE_VERSION = 1
UNIT_BYTES = 32_000_000
# Below this many bytes a worker process costs more to start than it saves.
WORKER_BYTES = 100_000_000
# Of a source, on the terminal.
SHOWN_BAD_RECORDS = 5


def prepare(
    config: DataConfig,
    directory: str | pathlib.Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PrepareReport:
    """Tokenises every source of `config` below `directory` unless that is done; returns what was counted.

    workers: processes (None: by size of the input, at most the cores). progress: called with one line of text now
    and then. ValueError for a source without documents, a file that cannot be read, or a bad record where
    `config.bad_records` is "stop".
    """
    require("://" not in str(directory), "store", str(directory), "must be a local folder: tokens are memory-mapped")
    report = progress or (lambda line: None)
    root = pathlib.Path(directory)
    content_hash = store_hash(config)
    final, building = root / f"store-{content_hash}", root / f"building-{content_hash}"
    if (final / REPORT_FILE).exists():
        return read_report(final)
    missing = [folder for folder in (root, *root.absolute().parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    with _lock(root / ".lock"):
        if not (final / REPORT_FILE).exists():
            try:
                _build(config, building, content_hash, workers, report)
            except ValueError:
                # The caller's mistake: mending it changes the hash, so that nothing here would be used again.
                _clear(building, root / ".lock", missing)
                raise
            os.replace(building, final)
    return read_report(final)


def _clear(building: pathlib.Path, lock: pathlib.Path, made: list[pathlib.Path]) -> None:
    shutil.rmtree(building, ignore_errors=True)
    lock.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a folder that holds something else stays
        for folder in made:
            folder.rmdir()


def format_report(report: PrepareReport) -> str:
    """The report as a table for people, bad records by name below it."""
    names = ("documents", "tokens", "bytes", "held_out_documents", "held_out_tokens", "bad_records", "empty_documents")
    if any(source.has_images for source in report.sources):
        names += ("images", "held_out_images", "image_bytes")
    rows = [("source", *names)]
    rows += [(source.name, *(f"{getattr(source, name):,}" for name in names)) for source in report.sources]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [line for source in report.sources for line in _bad_records(source, report.directory)]
    return "\n".join([*lines, f"vocabulary {report.vocab_size}, tokens in {report.directory}"])


def _bad_records(source: SourceReport, directory: str) -> list[str]:
    """The first few by name, and how many more there are."""
    lines = [f"bad record: {example}" for example in source.bad_examples[:SHOWN_BAD_RECORDS]]
    more, named = source.bad_records - len(lines), len(source.bad_examples)
    there = (
        f"{pathlib.Path(directory) / REPORT_FILE} names {'all' if named == source.bad_records else f'{named} of them'}"
    )
    return [*lines, f"and {more:,} more bad records of {source.name}: {there}"] if more else lines


def store_hash(config: DataConfig) -> str:
    """Sixteen hex digits that change with anything the tokens depend on."""
    tokenizer = dataclasses.asdict(config.tokenizer)
    names = {name: tokenizer.pop(name) for name in ("begin_of_text", "end_of_text")}
    if config.tokenizer.path is not None:
        tokenizer = {"text": load_tokenizer(config.tokenizer.path, config.tokenizer).serialized}
    tokenizer |= {name: value for name, value in names.items() if value is not None}
    fields = {
        "version": STORE_VERSION,
        "sources": {source.name: source_identity(source) | _read_of(config, source) for source in config.sources},
        "tokenizer": tokenizer,
        "held_out_fraction": config.held_out_fraction,
        "bad_records": config.bad_records,
    }
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=8).hexdigest()


def _read_of(config: DataConfig, source: SourceConfig) -> dict:
    """What the documents of a source depend on beside itself. That a function will give images is not known yet."""
    split = {} if source.is_trained else {"held_out": "all"}
    if source.spelled:
        split["spelled"] = True
    of_images = {"readers": READERS_VERSION, "max_pixels": _max_pixels(config, source)} if source.image_field else {}
    return split | of_images


def _max_pixels(config: DataConfig, source: SourceConfig) -> int:
    needed = f"but source {source.name!r} has image_field={source.image_field!r}"
    require(config.images is not None, "images", None, needed, "give DataConfig.images an ImageConfig")
    return config.images.max_pixels


def _build(
    config: DataConfig, building: pathlib.Path, content_hash: str, workers: int | None, progress: Progress
) -> None:
    """Makes `building` a complete store. Parts go only once the report is there, which says that they are used up."""
    parts = building / "parts"
    if not (building / REPORT_FILE).exists():
        parts.mkdir(parents=True, exist_ok=True)
        sources = _tokenise(config, building, workers, progress)
        vocab_size = load_tokenizer(building / TOKENIZER_FILE, config.tokenizer).vocab_size
        report = PrepareReport("", content_hash, vocab_size, sources)
        _write(parts, building / REPORT_FILE, report.to_json())
    shutil.rmtree(parts, ignore_errors=True)


def _tokenise(
    config: DataConfig, building: pathlib.Path, workers: int | None, progress: Progress
) -> tuple[SourceReport, ...]:
    fractions = {source.name: config.held_out_fraction_of(source) for source in config.sources}
    units = [unit for source in config.sources for unit in _units(config, source, building, progress)]
    tokenizer = _tokenizer(config, units, building, progress)
    counts = _encode(config, units, tokenizer, workers, progress)
    by_source: dict[str, list[tuple[Unit, UnitCounts]]] = {source.name: [] for source in config.sources}
    for unit, unit_counts in zip(units, counts, strict=True):
        by_source[unit.source].append((unit, unit_counts))
    for name, done in by_source.items():
        if not any(sum(unit_counts.documents.values()) for _, unit_counts in done):
            bad = sum(unit_counts.bad_records for _, unit_counts in done)
            first = next((f", first {example}" for _, counts in done for example in counts.bad_examples), "")
            said = f"source={name!r} has no documents ({bad} bad records{first})"
            raise CallerError(f"{said}; check its paths or text_field")
    reports = [assemble(name, done, building, tokenizer, fractions[name]) for name, done in by_source.items()]
    for report in reports:
        if report.bad_records:
            progress(f"{report.name}: {report.bad_records} bad records passed over, first {report.bad_examples[0]}")
    return tuple(reports)


def _write(scratch_folder: pathlib.Path, path: pathlib.Path, text: str) -> None:
    """Writes a file at once: it is there whole or not at all."""
    scratch = scratch_folder / f"{path.name}.writing-{os.getpid()}"
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def _units(config: DataConfig, source: SourceConfig, building: pathlib.Path, progress: Progress) -> Iterator[Unit]:
    """Cuts a source into files that make about `UNIT_BYTES` together, in order."""
    text_field, group_field, image_field = source.text_field, None, source.image_field
    if source.documents is None:
        paths = find_files(source.paths, image_field)
    else:
        paths = spool_documents(source, building / "parts" / f"documents.{source.name}", UNIT_BYTES, progress)
        text_field, group_field, image_field = SPOOL_FIELDS
    groups: list[list[FilePart]] = [[]]
    room = UNIT_BYTES
    for file in (part for path in paths for part in cut_file(path, UNIT_BYTES)):
        if groups[-1] and file.size > room:
            groups.append([])
            room = UNIT_BYTES
        groups[-1].append(file)
        room -= file.size
    for index, group in enumerate(groups):
        folder = building / "parts" / f"{source.name}-{index:06d}"
        fraction, limit = config.held_out_fraction_of(source), config.images and config.images.max_pixels
        fields = (text_field, group_field, fraction, image_field, limit, source.spelled)
        yield Unit(source.name, folder, tuple(group), *fields)


def _tokenizer(config: DataConfig, units: list[Unit], building: pathlib.Path, progress: Progress) -> Tokenizer:
    path = building / TOKENIZER_FILE
    if not path.exists():
        if config.tokenizer.path is None and not config.tokenizer.byte_level_only:
            progress(f"learning {config.tokenizer.vocab_size} tokens")
        tokenizer = build_tokenizer(config.tokenizer, training_texts(config, units))
        _write(building / "parts", path, tokenizer.serialized)
    return load_tokenizer(path, config.tokenizer)


def _encode(
    config: DataConfig, units: list[Unit], tokenizer: Tokenizer, workers: int | None, progress: Progress
) -> list[UnitCounts]:
    stop = config.bad_records == "stop"
    total = sum(unit.size for unit in units)
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), len(units)) if total > WORKER_BYTES else 1
    counts: dict[int, UnitCounts] = {}

    def done(index: int, unit_counts: UnitCounts) -> None:
        counts[index] = unit_counts
        tokens = sum(sum(item.tokens.values()) for item in counts.values())
        progress(f"tokenising {units[index].source}: part {len(counts)} of {len(units)}, {tokens / 1e6:.1f}M tokens")

    if workers <= 1:
        for index, unit in enumerate(units):
            done(index, encode_unit(unit, tokenizer, stop))
        return [counts[index] for index in range(len(units))]
    # spawn: forking a process that runs JAX threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool:
        futures = {pool.submit(encode_unit, unit, tokenizer, stop): index for index, unit in enumerate(units)}
        try:
            for future in concurrent.futures.as_completed(futures):
                done(futures[future], future.result())
        except concurrent.futures.process.BrokenProcessPool:
            guard = "out of memory, or a script without `if __name__ == '__main__':`"
            raise RuntimeError(f"a worker process of prepare died ({guard}); pass workers=1 to do without") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [counts[index] for index in range(len(units))]


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    """Holds an exclusive lock that the system frees when the process dies; a second run waits for the first."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
