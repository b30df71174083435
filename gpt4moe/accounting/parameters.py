"""Exact parameter counts of a model configuration, by component."""

from __future__ import annotations

import dataclasses

from gpt4moe.accounting import vision
from gpt4moe.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters by component; `experts` sums over experts and layers, `head` is 0 where embeddings are tied."""

    embedding: int
    attention: int
    experts: int
    shared_experts: int
    dense: int
    router: int
    norms: int
    head: int
    vision_encoder: int = 0
    resampler: int = 0
    cross_attention: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(dataclasses.astuple(self))


def count(config: ModelConfig) -> ParameterCount:
    """Returns every parameter the model instantiates."""
    embedding, seeing = config.vocab_size * config.model_dim, config.vision
    return ParameterCount(
        embedding=embedding,
        attention=config.num_layers * attention_per_layer(config),
        experts=config.num_moe_layers * config.moe.num_experts * one_expert(config),
        shared_experts=config.num_moe_layers * shared_expert(config),
        dense=(config.num_layers - config.num_moe_layers) * dense_per_layer(config),
        router=config.num_moe_layers * config.model_dim * config.moe.num_experts,
        norms=_norms(config),
        head=0 if config.tie_embeddings else embedding,
        vision_encoder=vision.encoder_parameters(seeing.encoder) if seeing else 0,
        resampler=vision.resampler_parameters(seeing.resampler, seeing.encoder.dim) if seeing else 0,
        cross_attention=vision.cross_attention_parameters(config) if seeing else 0,
    )


def count_active(config: ModelConfig) -> int:
    """Returns the parameters that one token of text touches: as `count`, with K experts a layer instead of E.

    Encoder and resampler, which images pass through, are left out.
    """
    everything = count(config)
    of_images = everything.vision_encoder + everything.resampler
    return everything.total - everything.experts - of_images + experts_active(config)


def experts_active(config: ModelConfig) -> int:
    """Returns the expert parameters that one token touches over all layers."""
    return config.num_moe_layers * config.moe.experts_per_token * one_expert(config)


def attention_per_layer(config: ModelConfig) -> int:
    """Returns D*H*(N + 2M) for query, key and value, and N*H*D for the output."""
    heads, kv_heads = config.attention.num_heads, config.attention.num_kv_heads
    return config.model_dim * config.head_dim * (2 * heads + 2 * kv_heads)


def one_expert(config: ModelConfig) -> int:
    """Returns the parameters of one expert of one layer."""
    return _feed_forward(config, config.moe.hidden_dim)


def shared_expert(config: ModelConfig) -> int:
    """Returns the parameters of the shared expert of one layer."""
    return _feed_forward(config, config.moe.shared_hidden_dim)


def dense_per_layer(config: ModelConfig) -> int:
    """Returns the parameters of the feed-forward of a layer without experts."""
    return _feed_forward(config, config.dense_hidden_dim or 0)


def _feed_forward(config: ModelConfig, hidden_dim: int) -> int:
    return (3 if config.moe.gated else 2) * config.model_dim * hidden_dim


def _norms(config: ModelConfig) -> int:
    qk = 2 * config.head_dim if config.attention.qk_norm else 0
    return (2 * config.num_layers + 1) * config.model_dim + config.num_layers * qk
