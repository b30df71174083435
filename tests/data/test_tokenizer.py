"""Byte-level BPE: equal to a slow loop and the reference engine, reversible, never raising; a user's own."""

import itertools
import json
import random
import sys

import pytest
import regex
from tokenizers import Tokenizer as Reference
from tokenizers import decoders, models, pre_tokenizers, trainers

from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.data.fast_bpe import byte_of_letter, fast_engine
from gpt4moe.data.tokenizer import (
    PATTERN,
    SPECIAL_TOKENS,
    Tokenizer,
    build_tokenizer,
    byte_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

TEXTS = [
    "the cat sat on the mat; the cat's hat isn't that.\n" * 5,
    "def cat(mat):\n    return mat + 12345  # the hat\n" * 5,
    "na\u00efve caf\u00e9 \u4f60\u597d \U0001f642\u200d tabs\t\tand\r\nlines   \n\n\n",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 340)


def random_text(rng: random.Random) -> str:
    """Letters that the merges know, and any other character of Unicode."""
    known = "".join(TEXTS)
    surrogates = range(0xD800, 0xE000)
    anything = [chr(code) for code in (rng.randrange(sys.maxunicode + 1) for _ in range(20)) if code not in surrogates]
    pieces = [
        rng.choice([*anything, rng.choice(known), known[(i := rng.randrange(len(known))) : i + 9]]) for _ in range(40)
    ]
    return "".join(pieces)


def slow_encode(serialized: str, text: str) -> list[int]:
    """The definition of byte-level BPE: in every piece, merge the pair of lowest rank until there is none."""
    model = json.loads(serialized)["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    letter_of = {byte: letter for letter, byte in byte_of_letter().items()}
    ids = []
    for piece in regex.findall(PATTERN, text):
        symbols = [letter_of[byte] for byte in piece.encode()]
        while pairs := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]:
            _, i = min(pairs)
            symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
        ids += [model["vocab"][symbol] for symbol in symbols]
    return ids


def test_ids_are_those_of_the_slow_loop(tokenizer):
    rng = random.Random(0)
    for text in [*TEXTS, *(random_text(rng) for _ in range(30))]:
        assert tokenizer.encode(text) == slow_encode(tokenizer.serialized, text)


def test_fast_engine_has_the_ids_of_the_reference_engine_on_real_code(tokenizer):
    reference = Reference.from_str(tokenizer.serialized)
    assert fast_engine(tokenizer.serialized, reference) is not None
    for module in (json, random, pytest, regex):
        with open(module.__file__, encoding="utf-8") as file:
            text = file.read()
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_text_comes_back_and_bytes_are_counted(tokenizer):
    rng = random.Random(1)
    for one in (tokenizer, byte_tokenizer()):
        for text in ("", " ", "\x00", *TEXTS, *SPECIAL_TOKENS, *(random_text(rng) for _ in range(50))):
            ids = one.encode(text)
            assert one.decode(ids) == text
            assert one.byte_lengths[ids].sum() == len(text.encode()) == one.count_bytes(one.encode_array(text))
            assert not {one.end_of_text, *one.specials.values()} & set(ids), "a document never holds a special id"


def test_what_is_spelled_has_no_merges_and_decodes_to_the_same_text(tokenizer):
    letters = {byte: tokenizer.token_bytes.index(bytes([byte])) for byte in range(256)}
    rng = random.Random(3)
    for text in ("", "the cat <|image|>", *TEXTS, *(random_text(rng) for _ in range(50))):
        ids = tokenizer.spell_array(text)
        assert (
            ids.tolist() == [letters[byte] for byte in text.encode()] and ids.dtype == tokenizer.encode_array("").dtype
        )
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.spell_array(TEXTS[0])) > len(tokenizer.encode(TEXTS[0])), "there are merges to be left out"


def test_special_ids_come_first_whatever_the_merges(tokenizer):
    for one in (tokenizer, byte_tokenizer()):
        assert list(one.specials.items()) == [(name, index) for index, name in enumerate(SPECIAL_TOKENS)]
        assert one.end_of_text == 0
    assert tokenizer.vocab_size == 340
    assert byte_tokenizer().vocab_size == 256 + len(SPECIAL_TOKENS)


def test_decoding_never_raises_and_streams(tokenizer):
    rng = random.Random(2)
    for _ in range(50):
        tokenizer.decode([rng.randrange(-5, tokenizer.vocab_size + 50) for _ in range(20)])
    text = "caf\u00e9 \U0001f642"
    ids = byte_tokenizer().encode(text)
    assert b"".join(byte_tokenizer().decode_bytes([index]) for index in ids).decode() == text
    assert byte_tokenizer().decode(ids[:-1]) == text[:-1] + "\ufffd"


def test_a_million_spaces_do_not_overflow(tokenizer):
    text = "x" + " " * 1_500_000 + "y"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_users_byte_level_tokenizer_is_accepted(tmp_path):
    theirs = Reference(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator(TEXTS, trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.end_of_text == theirs.token_to_id("</s>")
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size=299 must be at least the 300"):
        build_tokenizer(TokenizerConfig(path=str(tmp_path / "tokenizer.json"), vocab_size=299), [])


def test_the_order_of_the_merges_counts_not_that_of_the_ids():
    fields = json.loads(byte_tokenizer().serialized)
    fields["model"]["vocab"] |= {"qz": 273, "zx": 272}
    fields["model"]["merges"] = [["q", "z"], ["z", "x"]]
    ours = Tokenizer(json.dumps(fields))
    assert ours.encode("qzx") == [273, *ours.encode("x")] == slow_encode(ours.serialized, "qzx")


def test_a_users_tokenizer_of_words_is_accepted():
    theirs = Reference(models.WordLevel({"<eos>": 0, "[UNK]": 1, "cat": 2, "sat": 3}, unk_token="[UNK]"))
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()
    theirs.add_special_tokens(["<eos>"])
    ours = Tokenizer(theirs.to_str())
    assert ours.encode("cat sat dog") == [2, 3, 1]
    assert ours.decode([2, 3]) == "cat sat"
    assert 0 not in ours.encode("cat <eos> sat"), "its text in a document is plain text"
    assert ours.byte_lengths is None
    with pytest.raises(ValueError, match=r"^spelled=True needs a token for each byte: [^\n]* 0 of 256; [^\n]*$"):
        ours.spell_array("cat")


@pytest.mark.parametrize("text", ["{}", "not json", Reference(models.WordLevel({"a": 0}, unk_token="a")).to_str()])
def test_a_file_that_is_no_tokenizer_is_a_one_line_error(text):
    with pytest.raises(ValueError, match=r"^tokenizer[^\n]*$"):
        Tokenizer(text)


def test_a_missing_file_and_a_small_vocabulary_are_one_line_errors():
    with pytest.raises(ValueError, match="is not a file"):
        load_tokenizer("/nowhere/tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size=260 must be at least 272"):
        build_tokenizer(TokenizerConfig(vocab_size=260), TEXTS)
