"""Vision towers of CLIP, SigLIP and Idefics as parameters of our `VisionEncoder`.

Sizes are read from the arrays, what they do not tell (heads, activation, epsilon) from the model's config.json. Part of
an encoder is had by changing its configuration before its parameters are taken: fewer layers give the features after so
many (LLaVA takes the last but one), `norm_after` puts CLIP's post_layernorm after them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpt4moe.config.check import require
from gpt4moe.config.vision import EncoderConfig
from gpt4moe.interop.arrays import (
    Arrays,
    Table,
    count_layers,
    into_heads,
    linear_pair,
    norm_pair,
    out_of_heads,
    parameters_of,
    part,
    same,
    transposed,
)

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family's config.json need not say, and what is the same for all of the family."""

    num_heads: int
    activation: str
    epsilon: float
    norm_after: bool
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]


# transformers: image_utils.OPENAI_CLIP_MEAN, _STD; models/idefics/image_processing_idefics.py has the same numbers.
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = Family(12, "quick_gelu", 1e-5, False, *CLIP_PIXELS)
SIGLIP = Family(12, "gelu_pytorch_tanh", 1e-6, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# It has a post_layernorm and does not apply it to what the resampler reads.
IDEFICS = Family(16, "gelu", 1e-5, False, *CLIP_PIXELS)
FAMILIES = {
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "idefics": IDEFICS,
    "idefics_vision": IDEFICS,
}
ENCODER_ANCHOR = "embeddings.patch_embedding.weight"
ENCODER_LAYER = "encoder.layers.{}."


def encoder_config(foreign: Mapping[str, Any], arrays: Arrays) -> EncoderConfig:
    """Returns the configuration of a CLIP, SigLIP or Idefics tower from its config.json and its arrays.

    `foreign` is the config of the tower, or of a model that has it as `vision_config`. Raises `CallerError` for a
    family or an activation that we lack.
    """
    vision, tower = foreign.get("vision_config", foreign), part(arrays, ENCODER_ANCHOR)
    kind = vision.get("model_type", foreign.get("model_type"))
    require(kind in FAMILIES, "model_type", kind, f"must be in {tuple(FAMILIES)}")
    family, (dim, _, patch, _) = FAMILIES[kind], tower[ENCODER_ANCHOR].shape
    class_token = "embeddings.class_embedding" in tower
    num_patches = len(tower["embeddings.position_embedding.weight"]) - int(class_token)
    side = math.isqrt(num_patches)
    require(side * side == num_patches, "patches of the position table", num_patches, "must be those of a square image")
    activation = vision.get("hidden_act", family.activation)
    require(activation in ACTIVATIONS, "hidden_act", activation, f"must be in {tuple(ACTIVATIONS)}")
    return EncoderConfig(
        height=side * patch,
        width=side * patch,
        patch_size=patch,
        dim=dim,
        num_layers=count_layers(tower, ENCODER_LAYER + "layer_norm1.weight"),
        num_heads=vision.get("num_attention_heads", family.num_heads),
        hidden_dim=len(tower["encoder.layers.0.mlp.fc1.weight"]),
        class_token=class_token,
        patch_bias="embeddings.patch_embedding.bias" in tower,
        norm_before="pre_layrnorm.weight" in tower,
        norm_after=family.norm_after,
        activation=ACTIVATIONS[activation],
        norm_epsilon=vision.get("layer_norm_eps", family.epsilon),
        pixel_mean=family.pixel_mean,
        pixel_std=family.pixel_std,
    )


def encoder_parameters(config: EncoderConfig, arrays: Arrays) -> dict[str, np.ndarray]:
    """Returns the parameters of our `VisionEncoder` by path. SigLIP's pooling head has no place in it.

    Our class token holds its own position: the sum of theirs.
    """
    tower = part(arrays, ENCODER_ANCHOR)
    positions = tower.pop("embeddings.position_embedding.weight")
    if config.class_token:
        token = tower.pop("embeddings.class_embedding").reshape(1, -1)
        tower["leading"], positions = token + positions[:1], positions[1:]
    tower["positions"] = positions
    later = range(config.num_layers, count_layers(tower, ENCODER_LAYER + "layer_norm1.weight"))
    ignored = ("head.", "embeddings.position_ids", *(ENCODER_LAYER.format(layer) for layer in later))
    if not config.norm_after:
        ignored += ("post_layernorm.",)
    return parameters_of(_encoder_table(config), tower, config.num_layers, ignored)


def _encoder_table(config: EncoderConfig) -> Table:
    heads = into_heads(config.num_heads)
    table = {
        "patch.weight": (ENCODER_ANCHOR, _patch_matrix),
        "positions": ("positions", same),
        **norm_pair("blocks.attention_norm", ENCODER_LAYER + "layer_norm1"),
        **linear_pair("blocks.query", ENCODER_LAYER + "self_attn.q_proj", heads),
        **linear_pair("blocks.key", ENCODER_LAYER + "self_attn.k_proj", heads),
        **linear_pair("blocks.value", ENCODER_LAYER + "self_attn.v_proj", heads),
        **linear_pair("blocks.output", ENCODER_LAYER + "self_attn.out_proj", out_of_heads(config.num_heads)),
        **norm_pair("blocks.feed_forward_norm", ENCODER_LAYER + "layer_norm2"),
        **linear_pair("blocks.up", ENCODER_LAYER + "mlp.fc1", transposed),
        **linear_pair("blocks.down", ENCODER_LAYER + "mlp.fc2", transposed),
    }
    if config.patch_bias:
        table["patch.bias"] = ("embeddings.patch_embedding.bias", same)
    if config.class_token:
        table["leading"] = ("leading", same)
    if config.norm_before:
        table |= norm_pair("norm_before", "pre_layrnorm")
    if config.norm_after:
        table |= norm_pair("norm_after", "post_layernorm")
    return table


def _patch_matrix(kernel: np.ndarray) -> np.ndarray:
    """A convolution's [D, colours, rows, columns] as our [rows * columns * colours, D]."""
    return kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))
