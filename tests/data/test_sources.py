"""The embedded corpus and the contract of source functions."""

import functools

import pytest

from gpt4moe.config.data import DataConfig, SourceConfig
from gpt4moe.data.documents import Document, is_held_out
from gpt4moe.data.prepare import prepare
from gpt4moe.data.rendered import digits, lines
from gpt4moe.data.sources import function_documents, source_identity, stdlib_code, stdlib_text


@pytest.fixture(scope="module")
def corpus():
    return {"code": list(stdlib_code()), "text": list(stdlib_text())}


def words(count=2):
    return [f"word {index}" for index in range(count)]


def test_the_embedded_corpus_is_code_and_prose_once_each(corpus):
    for documents in corpus.values():
        texts = [document.text.strip() for document in documents]
        assert all(texts) and len(set(texts)) == len(texts)
    code, text = ("\n".join(document.text for document in corpus[name]) for name in ("code", "text"))
    assert len(code) > 5_000_000 and "class JSONDecoder" in code
    assert (
        len(text) > 1_000_000 and "Simple JSON <https://json.org> decoder" in text and "class JSONDecoder" not in text
    )
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in text


def test_code_and_docstrings_of_a_file_are_on_one_side_of_the_split(corpus):
    side = {document.group: is_held_out(document, 0.3) for document in corpus["code"]}
    shared = [document for document in corpus["text"] if document.group in side]
    assert len(shared) > 300
    assert all(is_held_out(document, 0.3) == side[document.group] for document in shared)
    groups = [document.group for document in corpus["code"] if "generated from" in document.text[:300]]
    assert set(groups) == {"encodings"}, "near copies are one group"


def test_the_split_takes_about_its_fraction():
    documents = [Document(str(index)) for index in range(5000)]
    assert sum(is_held_out(document, 0.1) for document in documents) == pytest.approx(500, abs=80)
    assert not any(is_held_out(document, 0.0) for document in documents)
    assert all(is_held_out(document, 1.0) for document in documents)


def test_a_function_may_yield_strings_and_nothing_else():
    assert list(function_documents(words)) == [Document("word 0"), Document("word 1")]
    with pytest.raises(ValueError, match=r"must yield Document or str; it gave int"):
        list(function_documents(lambda: [1]))


def test_what_a_function_refuses_comes_before_its_documents_are_collected(tmp_path):
    source, said = SourceConfig("none", documents=functools.partial(digits, count=0)), []
    with pytest.raises(ValueError, match=r"digits\.count=0 must be an integer of at least 1"):
        prepare(DataConfig((source,), 8), tmp_path / "store", progress=said.append)
    assert said == [] and not (tmp_path / "store").exists()


def test_identity_changes_with_what_is_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    files = SourceConfig("a", paths=(str(path),))
    before = source_identity(files)
    assert source_identity(files) == before
    path.write_text("three")
    assert source_identity(files) != before
    two, three = (SourceConfig("a", documents=functools.partial(words, count)) for count in (2, 3))
    assert source_identity(two) != source_identity(three)
    assert source_identity(two) != source_identity(SourceConfig("a", documents=stdlib_code))


def test_identity_of_a_function_given_another_is_of_its_code_and_not_of_its_address():
    identities = [
        source_identity(SourceConfig("a", documents=functools.partial(lines, texts=texts)))
        for texts in (stdlib_text, stdlib_code)
    ]
    assert identities[0] != identities[1] and " at 0x" not in str(identities)
