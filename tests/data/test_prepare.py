"""Prepare: what is counted, what is held out, complete or not there, resumed, the same in several processes."""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from gpt4moe.config.data import DataConfig, SourceConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.data import prepare as preparation
from gpt4moe.data.documents import Document, is_held_out
from gpt4moe.data.encode import Unit
from gpt4moe.data.files import cut_file
from gpt4moe.data.prepare import format_report, prepare, store_hash
from gpt4moe.data.sample import training_texts
from gpt4moe.data.store import TokenStore

BYTES = TokenizerConfig(byte_level_only=True)


def write_documents(path, count, seed=0, broken=()):
    rng = random.Random(seed)
    texts = ["".join(rng.choices("abc \n", k=rng.randint(1, 60))) + str(index) for index in range(count)]
    lines = ["{broken" if index in broken else json.dumps({"text": text}) for index, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return [text for index, text in enumerate(texts) if index not in broken]


def config_of(folder, **changes):
    sources = tuple(SourceConfig(path.stem, paths=(str(path),)) for path in sorted(folder.glob("*.jsonl")))
    return DataConfig(
        **{"sources": sources, "sequence_length": 16, "tokenizer": BYTES, "held_out_fraction": 0.2} | changes
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture
def corpus(tmp_path):
    """Two sources of .jsonl files, read in parts of 500 bytes."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_documents(folder / "few.jsonl", 30, seed=1)
    write_documents(folder / "many.jsonl", 120, seed=2)
    return folder


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(preparation, "UNIT_BYTES", 500)


def test_documents_come_back_from_the_store_and_are_counted(tmp_path):
    texts = write_documents(tmp_path / "a.jsonl", 50, broken=(3, 17))
    lines = []
    report = prepare(config_of(tmp_path), tmp_path / "store", progress=lines.append)
    store = TokenStore(report.directory)
    sides = {"train": [], "held_out": []}
    for text in texts:
        sides["held_out" if is_held_out(Document(text), 0.2) else "train"].append(text)
    for split, expected in sides.items():
        stream, offsets = store.stream("a", split), store.offsets("a", split)
        pairs = itertools.pairwise(offsets)
        assert [store.tokenizer.decode(stream[start + 1 : end]) for start, end in pairs] == expected
        assert (stream[offsets] == store.tokenizer.end_of_text).all(), "before every document and after the last"
    (source,) = report.sources
    assert source.documents == len(sides["train"]) and source.held_out_documents == len(sides["held_out"])
    assert source.bytes == sum(map(len, sides["train"]))
    assert source.tokens == source.bytes + source.documents
    assert store.held_out_bytes("a") == source.held_out_bytes == sum(map(len, sides["held_out"]))
    assert source.bad_records == 2
    assert [example.split()[0] for example in source.bad_examples] == [f"{tmp_path}/a.jsonl:{line}" for line in (4, 18)]
    assert "a.jsonl:18 is not JSON" in format_report(report)
    assert any("a: 2 bad records" in line and "a.jsonl:4 is not JSON" in line for line in lines)


def test_a_source_of_bad_records_alone_names_the_first(tmp_path):
    write_documents(tmp_path / "a.jsonl", 2, broken=(0, 1))
    with pytest.raises(
        ValueError, match=rf"no documents \(2 bad records, first {tmp_path}/a.jsonl:1 is not JSON [^\n]*$"
    ):
        prepare(config_of(tmp_path), tmp_path / "store")
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"no documents \(0 bad records\); check"):
        prepare(config_of(tmp_path), tmp_path / "store")


@pytest.mark.parametrize(("count", "named"), [(3, 3), (16, 16), (120, 100)])
def test_bad_records_are_named_up_to_a_number_and_counted(tmp_path, small_units, count, named):
    write_documents(tmp_path / "a.jsonl", 150, broken=range(count))
    report = prepare(config_of(tmp_path), tmp_path / "store")
    (source,) = report.sources
    saved = json.loads((pathlib.Path(report.directory) / "report.json").read_text())["sources"][0]
    lines = [f"{tmp_path}/a.jsonl:{line + 1}" for line in range(named)]
    assert [example.split()[0] for example in saved["bad_examples"]] == lines
    assert (source.bad_records, list(source.bad_examples)) == (count, saved["bad_examples"])
    shown = [line for line in format_report(report).splitlines() if line.startswith(("bad record: ", "and "))]
    assert [line.split()[2] for line in shown[:5]] == lines[:5]
    there = f"{report.directory}/report.json names {'all' if named == count else '100 of them'}"
    assert shown[5:] == ([f"and {count - 5} more bad records of a: {there}"] if count > 5 else [])


def test_unigram_nats_are_those_of_a_loop(tmp_path):
    write_documents(tmp_path / "a.jsonl", 60)
    store = TokenStore(prepare(config_of(tmp_path), tmp_path / "store").directory)
    train, held_out = (store.stream("a", split)[1:] for split in ("train", "held_out"))
    vocab_size = store.tokenizer.vocab_size
    chances = [(np.count_nonzero(train == token) + 1) / (len(train) + vocab_size) for token in held_out]
    nats = -np.log(chances)
    assert store.unigram_nats("a") == pytest.approx(nats.mean())
    assert store.unigram_bits_per_byte("a") == pytest.approx(nats.sum() / np.log(2) / store.held_out_bytes("a"))


def test_at_most_the_limit_is_held_out_in_whole_documents(tmp_path):
    write_documents(tmp_path / "a.jsonl", 80)
    directory = prepare(config_of(tmp_path), tmp_path / "store").directory
    everything, some, one = (TokenStore(directory, limit) for limit in (10**9, 100, 1))
    assert 50 < some.num_tokens("a", "held_out") <= 100 < everything.num_tokens("a", "held_out")
    assert len(one.offsets("a", "held_out")) == 2
    assert one.held_out_bytes("a") == one.num_tokens("a", "held_out") - 1


def test_a_single_file_gives_its_end_as_the_held_out_side(tmp_path):
    text = "".join(random.Random(0).choices("abc \n", k=1000))
    (tmp_path / "a.txt").write_text(text)
    for fraction in (0.1, 1 - 1e-9):  # the hash leaves one side empty, then the other
        config = DataConfig((SourceConfig("a", paths=f"{tmp_path}/a.txt"),), 16, BYTES, held_out_fraction=fraction)
        report = prepare(config, tmp_path / "store")
        store = TokenStore(report.directory)
        cut = 1000 - report.sources[0].held_out_bytes
        assert cut == (900 if fraction < 0.5 else 500)
        assert store.tokenizer.decode(store.stream("a", "train")) == text[:cut]
        assert store.tokenizer.decode(store.stream("a", "held_out")) == text[cut:]
        assert store.num_tokens("a", "held_out") == store.held_out_bytes("a") + 1
        for split in ("train", "held_out"):
            stream, end = store.stream("a", split), store.tokenizer.end_of_text
            assert len(stream) == store.num_tokens("a", split) + 1
            assert np.flatnonzero(stream == end).tolist() == [0, len(stream) - 1]


def test_a_killed_run_goes_on_where_it_was(tmp_path, corpus, small_units):
    config = config_of(corpus)
    whole = prepare(config, tmp_path / "whole")

    def stop_at_part_five(line):
        if "part 5" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "cut", progress=stop_at_part_five)
    (building,) = (tmp_path / "cut").glob("building-*")
    parts = {path: path.stat().st_mtime_ns for path in (building / "parts").glob("*/counts.json")}
    assert len(parts) == 5 and not list((tmp_path / "cut").glob("store-*"))
    kept = []

    def note(line):
        kept.extend(path for path, changed in parts.items() if path.exists() and path.stat().st_mtime_ns == changed)

    resumed = prepare(config, tmp_path / "cut", progress=note)
    assert set(kept) == set(parts), "finished parts are not written again"
    assert dataclasses.replace(resumed, directory="") == dataclasses.replace(whole, directory="")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_kill_minus_nine_leaves_a_store_that_resumes(tmp_path, corpus, small_units):
    config = config_of(corpus)
    script = """if True:
        import os, signal, sys
        from gpt4moe.data import prepare
        from tests.data.test_prepare import config_of
        import pathlib
        prepare.UNIT_BYTES = 500
        calls = []
        def die(line):
            calls.append(line)
            if len(calls) == int(sys.argv[3]):
                os.kill(os.getpid(), signal.SIGKILL)
        workers = int(sys.argv[4])
        prepare.prepare(config_of(pathlib.Path(sys.argv[1])), sys.argv[2], progress=die, workers=workers)
    """
    for calls, workers in (("1", "1"), ("2", "2"), ("7", "1")):
        command = [sys.executable, "-c", script, str(corpus), str(tmp_path / "cut"), calls, workers]
        # Worker processes that outlive the killed run would hold its output open.
        killed = subprocess.run(command, check=False, stdout=subprocess.PIPE, timeout=60)
        assert killed.returncode == -signal.SIGKILL
    prepare(config, tmp_path / "cut")
    prepare(config, tmp_path / "whole")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_run_killed_while_it_cleaned_up_is_finished(tmp_path, corpus):
    directory = prepare(config_of(corpus), tmp_path / "store").directory
    whole = contents(tmp_path / "store")
    building = pathlib.Path(directory.replace("store-", "building-"))
    os.rename(directory, building)
    (building / "parts" / "few-000000").mkdir(parents=True)
    (building / "parts" / "few-000000" / "counts.json").write_text("{}")
    prepare(config_of(corpus), tmp_path / "store")
    assert contents(tmp_path / "store") == whole


def test_several_processes_write_the_same_store(tmp_path, corpus, small_units):
    config = config_of(corpus)
    prepare(config, tmp_path / "one", workers=1)
    prepare(config, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_ready_store_is_reused_until_what_it_depends_on_changes(tmp_path, corpus):
    config = config_of(corpus)
    lines = []
    first = prepare(config, tmp_path / "store", progress=lines.append)
    count = len(lines)
    heavier = dataclasses.replace(config, sources=(dataclasses.replace(config.sources[0], weight=9), config.sources[1]))
    for same in (config, heavier, dataclasses.replace(config, sequence_length=99, seed=5)):
        assert prepare(same, tmp_path / "store", progress=lines.append) == first and len(lines) == count
    hashes = {store_hash(config), store_hash(dataclasses.replace(config, held_out_fraction=0.3))}
    spelled = dataclasses.replace(config.sources[0], spelled=True)
    hashes.add(store_hash(dataclasses.replace(config, sources=(spelled, config.sources[1]))))
    write_documents(corpus / "few.jsonl", 31)
    assert len(hashes | {store_hash(config)}) == 4
    os.utime(corpus / "few.jsonl", (0, 0))
    again = prepare(config, tmp_path / "store")
    assert again.directory != first.directory
    digests = [{source.name: source.digest for source in report.sources} for report in (first, again)]
    assert digests[0]["many"] == digests[1]["many"] and digests[0]["few"] != digests[1]["few"]


def test_merges_are_learned_from_training_documents_of_all_sources(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"zebra zebra {i}"}) + "\n" for i in range(200)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"quokka quokka {i}"}) + "\n" for i in range(2000)))
    config = config_of(tmp_path, tokenizer=TokenizerConfig(vocab_size=300, train_bytes=5000))
    store = TokenStore(prepare(config, tmp_path / "store").directory)
    assert store.tokenizer.vocab_size <= 300
    assert len(store.tokenizer.encode(" zebra")) == len(store.tokenizer.encode(" quokka")) == 1


def test_the_sample_is_shared_out_and_bounded_and_never_held_out(tmp_path):
    def unit(name, count):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {index:04d}"}) + "\n" for index in range(count)))
        return Unit(name, tmp_path, tuple(cut_file(str(path), 500)), "text", None, 0.0)

    units = [unit("large", 900), unit("small", 20), unit("other", 900)]
    sources = tuple(SourceConfig(one.source, paths="unread") for one in units)
    config = DataConfig(sources, 16, TokenizerConfig(train_bytes=4000), held_out_fraction=0.2)
    texts = list(training_texts(config, units))
    spent = collections.Counter()
    for text in texts:
        spent[text.split()[0]] += len(text)
        assert not is_held_out(Document(text), 0.2)
    assert sum(spent.values()) == 4000
    assert 100 < spent["small"] <= 200, "all it has for training"
    assert abs(spent["large"] - spent["other"]) <= 20, "the rest in equal shares"
    assert texts == list(training_texts(config, units))


def nothing():
    return []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (SourceConfig("a", paths="nowhere/*.txt"), "names no file of a known kind"),
        (SourceConfig("a", paths="empty.jsonl"), r"source='a' has no documents \(0 bad records\)"),
        (
            SourceConfig("a", paths="wrong.jsonl"),
            r"source='a' has no documents \(2 bad records, first wrong.jsonl:1 has",
        ),
        (SourceConfig("a", paths="damaged.jsonl.gz"), "cannot be read"),
        (SourceConfig("a", documents=nothing), "source='a' has no documents"),
    ],
)
def test_bad_sources_are_one_line_errors_that_leave_nothing(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "wrong.jsonl").write_text('{"body": "x"}\n{\n')
    (tmp_path / "damaged.jsonl.gz").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=message) as caught:
        prepare(DataConfig((source,), 16, BYTES), tmp_path / "run" / "data")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_broken_line_stops_the_run_where_asked(tmp_path):
    write_documents(tmp_path / "a.jsonl", 10, broken=(6,))
    with pytest.raises(ValueError, match=r"bad_records='stop' met [^\n]*a\.jsonl:7 is not JSON"):
        prepare(config_of(tmp_path, bad_records="stop"), tmp_path / "store")


def test_a_store_in_a_bucket_is_a_one_line_error(tmp_path, corpus):
    with pytest.raises(ValueError, match="store='gs://bucket' must be a local folder"):
        prepare(config_of(corpus), "gs://bucket")


def test_a_source_of_one_held_out_file_still_teaches_the_merges(tmp_path):
    """The hash may hold out the only document there is; then its tail is held out, and all of it is read for merges."""
    held_out = next(text for number in range(1000) if is_held_out(Document(text := f"word{number} " * 400), 0.02))
    (tmp_path / "only.txt").write_text(held_out)
    source = SourceConfig("only", paths=(str(tmp_path / "only.txt"),))
    config = DataConfig((source,), sequence_length=16, tokenizer=TokenizerConfig(vocab_size=280))
    assert prepare(config, tmp_path / "store").vocab_size > 272
