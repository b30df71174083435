"""Text as it comes: whole characters, nothing behind a stop text, and in the end what decoding at once gives."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from gpt4moe.data.tokenizer import Tokenizer, byte_tokenizer, train_tokenizer
from gpt4moe.infer.engine.text import TextStream

TEXT = "naïve 漢字 🙂 ok\nend 👩‍👩‍👧"


def word_tokenizer():
    """Words with a blank before them, strange bytes one by one, as Llama and Mixtral have them."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "s", "▁sat"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens(["</s>"])
    return Tokenizer(tokenizer.to_str())


TOKENIZERS = {"bytes": byte_tokenizer, "merges": lambda: train_tokenizer([TEXT] * 3, 300), "words": word_tokenizer}


def ids_of(tokenizer, kind):
    if kind != "words":
        return tokenizer.encode(TEXT)
    first = 2 + 256
    return [first, first + 1, first + 2, *(2 + byte for byte in "漢🙂".encode()), first + 3, first, 2 + 10]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_of_any_size_add_up_to_the_text_and_never_hold_half_a_character(kind):
    tokenizer = TOKENIZERS[kind]()
    ids = ids_of(tokenizer, kind)
    whole = tokenizer.decode(ids)
    assert len(whole) > 10
    generator = np.random.default_rng(0)
    for _ in range(30):
        stream, pieces, start = TextStream(tokenizer), [], 0
        while start < len(ids):
            end = start + int(generator.integers(1, 4))
            pieces.append(stream.push(ids[start:end]))
            start = end
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + stream.finish() == whole


def test_half_a_character_at_the_end_is_replaced_and_bad_bytes_do_not_stick():
    tokenizer = byte_tokenizer()
    half = tokenizer.encode("é")[:1]
    stream = TextStream(tokenizer)
    assert stream.push(tokenizer.encode("a") + half) == "a"
    assert stream.push(tokenizer.encode("b")) == "\ufffdb"
    assert stream.push(half) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize(
    "stops", [("STOP",), ("xSTOP!", "STOP"), ("abSTOP", "STOP"), ("bSTOP!", "OP"), ("P",)], ids=str
)
def test_text_ends_before_a_stop_text_wherever_tokens_part(stops):
    text = "abSTabSTOP!S"
    _, place = min((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
    expected = text[:place]
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    for size in range(1, len(ids) + 1):
        stream = TextStream(tokenizer, stops)
        pieces = [stream.push(ids[start : start + size]) for start in range(0, len(ids), size)]
        assert stream.ended
        assert "".join(pieces) + stream.finish() == expected


def test_what_may_become_a_stop_text_waits_until_it_cannot():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, ["\n\nQ"])
    told = [stream.push(tokenizer.encode(character)) for character in "a\n\nb\n"]
    assert told == ["a", "", "", "\n\nb", ""]
    assert (stream.finish(), stream.ended) == ("\n", False)
