"""Bytes that a model's state takes, from its configuration."""

from __future__ import annotations

from gpt4moe.accounting import parameters
from gpt4moe.accounting.shape import shape_of
from gpt4moe.config.model import ModelConfig

FLOAT32_BYTES = 4
# Gradient and the two Adam moments, all float32, beside the parameter itself.
TRAIN_BYTES_BESIDE_PARAMETER = 3 * FLOAT32_BYTES
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


def train_state_bytes(config: ModelConfig, num_trained: int | None = None) -> int:
    """Returns the bytes of parameters, gradients and AdamW state; activations come on top.

    num_trained: parameters that are not frozen, None for all; a frozen one has neither gradient nor AdamW state.
    """
    total = parameters.count(config).total
    trained = total if num_trained is None else num_trained
    return total * FLOAT32_BYTES + trained * TRAIN_BYTES_BESIDE_PARAMETER


def weight_bytes(config: ModelConfig) -> int:
    """Returns the bytes of the weights in the compute dtype, what inference holds."""
    return parameters.count(config).total * DTYPE_BYTES[config.compute_dtype]


def cache_bytes_per_token(config: ModelConfig) -> int:
    """Returns the key/value cache bytes of one token over all layers, in the compute dtype."""
    return config.num_layers * shape_of(config).cache_width * DTYPE_BYTES[config.compute_dtype]
