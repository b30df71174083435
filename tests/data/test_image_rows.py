"""Images in rows: what a token sees, told as a story; packing limits; the same batches from anywhere."""

import concurrent.futures
import dataclasses
import functools
import gc
import itertools
import json
import pathlib
import threading

import numpy as np
import pytest

from gpt4moe.config.check import RunError
from gpt4moe.config.data import SourceConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.data.documents import Document
from gpt4moe.data.image_rows import IMAGES_A_JOB, ImageDecoder
from gpt4moe.data.packing import ImageLimit, make_plan
from gpt4moe.data.pipeline import TrainRows, held_out_batches, open_store
from gpt4moe.data.rows import Row, stack_rows
from gpt4moe.types import Batch
from tests.data.image_documents import IMAGES, config_of, many, picture, reds

FIELDS = [field.name for field in dataclasses.fields(Batch) if field.name != "replay_ids"]


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def only_batch(tmp_path, documents, **changes):
    config = config_of(documents, **changes)
    (batch,) = TrainRows(open_store(config, tmp_path), config, microbatch_rows=2)
    return batch


def test_a_story_of_two_documents_in_one_row(tmp_path):
    # E is end-of-text, # an image. The first document says a before its image, the second has two and text between.
    #   E a # b | E # x # y
    documents = [
        Document("a<image>b", images=(picture(50),)),
        Document("<image>x<image>y", images=(picture(60), picture(70))),
    ]
    images = dataclasses.replace(IMAGES, per_row=3)
    batch = only_batch(tmp_path, documents, length=12, images=images)
    assert batch.segment_ids[0].tolist() == [1] * 4 + [2] * 5 + [0] * 3
    assert reds(batch.images).tolist() == [[50, 60, 70], [0, 0, 0]]
    assert batch.image_valid.tolist() == [[True] * 3, [False] * 3]
    #                                         E   a  #  b |  E  #  x  #  y
    assert batch.image_index[0].tolist() == [-1, -1, 0, 0, -1, 1, 1, 2, 2, -1, -1, -1]
    assert batch.first_image[0].tolist() == [-1, -1, 0, 0, -1, 1, 1, 1, 1, -1, -1, -1]
    # What follows a is an image and not learned, and what follows the second E and x.
    assert batch.loss_weights[0].tolist() == [1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0, 0]
    assert (batch.image_index[1] == -1).all() and (batch.first_image[1] == -1).all()
    assert batch.images.dtype == np.uint8 and batch.image_index.dtype == batch.first_image.dtype == np.int32


def test_a_cut_document_does_not_see_the_images_of_its_earlier_piece(tmp_path):
    # Rows of 6: E # a b c d | e f # g
    batch = only_batch(tmp_path, [Document("<image>abcdef<image>g", images=(picture(1), picture(2)))], length=6)
    first, second = (0, 1) if batch.image_valid[0, 0] and reds(batch.images)[0, 0] == 1 else (1, 0)
    assert batch.image_index[first].tolist() == [-1, 0, 0, 0, 0, 0]
    assert batch.image_index[second].tolist() == [-1, -1, 0, 0, -1, -1]
    assert reds(batch.images)[[first, second]].tolist() == [[1, 0], [2, 0]]
    # E -> # and f -> # have an image as target; d -> e goes on in the next row and is learned.
    assert batch.loss_weights[[first, second]].tolist() == [[0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0]]


def test_a_piece_that_ends_before_an_image_does_not_learn_it(tmp_path):
    # E a b c d e | # f
    batch = only_batch(tmp_path, [Document("abcde<image>f", images=(picture(9),))], length=6)
    rows = sorted(zip(batch.image_valid[:, 0].tolist(), batch.loss_weights.tolist(), strict=True))
    assert rows == [(False, [1, 1, 1, 1, 1, 0]), (True, [1, 1, 0, 0, 0, 0])]


def test_more_images_than_a_row_holds_cut_a_document_and_lose_none():
    # 20 tokens with images at 1, 3, 5, 12, 13; at most two a row: cut before the third and the fifth.
    plan = make_plan(np.asarray([0, 20, 24]), 32, ImageLimit(np.asarray([1, 3, 5, 12, 13]), 2))
    pieces = sorted(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True))
    assert pieces == [(0, 5), (5, 8), (13, 7), (20, 4)]
    assert plan.num_rows == 3 and plan.split_documents == 1


@pytest.mark.parametrize("seed", range(5))
def test_rows_keep_both_limits_and_hold_every_token_once(seed):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 30, 300))])
    positions = np.sort(rng.choice(offsets[-1], 700, replace=False))
    for per_row in (1, 2, 4):
        plan = make_plan(offsets, 16, ImageLimit(positions, per_row))
        covered = [np.arange(start, start + count) for start, count in zip(plan.starts, plan.lengths, strict=True)]
        assert np.array_equal(np.sort(np.concatenate(covered)), np.arange(offsets[-1]))
        assert plan.row_tokens.max() <= 16
        images = [np.isin(part, positions).sum() for part in covered]
        in_row = np.add.reduceat(images, plan.row_offsets[:-1])
        assert in_row.max() == per_row
    loose, plain = make_plan(offsets, 16, ImageLimit(positions, 16)), make_plan(offsets, 16)
    fills = [sorted(plan.row_tokens.tolist()) for plan in (loose, plain)]
    assert fills[0] == fills[1], "a limit that never binds changes at most which of equal rows is taken"


def test_all_images_come_once_and_the_ledger_counts_the_targets(tmp_path):
    documents = many(30, per_document=3)
    config = config_of(documents, images=dataclasses.replace(IMAGES, per_row=4))
    store = open_store(config, tmp_path)
    rows = TrainRows(store, config, microbatch_rows=4)
    found, weights = [], 0
    for batch in rows:
        found += reds(batch.images)[batch.image_valid].tolist()
        weights += batch.loss_weights.sum()
        assert not batch.images[~batch.image_valid].any()
        for row in range(len(batch.tokens)):
            tokens = np.flatnonzero(batch.tokens[row] == store.tokenizer.image)
            assert batch.image_index[row, tokens].tolist() == list(range(batch.image_valid[row].sum()))
    assert sorted(found) == list(range(1, 91))
    assert rows.ledger() == {"pictures": weights} == {"pictures": store.num_targets("pictures", "train")}
    assert store.num_targets("pictures", "train") == store.num_tokens("pictures", "train") - 90


def test_the_ledger_is_right_after_every_batch_where_documents_are_cut_between_images(tmp_path):
    config = config_of(many(30, per_document=5))  # two a row
    rows = TrainRows(open_store(config, tmp_path), config, microbatch_rows=2)
    assert rows.packing()["pictures"]["split_documents"] == 30
    weights = 0
    for batch in rows:
        weights += batch.loss_weights.sum()
        assert rows.ledger() == {"pictures": weights}


def test_a_batch_waits_for_the_last_of_its_images():
    """The last job has an image that is not to be had before the batch is asked for."""
    count = IMAGES_A_JOB + 1
    files, asked = [(picture(1 + index),) for index in range(count)], threading.Event()

    class Slow:
        path = "nowhere"

        def __getitem__(self, number):
            assert number < count - 1 or asked.wait(60)
            return files[number]

    nothing = np.zeros(4, np.int32)
    row = Row(0, 0, nothing, nothing, nothing, nothing, images=tuple(range(count)))
    decoder = ImageDecoder(dataclasses.replace(IMAGES, per_row=count, workers=2), lambda source: Slow())
    decoding = decoder.begin([row], 1)
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        seen = other.submit(lambda: decoder.finish(decoding, stack_rows([row], 1, 4)).image_valid.copy())
        concurrent.futures.wait([seen], timeout=0.2)
        asked.set()
        assert seen.result().all()


def test_the_images_of_the_next_batch_are_begun_with_this_one(tmp_path):
    images = dataclasses.replace(IMAGES, workers=1)
    config = config_of(many(20), images=images)
    rows = TrainRows(open_store(config, tmp_path), config, microbatch_rows=2)
    for _ in range(2):
        next(rows)
        assert list(rows._decoding) == [rows.get_state()["next_row"]]


def test_held_out_targets_are_those_that_the_store_says(tmp_path):
    config = config_of(many(60), held_out_fraction=0.3, held_out_tokens=150)
    store = open_store(config, tmp_path)
    batches = [batch for _, batch in held_out_batches(store, config, rows=3)]
    assert sum(batch.loss_weights.sum() for batch in batches) == store.num_targets("pictures", "held_out")
    assert sum(batch.image_valid.sum() for batch in batches) == store.num_tokens(
        "pictures", "held_out"
    ) - store.num_targets("pictures", "held_out")
    targets = np.concatenate([batch.targets[batch.loss_weights > 0] for batch in batches])
    counts = np.load(store.directory / "pictures.train.counts.npy") + 1.0
    assert counts[store.tokenizer.image] == 1, "never a target in training"
    assert store.unigram_nats("pictures") == pytest.approx(np.mean(np.log(counts.sum()) - np.log(counts[targets])))


@pytest.mark.parametrize("how", [{"workers": 0}, {"workers": 1}, {"workers": 3}, {"processes": 2}], ids=str)
def test_batches_are_the_same_however_decoded_with_any_number_of_hosts_and_from_any_state(tmp_path, how):
    config = config_of(many(40))
    store = open_store(config, tmp_path)
    whole = list(TrainRows(store, config, microbatch_rows=4))
    assert len(whole) > 4
    threads = dataclasses.replace(config, images=dataclasses.replace(IMAGES, **how))
    hosts = [TrainRows(store, threads, microbatch_rows=4, num_hosts=2, host=host) for host in range(2)]
    states = []
    for index, expected in enumerate(whole):
        states.append(json.dumps(hosts[0].get_state()))
        hosts[index % 2].look_ahead(3)
        parts = [next(host) for host in hosts]
        assert same(
            Batch(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS}), expected
        )
    for index in (3, 1):
        rows = TrainRows(store, threads, microbatch_rows=4)
        next(rows)
        rows.set_state(json.loads(states[index]))
        assert same(next(rows), whole[index])
        assert json.dumps(rows.get_state()) == states[index + 1]


def test_a_spelled_source_has_its_markers_and_no_merged_token_and_goes_on_from_any_state(tmp_path):
    texts = [f"<image>the cat sat on mat {index}" for index in range(40)]
    documents = [Document(text, images=(picture(1 + index),)) for index, text in enumerate(texts)]
    merging = TokenizerConfig(vocab_size=300)
    plain = config_of(documents, length=64, tokenizer=merging)
    spelled = config_of(documents, length=64, tokenizer=merging)
    source = dataclasses.replace(plain.sources[0], spelled=True)
    words = SourceConfig("words", documents=lambda: ["the cat sat on the mat"] * 20, max_epochs=1)
    spelled = dataclasses.replace(spelled, sources=(source, words))
    store = open_store(spelled, tmp_path)
    tokenizer = store.tokenizer
    stream, offsets = store.stream("pictures", "train"), store.offsets("pictures", "train")
    for start, end in itertools.pairwise(offsets):
        assert stream[start : start + 2].tolist() == [tokenizer.end_of_text, tokenizer.image]
        assert all(len(tokenizer.token_bytes[token]) == 1 for token in stream[start + 2 : end])
    read = [tokenizer.decode(stream[start:end]) for start, end in itertools.pairwise(offsets)]
    assert read == [text.removeprefix("<image>") for text in texts]
    longest = max(len(tokenizer.token_bytes[token]) for token in store.stream("words", "train"))
    assert longest > 1, "the other source is merged as ever"
    assert (
        store.stream("pictures", "train").size > open_store(plain, tmp_path / "plain").stream("pictures", "train").size
    )
    rows = TrainRows(store, spelled, microbatch_rows=2)
    before = next(rows), json.dumps(rows.get_state())
    after = TrainRows(store, spelled, microbatch_rows=2)
    after.set_state(json.loads(before[1]))
    assert same(next(rows), next(after))


def test_another_limit_of_images_is_another_plan_and_order(tmp_path):
    documents = many(30)
    one, other = (config_of(documents, images=dataclasses.replace(IMAGES, per_row=number)) for number in (2, 1))
    store = open_store(one, tmp_path)
    first, second = (TrainRows(store, config, microbatch_rows=2) for config in (one, other))
    assert second.packing()["pictures"]["rows"] == 30 > first.packing()["pictures"]["rows"]
    assert next(second).image_valid.sum(axis=1).tolist() == [1, 1]
    with pytest.raises(ValueError, match="the data has changed since the checkpoint"):
        second.set_state(first.get_state())
    smaller = TrainRows(
        store, dataclasses.replace(one, images=dataclasses.replace(IMAGES, height=2)), microbatch_rows=2
    )
    smaller.set_state(first.get_state())


def test_a_source_without_images_gives_the_rows_it_gave_and_none_of_them(tmp_path):
    texts = SourceConfig("texts", documents=functools.partial(list, ["one <image> is text", "two"]), max_epochs=1)
    plain = config_of(None, sources=(texts,), images=None)
    config = dataclasses.replace(plain, images=IMAGES)
    store, again = open_store(plain, tmp_path), open_store(config, tmp_path)
    assert again.directory == store.directory, "the hash of a store of text does not know of images"
    assert not list(store.directory.glob("*image*")) and "image" not in (store.directory / "report.json").read_text()
    (without,), (batch,) = (list(TrainRows(store, each, microbatch_rows=2)) for each in (plain, config))
    for name in FIELDS[:6]:
        assert np.array_equal(getattr(batch, name), getattr(without, name))
    assert without.images is without.image_valid is without.image_index is without.first_image is None
    assert batch.images.shape == (2, 2, 4, 6, 3) and not batch.images.any() and not batch.image_valid.any()
    assert (batch.image_index == -1).all() and (batch.first_image == -1).all()


def test_text_and_images_are_mixed(tmp_path):
    pictures = config_of(many(20)).sources[0]
    texts = SourceConfig(
        "texts", documents=functools.partial(list, [f"{index} words" for index in range(20)]), max_epochs=1
    )
    config = config_of(None, sources=(texts, pictures))
    store = open_store(config, tmp_path)
    assert store.sources_with_images == ("pictures",)
    for batch in TrainRows(store, config, microbatch_rows=3):
        of_texts = batch.source_ids[:, 0] == 0
        assert not batch.image_valid[of_texts].any() and (batch.image_index[of_texts] == -1).all()


def test_clips_have_frames(tmp_path):
    frames = [picture(red) for red in (10, 20, 30, 40, 50)]
    documents = [Document("<image>long", images=(tuple(frames),)), Document("<image>one", images=(frames[4],))]
    batch = only_batch(tmp_path, documents, length=12, images=dataclasses.replace(IMAGES, frames=3))
    assert batch.images.shape == (2, 2, 3, 4, 6, 3)
    assert reds(batch.images)[0].tolist() == [[10, 30, 50], [50, 0, 0]], "evenly spread from first to last"
    assert batch.image_valid[0].tolist() == [[True] * 3, [True, False, False]]
    single = only_batch(tmp_path, documents, length=12)
    assert reds(single.images)[0].tolist() == [10, 50]


def test_images_without_a_config_are_one_line_errors(tmp_path):
    documents = many(3)
    with pytest.raises(ValueError, match=r"^images=None but source 'pictures' has some; give an ImageConfig$"):
        open_store(config_of(documents, images=None), tmp_path / "one")
    store = open_store(config_of(documents), tmp_path / "two")
    with pytest.raises(ValueError, match=r"^images=None but source 'pictures' has some"):
        TrainRows(store, config_of(documents, images=None), microbatch_rows=2)


def test_bytes_a_patch_and_a_token_are_counted(tmp_path):
    config = config_of(many(20), images=dataclasses.replace(IMAGES, height=28, width=14))
    store = open_store(config, tmp_path)
    rows = TrainRows(store, config, microbatch_rows=2)
    counted = rows.image_bytes((14, 14))["pictures"]
    assert counted.images == 20 and counted.patches == 2 and counted.fed_per_patch == 588
    assert rows.image_bytes((28, 7))["pictures"].patches == 2  # as high as the image, half as wide
    assert rows.image_bytes((28, 14))["pictures"].fed_per_patch == 2 * 588
    stored = (store.directory / "pictures.train.images").stat().st_size
    assert counted.stored_per_patch == pytest.approx(stored / 40)
    fed = sum(batch.images.nbytes for batch in rows)
    assert counted.fed_per_token == pytest.approx(fed / store.num_targets("pictures", "train"), rel=0.1)


def test_processes_name_an_image_that_cannot_be_decoded_and_leave_nothing_behind():
    class Stored:
        path = "pictures.images"
        files = ((picture(9),), (b"no picture",))

        def __getitem__(self, number):
            return self.files[number]

    nothing = np.zeros(4, np.int32)
    rows = [Row(0, 0, nothing, nothing, nothing, nothing, images=(number,)) for number in range(2)]
    decoder = ImageDecoder(dataclasses.replace(IMAGES, processes=1), lambda source: Stored())
    good = decoder.begin(rows[:1], 1)
    batch = decoder.finish(good, stack_rows(rows[:1], 1, 4))
    assert batch.image_valid[0].tolist() == [True, False] and reds(batch.images)[0].tolist() == [9, 0]
    bad = decoder.begin(rows, 2)
    with pytest.raises(RunError, match=r"^image 1 of pictures\.images cannot be decoded: not one of PNG"):
        decoder.finish(bad, stack_rows(rows, 2, 4))
    names = [pathlib.Path(decoding.images_BIFHW3.filename) for decoding in (good, bad)]
    bad = None
    gc.collect()
    assert not any(name.exists() for name in names)
    (process,) = decoder._processes._pool._processes.values()
    process.kill()
    process.join()
    with pytest.raises(RunError, match=r"^a process that decodes images died .*ImageConfig\.processes=0 uses threads"):
        decoder.finish(decoder.begin(rows, 2), stack_rows(rows, 2, 4))
