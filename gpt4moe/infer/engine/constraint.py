"""Continuations that follow a JSON schema: which tokens may come next, by llguidance (the extra [json]).

In: the text of a schema, tokens as they are drawn. Out: a bit for every token that keeps the text on a way to a JSON
value of the schema, written without blanks.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np

from gpt4moe.config.check import CallerError, require
from gpt4moe.infer.codec import Codec
from gpt4moe.infer.engine.draws import MASK_BITS

KEPT_SCHEMAS = 64


class Constraint:
    """Where one continuation stands in its grammar."""

    def __init__(self, matcher: Any, num_words: int):
        self._matcher, self._mask_W = matcher, np.zeros(num_words, np.uint32)

    @property
    def ended(self) -> bool:
        """Whether the text is whole, so that nothing may follow."""
        return self._matcher.is_stopped()

    def mask_W(self) -> np.ndarray:
        """Bits [W] uint32 of the tokens that may come next, the first token lowest."""
        self._matcher.unsafe_compute_mask_ptr(self._mask_W.ctypes.data, self._mask_W.nbytes)
        return self._mask_W

    def accept(self, token: int) -> str | None:
        """Goes on by the token that was drawn; returns what is wrong where it cannot, as in a schema too large."""
        if not self._matcher.is_error():  # by the mask: the library then allows end-of-text alone
            self._matcher.consume_token(token)
        return self.problem

    @property
    def problem(self) -> str | None:
        """What keeps the library from going on."""
        return f"json_schema: {self._matcher.get_error().splitlines()[0]}" if self._matcher.is_error() else None

    def copy(self) -> Constraint:
        """Another continuation that stands at the same place."""
        return Constraint(self._matcher.deep_copy(), len(self._mask_W))


class Constraints:
    """Makes constraints for a tokenizer; nothing is loaded before the first."""

    def __init__(self, tokenizer: Codec, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._begun = functools.lru_cache(maxsize=KEPT_SCHEMAS)(self._begin)

    def of(self, schema: str) -> Constraint:
        """A constraint at its beginning; `CallerError` for a schema that cannot be followed."""
        return self._begun(schema).copy()

    def _begin(self, schema: str) -> Constraint:
        matcher = _library().LLMatcher
        try:
            grammar = matcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
            problem = matcher.validate_grammar(grammar, self._guide)
        except ValueError as error:
            problem = str(error)
        if not problem.strip():
            begun = Constraint(matcher(self._guide, grammar, log_level=0), -(-self._vocab_size // MASK_BITS))
            begun.mask_W()
            problem = f"nothing can begin as it says: {begun.problem}" if begun.problem else ""
        first = problem.strip().splitlines()[0] if problem.strip() else ""
        require(not first, "json_schema", schema[:40], f"cannot be followed: {first}")
        return begun

    @functools.cached_property
    def _guide(self) -> Any:
        """The tokenizer as the library takes it: bytes of every token, or its own format where they are not bytes."""
        library, end = _library(), self._tokenizer.end_of_text
        if self._tokenizer.token_bytes is None:
            return library.LLTokenizer(self._tokenizer.serialized, n_vocab=self._vocab_size, eos_token=end)
        return library.LLTokenizer(library.TokenizerWrapper(_Bytes(self._tokenizer, self._vocab_size)))


class _Bytes:
    """What the library asks of a tokenizer; tokens without bytes, and those that only the model has, are special."""

    def __init__(self, tokenizer: Codec, vocab_size: int):
        known = [*tokenizer.token_bytes, *[b""] * (vocab_size - len(tokenizer.token_bytes))]
        self.eos_token_id, self.bos_token_id = tokenizer.end_of_text, None
        self.tokens = [piece or f"<|{index}|>".encode() for index, piece in enumerate(known)]
        self.special_token_ids = [index for index, piece in enumerate(known) if not piece]
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def _library() -> ModuleType:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise CallerError("json_schema needs llguidance; pip install -e '.[json]'") from None
    return llguidance
