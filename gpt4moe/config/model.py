"""What the transformer is: depth, width, vocabulary, attention, experts, numerics."""

from __future__ import annotations

import dataclasses

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.check import require, require_count, require_flag, require_instance, require_positive
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.vision import VisionConfig

COMPUTE_DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: pre-RMSNorm, rotary attention, a mixture of experts in every `moe_every`-th layer.

    With `moe_every` n > 1, layers n-1, 2n-1, ... (counted from 0) hold experts and the others a dense
    feed-forward of `dense_hidden_dim`. `leading_dense_layers` come before all of these, dense too and outside
    the pattern (DeepSeek-V3, section 4.2, has three). `context_length` is the longest row the model is meant for; it
    sizes the decode cache and the attention FLOPs, no parameter depends on it. Parameters are float32, matrix products
    run in `compute_dtype`, router, softmax and loss in float32. `remat` says what the backward pass recomputes:
    nothing, everything but matrix products (`dots`), or whole layers (`full`). `vision` adds what reads images.
    Embeddings begin with deviation `embedding_std` and are divided by it where they enter the residual stream; imported
    weights, which enter as they are, have 1.
    """

    num_layers: int
    model_dim: int
    vocab_size: int
    context_length: int
    attention: AttentionConfig
    moe: MoeConfig
    moe_every: int = 1
    leading_dense_layers: int = 0
    dense_hidden_dim: int | None = None
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-6
    compute_dtype: str = "bfloat16"
    remat: str = "none"
    vision: VisionConfig | None = None
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("num_layers", "model_dim", "vocab_size", "context_length", "moe_every"):
            require_count(name, getattr(self, name))
        require_instance("attention", self.attention, AttentionConfig)
        require_instance("moe", self.moe, MoeConfig)
        require_flag("tie_embeddings", self.tie_embeddings)
        require_positive("norm_epsilon", self.norm_epsilon)
        require_positive("embedding_std", self.embedding_std)
        require(
            self.compute_dtype in COMPUTE_DTYPES, "compute_dtype", self.compute_dtype, f"must be in {COMPUTE_DTYPES}"
        )
        require(self.remat in REMAT_POLICIES, "remat", self.remat, f"must be in {REMAT_POLICIES}")
        self._check_heads()
        self._check_layers()
        self._check_vision()

    def _check_heads(self) -> None:
        heads = self.attention.num_heads
        if self.attention.head_dim is None:
            require(
                self.model_dim % heads == 0 and self.model_dim // heads % 2 == 0,
                "model_dim",
                self.model_dim,
                f"must be an even multiple of num_heads ({heads}) where head_dim is not set",
                "set AttentionConfig.head_dim or change model_dim",
            )

    def _check_layers(self) -> None:
        leading = self.leading_dense_layers
        require_count("leading_dense_layers", leading, least=0)
        constraint = f"must be less than num_layers ({self.num_layers})"
        require(leading < self.num_layers, "leading_dense_layers", leading, constraint, "raise NUM_LAYERS")
        less = f"less leading_dense_layers ({leading}) " if leading else ""
        constraint = f"{less}must be a multiple of moe_every ({self.moe_every})"
        require((self.num_layers - leading) % self.moe_every == 0, "num_layers", self.num_layers, constraint)
        if self.moe_every > 1 or leading:
            require_count("dense_hidden_dim", self.dense_hidden_dim)

    def _check_vision(self) -> None:
        require_instance("vision", self.vision, VisionConfig, optional=True)
        if self.vision is None:
            return
        cross, layers = self.vision.cross_attention, self.num_layers - self.leading_dense_layers
        constraint = f"must divide the layers ({layers}) after the leading dense ones"
        require(layers % cross.every == 0, "CrossAttentionConfig.every", cross.every, constraint)
        constraint = f"must be a multiple of moe_every ({self.moe_every})"
        for name in ("every", "offset"):
            value = getattr(cross, name)
            require(value % self.moe_every == 0, f"CrossAttentionConfig.{name}", value, constraint)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.attention.head_dim or self.model_dim // self.attention.num_heads

    @property
    def num_moe_layers(self) -> int:
        """Layers that hold experts."""
        return (self.num_layers - self.leading_dense_layers) // self.moe_every

    @property
    def superblocks_per_cross_attention(self) -> int:
        """Layers with experts for each block of cross-attention; 1 where there is none."""
        return self.vision.cross_attention.every // self.moe_every if self.vision else 1

    @property
    def num_cross_attention_layers(self) -> int:
        """Blocks of cross-attention."""
        return self.num_moe_layers // self.superblocks_per_cross_attention if self.vision else 0
