"""Images in the store: what goes in comes out at its token, on its side of the split, resumed, in several processes."""

import base64
import itertools
import json

import numpy as np
import pytest

from gpt4moe.config.data import DataConfig, SourceConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.data import prepare as preparation
from gpt4moe.data.documents import Document, is_held_out, texts_between
from gpt4moe.data.encode import Unit
from gpt4moe.data.files import FilePart
from gpt4moe.data.prepare import format_report, prepare, store_hash
from gpt4moe.data.sample import training_texts
from gpt4moe.data.store import TokenStore
from tests.data.image_documents import IMAGES, config_of, many, picture
from tests.data.test_prepare import contents

BYTES = TokenizerConfig(byte_level_only=True)


def url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def write_jsonl(path, documents):
    lines = [{"text": one.text, "images": [url(image) for image in one.images]} for one in documents]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def stored(store, split):
    """(text with markers, images) of every document of a split, read back by the token."""
    stream, offsets, images = (
        store.stream("pictures", split),
        store.offsets("pictures", split),
        store.images("pictures", split),
    )
    found = []
    for start, end in itertools.pairwise(offsets):
        text, files = "", []
        for place in range(start + 1, end):
            if stream[place] == store.tokenizer.image:
                (number,) = np.flatnonzero(images.positions == place)
                files.append(images[int(number)][0])
                text += "<image>"
            else:
                text += store.tokenizer.decode(stream[place : place + 1])
        found.append((text, tuple(files)))
    return found


def test_documents_come_back_with_their_images_on_their_side_of_the_split(tmp_path):
    documents = [
        *many(40),
        *many(40, per_document=2)[20:],
        Document("no image <image>"),
        Document("first", images=(picture(7),)),
    ]
    config = config_of(documents, held_out_fraction=0.3)
    report = prepare(config, tmp_path)
    store = TokenStore(report.directory)
    expected = {"train": [], "held_out": []}
    for one in documents:
        marked = one.text if "<image>" in one.text or not one.images else "<image>" + one.text
        expected["held_out" if is_held_out(one, 0.3) else "train"].append((marked, one.images))
    literal = ("no image <image>", ())
    for split, wanted in expected.items():
        assert stored(store, split) == wanted
    assert any(literal in wanted for wanted in expected.values()), "without images a marker is plain text"
    (source,) = report.sources
    assert source.images == sum(len(images) for _, images in expected["train"])
    assert source.held_out_images == sum(len(images) for _, images in expected["held_out"])
    assert source.image_bytes == sum(len(image) for one in documents for image in one.images)
    spelt = [sum(len(text.encode()) for text in texts_between(one)) for one in documents]
    assert source.bytes + source.held_out_bytes == sum(spelt)
    assert "image_bytes" in format_report(report)


def test_the_digest_knows_of_the_images(tmp_path):
    digests = set()
    for red in (1, 2):
        documents = [Document("same", images=(picture(red),))]
        digests.add(prepare(config_of(documents), tmp_path / str(red)).sources[0].digest)
    assert len(digests) == 2


def test_a_killed_run_goes_on_and_several_processes_write_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "UNIT_BYTES", 1500)
    documents = many(60, per_document=2)
    write_jsonl(tmp_path / "a.jsonl", documents)
    source = SourceConfig("pictures", paths=(str(tmp_path / "a.jsonl"),), image_field="images")
    config = DataConfig((source,), 16, BYTES, held_out_fraction=0.2, images=IMAGES)
    whole = prepare(config, tmp_path / "whole", workers=1)
    found = [one for split in ("train", "held_out") for one in stored(TokenStore(whole.directory), split)]
    assert sorted(found) == sorted((one.text, one.images) for one in documents)

    def stop_at_part_five(line):
        if "part 5" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "cut", progress=stop_at_part_five)
    assert len(list((tmp_path / "cut").glob("building-*/parts/*/counts.json"))) == 5
    prepare(config, tmp_path / "cut")
    prepare(config, tmp_path / "two", workers=2)
    assert contents(tmp_path / "cut") == contents(tmp_path / "two") == contents(tmp_path / "whole")


@pytest.mark.parametrize("fraction", [0.3, 1 - 1e-9])
def test_of_a_single_document_the_end_is_held_out_with_its_images(tmp_path, fraction):
    # 20 tokens: E a b c d # e f g h # i j k l # m n # o; the last 6 (or half) are the other side.
    images = tuple(picture(red) for red in (1, 2, 3, 4))
    document = Document("abcd<image>efgh<image>ijkl<image>mn<image>o", images=images)
    store = TokenStore(prepare(config_of([document], held_out_fraction=fraction), tmp_path).directory)
    train, held_out = (stored(store, split) for split in ("train", "held_out"))
    if fraction == 0.3:
        assert train == [("abcd<image>efgh<image>ijk", images[:2])]
        assert held_out == [("l<image>mn<image>o", images[2:])]
    else:
        assert train == [("abcd<image>efgh", images[:1])]
        assert held_out == [("<image>ijkl<image>mn<image>o", images[1:])]


def test_images_behind_a_held_out_end_move_up_with_their_tokens(tmp_path):
    long = Document("abcdefgh<image>ij<image>kl", images=(picture(1), picture(2)))
    after = Document("m<image>n", images=(picture(3),))
    assert not is_held_out(long, 0.2) and not is_held_out(after, 0.2)
    # 19 tokens, of which the last 4 of the longest document are held out: j # k l.
    store = TokenStore(prepare(config_of([long, after], held_out_fraction=0.2), tmp_path).directory)
    assert stored(store, "train") == [("abcdefgh<image>i", long.images[:1]), (after.text, after.images)]
    assert stored(store, "held_out") == [("j<image>kl", long.images[1:])]


def test_the_limit_of_pixels_changes_the_hash_where_files_hold_images_and_nothing_else_does(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", many(3))
    source = SourceConfig("pictures", paths=(str(tmp_path / "a.jsonl"),), image_field="images")
    config = DataConfig((source,), 16, BYTES, images=IMAGES)

    def with_images(**changes):
        return DataConfig(
            (source,), 16, BYTES, images=type(IMAGES)(**{"height": 4, "width": 6, "per_row": 2} | changes)
        )

    assert store_hash(with_images(height=99, per_row=7, workers=0, fit="crop")) == store_hash(config)
    assert store_hash(with_images(max_pixels=99)) != store_hash(config)
    with pytest.raises(ValueError, match="images=None but source 'pictures' has image_field='images'; give DataConfig"):
        store_hash(DataConfig((source,), 16, BYTES))


def test_a_tokenizer_without_a_token_for_images_is_a_one_line_error(tmp_path):
    from gpt4moe.data.tokenizer import byte_tokenizer

    fields = byte_tokenizer().serialized.replace("<|image|>", "<|picture|>")
    (tmp_path / "tokenizer.json").write_text(fields)
    tokenizer = TokenizerConfig(path=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"^tokenizer.path=[^\n]*has none of [^\n]*<\|image\|>[^\n]*$"):
        prepare(config_of(many(2), tokenizer=tokenizer), tmp_path / "store")


def test_merges_are_learned_from_the_text_around_images_and_from_plain_markers(tmp_path):
    """Plain are those of a function, whose documents have a group, and not those of a file."""
    lines = [
        {"text": "a<image>b", "images": [url(picture(1))]},
        {"text": "plain <image>"},
        {"text": "<image>", "images": []},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = (FilePart(f"{tmp_path}/a.jsonl", 0),)
    source = SourceConfig("pictures", paths="unread", image_field="images")
    config = DataConfig((source,), 16, TokenizerConfig(train_bytes=4000), held_out_fraction=0.0, images=IMAGES)
    for group, texts in (("group", ["ab", "plain <image>"]), (None, ["ab"])):
        unit = Unit("pictures", tmp_path, files, "text", group, 0.0, "images", 100)
        assert list(training_texts(config, [unit])) == texts
