"""What the attention block is: heads, key/value heads, head dim, rotary base."""

from __future__ import annotations

import dataclasses

from gpt4moe.config.check import require, require_count, require_flag, require_positive


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Causal self-attention with rotary positions; `num_kv_heads` 1 is multi-query, `num_heads` is multi-head.

    `head_dim` None means model_dim / num_heads; the query width num_heads * head_dim need not equal model_dim.
    `query_chunk` bounds the score matrix kept at once: longer rows are computed chunk by chunk and recomputed
    in the backward pass, so that no [T, T] matrix per head is stored.
    """

    num_heads: int
    num_kv_heads: int = 1
    head_dim: int | None = None
    qk_norm: bool = False
    rope_theta: float = 10_000.0
    query_chunk: int = 1024

    def __post_init__(self) -> None:
        require_count("num_heads", self.num_heads)
        require_count("num_kv_heads", self.num_kv_heads)
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"must divide num_heads ({self.num_heads})",
            "use 1 for multi-query or num_heads for multi-head attention",
        )
        if self.head_dim is not None:
            require_count("head_dim", self.head_dim)
            require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "must be even for rotary positions")
        require_flag("qk_norm", self.qk_norm)
        require_positive("rope_theta", self.rope_theta)
        require_count("query_chunk", self.query_chunk)
