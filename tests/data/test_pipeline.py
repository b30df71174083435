"""The pipeline: rows equal a slow loop; exact epochs; any position and any number of hosts give the same batches."""

import collections
import dataclasses
import functools
import json
import random

import numpy as np
import pytest

from gpt4moe.config.data import DataConfig, SourceConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.data.documents import Document, is_held_out
from gpt4moe.data.pipeline import TrainRows, held_out_batches, open_store
from gpt4moe.types import Batch

LENGTH = 24
FIELDS = ["tokens", "targets", "loss_weights", "positions", "segment_ids", "source_ids"]


def texts(seed, count):
    """Documents that are all different, some longer than a row."""
    rng = random.Random(seed)
    return [f"{seed}{index}" + "".join(rng.choices("abcdef\u00e9 ", k=rng.randint(1, 60))) for index in range(count)]


def config_of(text_cap=2, code_cap=4, **changes):
    sources = (
        SourceConfig("text", documents=functools.partial(texts, 1, 40), weight=0.7, max_epochs=text_cap),
        SourceConfig("code", documents=functools.partial(texts, 2, 25), weight=0.3, max_epochs=code_cap),
    )
    tokenizer = TokenizerConfig(byte_level_only=True)
    return DataConfig(
        **{"sources": sources, "sequence_length": LENGTH, "tokenizer": tokenizer, "held_out_fraction": 0.2} | changes
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(config_of(), tmp_path_factory.mktemp("store"))


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def segments(batch):
    """(source, tokens, targets, positions) of every segment of a batch, read position by position."""
    found = []
    for row in range(batch.tokens.shape[0]):
        last = 0
        for column in range(batch.tokens.shape[1]):
            segment = batch.segment_ids[row, column]
            assert batch.loss_weights[row, column] == pytest.approx(float(segment > 0))
            if segment == 0:
                assert not batch.tokens[row, column:].any() and not batch.segment_ids[row, column:].any()
                break
            if segment != last:
                assert segment == last + 1, "segments count from one"
                found.append((int(batch.source_ids[row, column]), [], [], []))
                last = segment
            for part, name in zip(found[-1][1:], ("tokens", "targets", "positions"), strict=True):
                part.append(int(getattr(batch, name)[row, column]))
    return found


def slow_segments(store, name, seed, count, held_out):
    """What the documents of a source should be cut into: end-of-text and text, pieces of at most a row."""
    index = store.source_names.index(name)
    expected = collections.Counter()
    for text in texts(seed, count):
        if is_held_out(Document(text), 0.2) == held_out:
            ids = [store.tokenizer.end_of_text, *store.tokenizer.encode(text)]
            targets = [*ids[1:], store.tokenizer.end_of_text]
            for first in range(0, len(ids), LENGTH):
                piece = slice(first, first + LENGTH)
                expected[index, tuple(ids[piece]), tuple(targets[piece])] += 1
    return expected


def test_the_batches_hold_every_piece_of_every_document_exactly_the_epochs_asked_for(store):
    rows = TrainRows(store, config_of(), microbatch_rows=4)
    found = collections.Counter()
    for batch in rows:
        assert batch.tokens.dtype == np.int32 and batch.loss_weights.dtype == np.float32
        for source, tokens, targets, positions in segments(batch):
            found[source, tuple(tokens), tuple(targets)] += 1
            assert positions == list(range(len(tokens)))
    expected = collections.Counter()
    for name, seed, count, epochs in (("text", 1, 40, 2), ("code", 2, 25, 4)):
        for piece, times in slow_segments(store, name, seed, count, held_out=False).items():
            expected[piece] = times * epochs
    assert found == expected
    assert rows.epochs() == {"text": 2.0, "code": 4.0}
    assert rows.exhausted() == ("text", "code")
    tokens = {source.name: source.tokens for source in store.report.sources}
    assert rows.ledger() == {"text": 2 * tokens["text"], "code": 4 * tokens["code"]}
    with pytest.raises(StopIteration):
        next(rows)


def test_held_out_batches_hold_every_held_out_piece_once(store):
    found, names = collections.Counter(), []
    for name, batch in held_out_batches(store, config_of(), rows=3):
        assert batch.tokens.shape == (3, LENGTH)
        names.append(name)
        for source, tokens, targets, _ in segments(batch):
            assert store.source_names[source] == name
            found[source, tuple(tokens), tuple(targets)] += 1
    assert names == sorted(names, key=store.source_names.index)
    assert found == slow_segments(store, "text", 1, 40, True) + slow_segments(store, "code", 2, 25, True)
    lengths = store.tokenizer.byte_lengths
    for index, name in enumerate(store.source_names):
        spelt = sum(lengths[list(targets)].sum() for source, _, targets in found.elements() if source == index)
        assert spelt == store.held_out_bytes(name)
    assert all(
        same(a[1], b[1]) for a, b in zip(*(held_out_batches(store, config_of(), rows=3) for _ in "ab"), strict=True)
    )


def test_eight_hosts_then_two_then_four_put_the_same_global_batches_together(store):
    whole = list(TrainRows(store, config_of(), microbatch_rows=8))
    assert len(whole) > 9
    state, first = None, 0
    for num_hosts, last in ((8, 3), (2, 7), (4, len(whole))):
        hosts = [
            TrainRows(store, config_of(), microbatch_rows=8, num_hosts=num_hosts, host=host)
            for host in range(num_hosts)
        ]
        for host in hosts if state else ():
            host.set_state(json.loads(state))
        for index in range(first, last):
            parts = [next(host) for host in hosts]
            assert all(part.tokens.shape == (8 // num_hosts, LENGTH) for part in parts)
            joined = Batch(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS})
            assert same(joined, whole[index])
        states = {json.dumps(host.get_state(), sort_keys=True) for host in hosts}
        assert len(states) == 1, "any host's state restores all"
        state, first = states.pop(), last
    reference = TrainRows(store, config_of(), microbatch_rows=8)
    assert sum(1 for _ in reference) == len(whole)
    assert json.loads(state) == reference.get_state()


def test_every_state_restores_the_batches_that_followed(store):
    rows = TrainRows(store, config_of(), microbatch_rows=4)
    states, batches = [rows.get_state()], []
    for batch in rows:
        batches.append(batch)
        states.append(rows.get_state())
    for index in random.Random(0).sample(range(len(batches)), 8):
        restored = TrainRows(store, config_of(), microbatch_rows=4)
        restored.set_state(states[index])
        assert same(next(restored), batches[index])
        assert restored.get_state() == states[index + 1]
    restored.set_state(states[-1])
    with pytest.raises(StopIteration):
        next(restored)


def test_the_ledger_counts_what_was_delivered(store):
    rows = TrainRows(store, config_of(), microbatch_rows=4)
    counted = collections.Counter({name: 0 for name in store.source_names})
    for batch in rows:
        for index, name in enumerate(store.source_names):
            counted[name] += int(batch.loss_weights[batch.source_ids == index].sum())
        assert rows.ledger() == dict(counted)


def test_another_microbatch_size_goes_through_the_same_rows(store):
    def joined(size):
        batches = list(TrainRows(store, config_of(), microbatch_rows=size))
        return np.concatenate([batch.tokens for batch in batches])

    few, many = joined(3), joined(10)
    length = min(len(few), len(many))
    assert np.array_equal(few[:length], many[:length])
    assert not few[length:].any() and not many[length:].any(), "the last microbatch is filled up with empty rows"


def test_the_order_changes_with_the_epoch_and_the_seed(store):
    def order(seed, first, last):
        rows = TrainRows(store, config_of(code_cap=None, text_cap=None, seed=seed), microbatch_rows=1)
        chosen = (next(rows) for _ in range(last))
        code = [batch.tokens.tobytes() for batch in chosen if batch.source_ids[0, 0] == 1]
        return code[first:last]

    num_rows = int(TrainRows(store, config_of(), microbatch_rows=1).packing()["code"]["rows"])
    both = order(0, 0, 8 * num_rows)
    once, twice = both[:num_rows], both[num_rows : 2 * num_rows]
    assert sorted(once) == sorted(twice) and once != twice
    assert order(1, 0, 8 * num_rows)[:num_rows] != once
    assert order(0, 0, 8 * num_rows) == both


def test_fractions_of_an_epoch_and_no_end(store):
    half = TrainRows(store, config_of(text_cap=0.5, code_cap=1.5), microbatch_rows=2)
    for _ in half:
        pass
    rows = {name: half.packing()[name]["rows"] for name in ("text", "code")}
    assert half.epochs() == {
        "text": round(0.5 * rows["text"]) / rows["text"],
        "code": round(1.5 * rows["code"]) / rows["code"],
    }
    endless = TrainRows(store, config_of(text_cap=None, code_cap=None), microbatch_rows=2)
    endless.set_state(endless.get_state() | {"next_row": 10**13})
    far = next(endless)
    assert far.tokens.any() and endless.exhausted() == ()
    together = TrainRows(store, config_of(exhaust_together=True), microbatch_rows=2)
    for _ in together:
        pass
    assert together.epochs() == {"text": 2.0, "code": 4.0}


def test_weights_are_shares_of_tokens(store):
    rows = TrainRows(store, config_of(text_cap=None, code_cap=None), microbatch_rows=10)
    for _ in range(200):
        next(rows)
    ledger = rows.ledger()
    assert ledger["text"] / sum(ledger.values()) == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microbatch_rows": 0}, "microbatch_rows=0 must be an integer"),
        ({"microbatch_rows": 6, "num_hosts": 4}, "microbatch_rows=6 must be a multiple of the 4 hosts"),
        ({"microbatch_rows": 4, "num_hosts": 2, "host": 2}, "host=2 must be below"),
    ],
)
def test_what_does_not_fit_is_a_one_line_error(store, options, message):
    with pytest.raises(ValueError, match=message):
        TrainRows(store, config_of(), **options)


def test_a_state_of_other_data_is_refused(store):
    state = TrainRows(store, config_of(), microbatch_rows=2).get_state()
    for changed in (config_of(seed=1), config_of(text_cap=3), config_of(exhaust_together=True)):
        with pytest.raises(ValueError, match=r"^the data has changed since the checkpoint [^\n]+$"):
            TrainRows(store, changed, microbatch_rows=2).set_state(state)


def test_a_state_of_other_data_may_begin_a_new_order_with_the_ledger_carried_on(store):
    rows = TrainRows(store, config_of(), microbatch_rows=2)
    next(rows)
    changed = TrainRows(store, config_of(seed=1), microbatch_rows=2)
    changed.set_state(rows.get_state(), allow_change=True)
    assert changed.get_state()["next_row"] == 0
    assert changed.ledger() == rows.ledger() != TrainRows(store, config_of(), microbatch_rows=2).ledger()


def test_no_training_documents_is_a_one_line_error(tmp_path):
    config = config_of(held_out_fraction=1.0)
    everything = open_store(config, tmp_path)
    assert sum(1 for _ in held_out_batches(everything, config, rows=4)) > 0
    with pytest.raises(ValueError, match="source='text' has no training rows"):
        TrainRows(everything, config, microbatch_rows=2)


def test_a_source_of_weight_zero_is_held_out_as_a_whole_and_changes_nothing_else(store, tmp_path):
    unseen = SourceConfig("unseen", documents=functools.partial(texts, 3, 30), weight=0)
    config = config_of(sources=(unseen, *config_of().sources))
    wider = open_store(config, tmp_path)
    rows, alone = TrainRows(wider, config, microbatch_rows=4), TrainRows(store, config_of(), microbatch_rows=4)
    for batch, expected in zip(rows, alone, strict=True):
        np.testing.assert_array_equal(batch.tokens, expected.tokens)
        seen = batch.segment_ids[:, 0] > 0
        np.testing.assert_array_equal(batch.source_ids[seen], expected.source_ids[seen] + 1)
    assert rows.epochs() == alone.epochs() == {"text": 2, "code": 4} and rows.ledger() == alone.ledger()
    assert wider.num_tokens("unseen", "train") == 0
    assert wider.num_tokens("unseen", "held_out") == sum(len(text.encode()) + 1 for text in texts(3, 30))
    counts = 1.0 + sum(np.load(wider.directory / f"{name}.train.counts.npy") for name in ("text", "code"))
    held_out = wider.stream("unseen", "held_out")[1:]
    expected = np.mean([-np.log(counts[token] / counts.sum()) for token in held_out])
    assert wider.unigram_nats("unseen") == pytest.approx(expected)


def test_sources_of_weight_zero_alone_are_refused():
    nothing = tuple(dataclasses.replace(source, weight=0, max_epochs=None) for source in config_of().sources)
    with pytest.raises(ValueError, match="weight=0 of every source: none would be trained on; give one"):
        config_of(sources=nothing)
    with pytest.raises(ValueError, match="max_epochs=2 of source 'text' has no meaning with weight=0"):
        config_of(sources=(dataclasses.replace(config_of().sources[0], weight=0),))


def test_unique_tokens_are_few_rows_repeated_and_fewer_are_among_more(store):
    def rows_of(unique_tokens, epochs, seed=0):
        text, code = config_of(text_cap=epochs).sources
        sources = (dataclasses.replace(text, unique_tokens=unique_tokens), code)
        rows = TrainRows(store, config_of(sources=sources, seed=seed), microbatch_rows=1)
        index = store.source_names.index("text")
        found = [batch.tokens.tobytes() for batch in rows if batch.source_ids[0, 0] == index]
        return found, rows.ledger()["text"]

    whole = store.num_tokens("text", "train")
    few, tokens = rows_of(whole // 4, 3)
    assert set(collections.Counter(few).values()) == {3}
    assert tokens == pytest.approx(3 * whole / 4, rel=0.1)
    assert few[: len(few) // 3] != few[len(few) // 3 : 2 * len(few) // 3], "a new order every epoch"
    more, _ = rows_of(whole // 2, 1)
    assert set(few) < set(more) < set(rows_of(whole, 1)[0]) == set(rows_of(None, 1)[0])
    assert set(rows_of(whole // 4, 3, seed=1)[0]) != set(few)
    with pytest.raises(ValueError, match=f"unique_tokens={whole + 1} of source 'text' must be at most its"):
        rows_of(whole + 1, 1)
