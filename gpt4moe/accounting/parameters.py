"""Exact parameter counts of a model, by component: of a configuration or of a bare shape."""

from __future__ import annotations

import dataclasses
import functools

from gpt4moe.accounting import vision
from gpt4moe.accounting.shape import NORM_KINDS, Shape, shape_of
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
    spelling: int = 0

    @functools.cached_property
    def total(self) -> int:
        """All parameters."""
        return sum(dataclasses.astuple(self))


@functools.lru_cache(maxsize=256)
def count(model: ModelConfig | Shape) -> ParameterCount:
    """Returns every parameter of the model; what reads images only a configuration has."""
    shape, seeing = shape_of(model), getattr(model, "vision", None)
    embedding = shape.vocab_size * shape.model_dim
    return ParameterCount(
        embedding=embedding + shape.learned_positions * shape.model_dim,
        attention=shape.num_layers * attention_per_layer(shape),
        experts=shape.num_moe_layers * shape.num_experts * one_expert(shape),
        shared_experts=shape.num_moe_layers * _feed_forward(shape, shape.shared_hidden_dim),
        dense=shape.num_dense_layers * _feed_forward(shape, shape.hidden_dim),
        router=shape.num_moe_layers * shape.model_dim * shape.num_experts,
        norms=_norms(shape),
        head=0 if shape.tied else embedding,
        vision_encoder=vision.encoder_parameters(seeing.encoder) if seeing else 0,
        resampler=vision.resampler_parameters(seeing.resampler, seeing.encoder.dim) if seeing else 0,
        cross_attention=vision.cross_attention_parameters(model) if seeing else 0,
        spelling=vision.spelling_parameters(seeing) if seeing else 0,
    )


def count_active(model: ModelConfig | Shape) -> int:
    """Returns the parameters that one token of text touches: as `count`, with K experts a layer instead of E.

    Encoder, resampler and what spells, which images pass through, are left out.
    """
    everything = count(model)
    of_images = everything.vision_encoder + everything.resampler + everything.spelling
    return everything.total - everything.experts - of_images + experts_active(model)


def experts_active(model: ModelConfig | Shape) -> int:
    """Returns the expert parameters that one token touches over all layers."""
    shape = shape_of(model)
    return shape.num_moe_layers * shape.experts_per_token * one_expert(shape)


def one_expert(model: ModelConfig | Shape) -> int:
    """Returns the parameters of one expert of one layer."""
    shape = shape_of(model)
    return _feed_forward(shape, shape.expert_hidden_dim)


def attention_per_layer(shape: Shape) -> int:
    """Returns the parameters of query, key, value and output projections: D*H*(N + 2M) + N*H*D and biases."""
    if shape.latent:
        return _latent_attention(shape)
    queries, keys = shape.num_heads * shape.head_dim, 2 * shape.num_kv_heads * shape.head_dim
    biases = (queries + keys) * (shape.biases or shape.qkv_biases) + shape.model_dim * shape.biases
    return shape.model_dim * (2 * queries + keys) + biases


def _latent_attention(shape: Shape) -> int:
    """Down and up projections of queries, keys and values, the norms of their latents among them."""
    dim, heads, latent = shape.model_dim, shape.num_heads, shape.latent
    query_width = heads * (latent.plain_dim + latent.rotary_dim)
    rank = latent.query_rank
    queries = dim * rank + rank + rank * query_width if rank else dim * query_width
    down = dim * (latent.key_value_rank + latent.rotary_dim) + latent.key_value_rank
    up = latent.key_value_rank * heads * (latent.plain_dim + latent.value_dim)
    return queries + down + up + heads * latent.value_dim * dim


def _feed_forward(shape: Shape, hidden_dim: int) -> int:
    biases = (shape.matrices - 1) * hidden_dim + shape.model_dim if shape.biases and hidden_dim else 0
    return shape.matrices * shape.model_dim * hidden_dim + biases


def _norms(shape: Shape) -> int:
    qk = 2 * shape.head_dim if shape.qk_norm else 0
    vectors = NORM_KINDS[shape.norms] * (shape.norms_per_layer * shape.num_layers + 1)
    return vectors * shape.model_dim + shape.num_layers * qk
