"""The shape of a decoder-only transformer: the widths from which parameters, FLOPs and bytes follow.

A `ModelConfig` has one (`shape_of`), and so have models of others that this project costs but does not train: with
biases, learned positions, latent attention, LayerNorm.
"""

from __future__ import annotations

import dataclasses
import functools

from gpt4moe.config.check import require, require_count
from gpt4moe.config.model import ModelConfig

COUNTS = ("num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "num_experts")
NORM_KINDS = {"rms": 1, "layer": 2, "layer_without_bias": 1}


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): ranks of the latents, widths of a head's parts.

    query_rank 0: queries are projected directly. The cache holds key_value_rank + rotary_dim values a token and layer.
    """

    query_rank: int
    key_value_rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """Widths of a model. The last `num_moe_layers` layers hold experts, the others a feed-forward of `hidden_dim`.

    gated: SwiGLU, three matrices, else two. shared_hidden_dim: of all shared experts together. biases: on every matrix
    of attention and feed-forward; qkv_biases: on query, key and value alone. norms: kind of norm, `norms_per_layer` of
    them and one at the end. learned_positions: rows of a position table, 0 for none. window: keys that a token sees at
    most, None for all before it. capacity_factor: room of an expert as a multiple of its fair share, None: dropless.
    """

    name: str
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    hidden_dim: int = 0
    gated: bool = True
    num_moe_layers: int = 0
    num_experts: int = 1
    experts_per_token: int = 1
    expert_hidden_dim: int = 0
    shared_hidden_dim: int = 0
    capacity_factor: float | None = None
    tied: bool = False
    qk_norm: bool = False
    biases: bool = False
    qkv_biases: bool = False
    norms: str = "rms"
    norms_per_layer: int = 2
    learned_positions: int = 0
    window: int | None = None
    latent: LatentAttention | None = None

    def __post_init__(self) -> None:
        for name in COUNTS:
            require_count(f"Shape.{name}", getattr(self, name))
        require(self.norms in NORM_KINDS, "Shape.norms", self.norms, f"must be in {tuple(NORM_KINDS)}")
        most = f"must be at most num_layers ({self.num_layers})"
        require(0 <= self.num_moe_layers <= self.num_layers, "Shape.num_moe_layers", self.num_moe_layers, most)
        most = f"must be at most num_experts ({self.num_experts})"
        require(self.experts_per_token <= self.num_experts, "Shape.experts_per_token", self.experts_per_token, most)

    def __hash__(self) -> int:
        return self._hash  # a search looks it up a hundred thousand times

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    @property
    def num_dense_layers(self) -> int:
        """Layers without experts."""
        return self.num_layers - self.num_moe_layers

    @property
    def matrices(self) -> int:
        """Matrices of a feed-forward or an expert."""
        return 3 if self.gated else 2

    @property
    def core_width(self) -> float:
        """Width of one token's scores and weighted values over all heads, their mean: num_heads * head_dim."""
        if self.latent is None:
            return self.num_heads * self.head_dim
        return self.num_heads * (self.latent.plain_dim + self.latent.rotary_dim + self.latent.value_dim) / 2

    @property
    def cache_width(self) -> int:
        """Values that the cache holds for one token in one layer, keys and values."""
        if self.latent is None:
            return 2 * self.num_kv_heads * self.head_dim
        return self.latent.key_value_rank + self.latent.rotary_dim


def shape_of(model: ModelConfig | Shape) -> Shape:
    """Returns the shape of a configuration; a shape is its own. What reads images is not in it."""
    if isinstance(model, Shape):
        return model
    attention, moe = model.attention, model.moe
    return Shape(
        name="gpt4moe",
        num_layers=model.num_layers,
        model_dim=model.model_dim,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        hidden_dim=model.dense_hidden_dim or 0,
        gated=moe.gated,
        num_moe_layers=model.num_moe_layers,
        num_experts=moe.num_experts,
        experts_per_token=moe.experts_per_token,
        expert_hidden_dim=moe.hidden_dim,
        shared_hidden_dim=moe.shared_hidden_dim,
        capacity_factor=moe.capacity_factor,
        tied=model.tie_embeddings,
        qk_norm=attention.qk_norm,
    )
