"""Which tokenizer a run uses."""

from __future__ import annotations

import dataclasses

from gpt4moe.config.check import require, require_count, require_flag, require_text

NUM_BYTES = 256
# Ids from 0 in this order, so that they stay put whatever the merges: end of text first.
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|pad|>", "<|image|>", "<|endofchunk|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|im_start|>", "<|im_end|>", *(f"<|spare_{index}|>" for index in range(7))),
)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A byte-level BPE of `vocab_size` trained on the sources, or the user's own `tokenizer.json` at `path`.

    `train_bytes` bounds the text that the merges are learned from. `byte_level_only` skips the merges: every byte
    is a token, which tests use. Of one's own file, `end_of_text` is the token that stands between documents and ends
    a text (None: the first of the usual names that is in it), `begin_of_text` what a prompt follows (None: the same).
    """

    vocab_size: int = 8192
    path: str | None = None
    train_bytes: int = 20_000_000
    byte_level_only: bool = False
    begin_of_text: str | None = None
    end_of_text: str | None = None

    def __post_init__(self) -> None:
        require_count("vocab_size", self.vocab_size)
        least = NUM_BYTES + len(SPECIAL_TOKENS)
        require(
            self.path is not None or self.vocab_size >= least,
            "tokenizer.vocab_size",
            self.vocab_size,
            f"must be at least {least}: bytes and special tokens",
        )
        for name in ("path", "begin_of_text", "end_of_text"):
            require_text(f"tokenizer.{name}", getattr(self, name))
        named = (self.begin_of_text, self.end_of_text) != (None, None)
        mend = "leave begin_of_text and end_of_text out"
        require(self.path is not None or not named, "tokenizer.path", None, "has no tokens of other names", mend)
        require_count("train_bytes", self.train_bytes)
        require_flag("byte_level_only", self.byte_level_only)
