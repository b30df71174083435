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
    is a token, which tests use.
    """

    vocab_size: int = 8192
    path: str | None = None
    train_bytes: int = 20_000_000
    byte_level_only: bool = False

    def __post_init__(self) -> None:
        require_count("vocab_size", self.vocab_size)
        least = NUM_BYTES + len(SPECIAL_TOKENS)
        require(
            self.path is not None or self.vocab_size >= least,
            "tokenizer.vocab_size",
            self.vocab_size,
            f"must be at least {least}: bytes and special tokens",
        )
        require_text("tokenizer.path", self.path)
        require_count("train_bytes", self.train_bytes)
        require_flag("byte_level_only", self.byte_level_only)
