"""FLOPs per token, counted from the configuration; a multiply-add is two.

The convention: model FLOPs are matrix products with the output head, without the attention core (scores and
weighted values), which is counted on its own. Training is three times forward; recomputation is not counted.
"""

from __future__ import annotations

from gpt4moe.accounting import parameters, vision
from gpt4moe.config.model import ModelConfig


def forward_flops_per_token(config: ModelConfig) -> int:
    """Returns the forward matmul FLOPs of one token: twice the active matrix parameters, the head once.

    With the token's part of cross-attention; what an image costs is `vision.flops_per_image`.
    """
    counted = parameters.count(config)
    head = counted.head or counted.embedding
    matrices = counted.attention + parameters.experts_active(config) + counted.shared_experts
    return 2 * (matrices + counted.dense + counted.router + head) + vision.cross_attention_flops_per_token(config)


def attention_core_flops_per_token(config: ModelConfig, length: int, *, causal: bool = True) -> int:
    """Returns the forward FLOPs of one token's scores and weighted values in a row of `length` tokens.

    A causal token sees length / 2 keys on average; non-causal counts (PaLM, Megatron) take all of them.
    """
    keys = length // 2 if causal else length
    return 4 * config.num_layers * config.attention.num_heads * config.head_dim * keys


def train_flops_per_token(config: ModelConfig) -> int:
    """Returns forward and backward matmul FLOPs of one token, the numerator of model FLOPs utilisation."""
    return 3 * forward_flops_per_token(config)
