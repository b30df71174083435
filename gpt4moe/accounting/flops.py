"""FLOPs per token, counted from a configuration or a bare shape; a multiply-add is two.

The convention: model FLOPs are matrix products with the output head, without the attention core (scores and
weighted values), which is counted on its own. Training is three times forward; recomputation is not counted.
"""

from __future__ import annotations

from gpt4moe.accounting import parameters, vision
from gpt4moe.accounting.shape import Shape, shape_of
from gpt4moe.config.model import ModelConfig


def forward_flops_per_token(model: ModelConfig | Shape) -> int:
    """Returns the forward matmul FLOPs of one token: twice the active matrix parameters, the head once.

    With the token's part of cross-attention; what an image costs is `vision.flops_per_image`. Biases and the norms of
    latents, which are no matrices, count as if they were: under a ten-thousandth.
    """
    counted = parameters.count(model)
    shape = shape_of(model)
    head = shape.vocab_size * shape.model_dim
    matrices = counted.attention + parameters.experts_active(shape) + counted.shared_experts
    seen = vision.cross_attention_flops_per_token(model) if isinstance(model, ModelConfig) else 0
    return 2 * (matrices + counted.dense + counted.router + head) + seen


def attention_core_flops_per_token(model: ModelConfig | Shape, length: int, *, causal: bool = True) -> float:
    """Returns the forward FLOPs of one token's scores and weighted values in a row of `length` tokens.

    A causal token sees length / 2 keys on average, and no more than the window; non-causal counts (PaLM, Megatron)
    take all of the row.
    """
    shape = shape_of(model)
    keys = length // 2 if causal else length
    keys = min(keys, shape.window) if shape.window else keys
    return 4 * shape.num_layers * shape.core_width * keys


def train_flops_per_token(model: ModelConfig | Shape) -> int:
    """Returns forward and backward matmul FLOPs of one token, the numerator of model FLOPs utilisation."""
    return 3 * forward_flops_per_token(model)
