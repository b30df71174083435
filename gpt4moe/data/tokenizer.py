"""The tokenizer: text to token ids and back; merges learned from documents, plain bytes, or a user's own file."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gpt4moe.config.check import CallerError, require
from gpt4moe.config.tokenizer import SPECIAL_TOKENS, TokenizerConfig
from gpt4moe.data.fast_bpe import byte_of_letter, fast_engine

# The pieces that merges stay within: the pattern of OpenAI's cl100k_base with its case-insensitive group written out,
# because the two regex engines that read it here fold case differently outside ASCII.
PATTERN = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT_NAMES = (SPECIAL_TOKENS[0], "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[SEP]")
PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]")
IMAGE_NAMES = ("<|image|>", "<image>")
# Documents are encoded in stretches: the regex engine overflows its stack on about a million spaces in a row.
STRETCH_CHARACTERS = 200_000


class Tokenizer:
    """Text to ids and back.

    `vocab_size` is one more than the highest id, `end_of_text` stands before every document, `begin_of_text` before a
    prompt (the same, but for foreign tokenizers that have one), `image` where an image is (None where there is no such
    token), `specials` maps the reserved tokens to their ids, and `token_bytes` holds the bytes of every id (None where
    the tokens are not bytes). The text of a special token inside a document is encoded as plain text.
    """

    def __init__(self, serialized: str, begin_of_text: str | None = None, end_of_text: str | None = None) -> None:
        """Builds from the text of a `tokenizer.json`; the names are those of `TokenizerConfig`.

        ValueError where that is not one, or lacks a token of these names or any end-of-text token.
        """
        self.serialized, self._names = serialized, (begin_of_text, end_of_text)
        try:
            self._reference = tokenizers.Tokenizer.from_str(serialized)
        except Exception as error:  # the library raises bare Exception
            raise CallerError(
                f"tokenizer.json cannot be read: {error}; use the format of the tokenizers library"
            ) from None
        self._reference.encode_special_tokens = True  # their text inside a document is plain text
        vocabulary = self._reference.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        added = self._reference.get_added_tokens_decoder()
        self.specials = {token.content: index for index, token in sorted(added.items()) if token.special}
        for setting, name in (("begin_of_text", begin_of_text), ("end_of_text", end_of_text)):
            known = name is None or name in vocabulary
            require(known, f"tokenizer.{setting}", name, "is not in the vocabulary of tokenizer.json")
        self.end_of_text = _first_of(END_OF_TEXT_NAMES, vocabulary) if end_of_text is None else vocabulary[end_of_text]
        constraint, mend = f"needs one of {END_OF_TEXT_NAMES} in the vocabulary", "name another: tokenizer.end_of_text"
        require(self.end_of_text is not None, "tokenizer.path", "", constraint, mend)
        self.begin_of_text = self.end_of_text if begin_of_text is None else vocabulary[begin_of_text]
        self.pad = _first_of(PAD_NAMES, vocabulary)
        self.image = _first_of(IMAGE_NAMES, self.specials)
        self.token_bytes = _token_bytes(serialized, vocabulary, self.specials, self.vocab_size)
        self._fast = fast_engine(serialized, self._reference) if self.token_bytes is not None else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without end-of-text."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text` as [T] uint32, without end-of-text."""
        parts = [self._encode_stretch(stretch) for stretch in _stretches(text)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.uint32), *parts])

    def spell_array(self, text: str) -> np.ndarray:
        """Token ids of `text` without merges, [T] uint32, one a byte; ValueError where some byte has no token."""
        return self._id_of_byte[np.frombuffer(text.encode(), np.uint8)]

    @functools.cached_property
    def _id_of_byte(self) -> np.ndarray:
        pieces = self.token_bytes or []
        id_of = {piece[0]: index for index, piece in reversed(list(enumerate(pieces))) if piece and len(piece) == 1}
        whole = len(id_of) == 256
        require(
            whole, "spelled", True, f"needs a token for each byte: this tokenizer has {len(id_of)} of 256", "unset it"
        )
        return np.asarray([id_of[byte] for byte in range(256)], np.uint32)

    def _encode_stretch(self, text: str) -> np.ndarray:
        if self._fast is not None:
            return self._fast.encode_to_numpy(text, disallowed_special=())
        return np.asarray(self._reference.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`; special and unknown ids give none, so that pieces may be decoded one by one as they come."""
        known = [int(index) for index in ids if 0 <= index < self.vocab_size]
        if self.token_bytes is not None:
            return b"".join(self.token_bytes[index] for index in known)
        return self._reference.decode(known, skip_special_tokens=True).encode("utf-8", "replace")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; never raises: bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray | None:
        """Bytes of every id, [V] int32 with 0 for special tokens; None where the tokens are not bytes."""
        if self.token_bytes is None:
            return None
        return np.asarray([len(piece) for piece in self.token_bytes], np.int32)

    def count_bytes(self, ids: np.ndarray) -> int:
        """Number of bytes that `ids` decode to."""
        return len(self.decode_bytes(ids.tolist())) if self.byte_lengths is None else int(self.byte_lengths[ids].sum())

    def __reduce__(self):
        return Tokenizer, (self.serialized, *self._names)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns byte-level BPE merges from `texts` until the vocabulary has `vocab_size` ids (or none is left)."""
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(byte_of_letter()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer.to_str())


def byte_tokenizer() -> Tokenizer:
    """The tokenizer without merges: the special tokens, then one id a byte value."""
    letters = sorted(byte_of_letter())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *letters))}
    tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return Tokenizer(tokenizer.to_str())


def load_tokenizer(path: str | pathlib.Path, config: TokenizerConfig | None = None) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`; ValueError where the file is missing or not one.

    `config` names begin and end of text, where it does.
    """
    path = pathlib.Path(path)
    require(path.is_file(), "tokenizer.path", str(path), "is not a file", "give the path of a tokenizer.json")
    return named_tokenizer(path.read_text(encoding="utf-8"), config)


def named_tokenizer(serialized: str, config: TokenizerConfig | None) -> Tokenizer:
    """The tokenizer of the text of a `tokenizer.json`, with begin and end of text as `config` names them."""
    return Tokenizer(serialized, config.begin_of_text, config.end_of_text) if config else Tokenizer(serialized)


def build_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `config` asks for; `texts` are read only where merges are learned."""
    if config.path is not None:
        tokenizer = load_tokenizer(config.path, config)
    elif config.byte_level_only:
        tokenizer = byte_tokenizer()
    else:
        tokenizer = train_tokenizer(texts, config.vocab_size)
    fits = tokenizer.vocab_size <= config.vocab_size
    require(fits, "tokenizer.vocab_size", config.vocab_size, f"must be at least the {tokenizer.vocab_size} ids in use")
    return tokenizer


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    pieces = pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, letters])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _first_of(names: Sequence[str], vocabulary: dict[str, int]) -> int | None:
    return next((vocabulary[name] for name in names if name in vocabulary), None)


def _token_bytes(serialized: str, vocabulary: dict, specials: dict, vocab_size: int) -> list[bytes] | None:
    if '"ByteLevel"' not in serialized:
        return None
    byte_of = byte_of_letter()
    pieces = [b""] * vocab_size
    for token, index in vocabulary.items():
        if token not in specials:
            known = all(letter in byte_of for letter in token)
            pieces[index] = bytes(byte_of[letter] for letter in token) if known else token.encode()
    return pieces


def _stretches(text: str) -> Iterable[str]:
    start = 0
    while len(text) - start > STRETCH_CHARACTERS:
        newline = text.rfind("\n", start + 1, start + STRETCH_CHARACTERS)
        end = newline if newline > 0 else start + STRETCH_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]
