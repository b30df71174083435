"""Idefics (Hugging Face, version 1), an open Flamingo over a Llama, as a configuration and parameters of ours.

Its dense feed-forwards are layers of one expert each, whose router has nothing to choose. Its embedding enters the
residual stream as it is (`embedding_std` 1); the tokens it adds for images are the last of the vocabulary.
Dropless, as evaluation and decoding are, our model gives its logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.check import require
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.vision import CrossAttentionConfig, ResamplerConfig, VisionConfig
from gpt4moe.interop.arrays import (
    Arrays,
    Table,
    below,
    count_layers,
    into_heads,
    norm_pair,
    out_of_heads,
    parameters_of,
    part,
    same,
    transposed,
)
from gpt4moe.interop.vision import encoder_config, encoder_parameters

VISION, RESAMPLER = "model.vision_model.", "model.perceiver_resampler."
LAYER, CROSS_LAYER = "model.layers.{}.", "model.gated_cross_attn_layers.{}."
# Those of the text model's vocabulary, then those that are added to it.
EMBEDDINGS = "model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight"
HEADS = "lm_head.weight", "lm_head.additional_fc.weight"


def idefics_config(foreign: Mapping[str, Any], arrays: Arrays) -> ModelConfig:
    """Returns the configuration of an Idefics model, in float32, from its config.json and its arrays.

    Raises `CallerError` for what we lack: another activation than SiLU, scaled rotary positions.
    """
    activation, rope = foreign.get("hidden_act", "silu"), foreign.get("rope_parameters") or {}
    require(activation == "silu", "hidden_act", activation, "must be silu")
    require(rope.get("rope_type", "default") == "default", "rope_type", rope.get("rope_type"), "must be default")
    heads = foreign.get("num_attention_heads", 32)
    dim = arrays["model.norm.weight"].shape[0]
    hidden = len(arrays[LAYER.format(0) + "mlp.up_proj.weight"])
    has_resampler = any(name.startswith(RESAMPLER) for name in arrays)
    return ModelConfig(
        num_layers=count_layers(arrays, LAYER + "input_layernorm.weight"),
        model_dim=dim,
        vocab_size=sum(len(arrays[name]) for name in EMBEDDINGS if name in arrays),
        context_length=foreign.get("max_position_embeddings", 2048),
        attention=AttentionConfig(heads, num_kv_heads=heads, rope_theta=rope.get("rope_theta", 10_000.0)),
        moe=MoeConfig(num_experts=1, experts_per_token=1, hidden_dim=hidden),
        tie_embeddings=False,
        norm_epsilon=foreign.get("rms_norm_eps", 1e-6),
        compute_dtype="float32",
        embedding_std=1.0,
        vision=VisionConfig(
            encoder=encoder_config(foreign, below(arrays, VISION)),
            cross_attention=_cross_attention(foreign, arrays, heads, dim, hidden),
            resampler=idefics_resampler_config(foreign, arrays) if has_resampler else None,
        ),
    )


def _cross_attention(foreign: Mapping, arrays: Arrays, heads: int, dim: int, hidden: int) -> CrossAttentionConfig:
    layer = CROSS_LAYER.format(0)
    return CrossAttentionConfig(
        every=foreign.get("cross_layer_interval", 1),
        num_heads=heads,
        head_dim=dim // heads,
        hidden_dim=hidden,
        qk_norm=layer + "cross_attn.q_layer_norm.weight" in arrays,
        gate="vector" if arrays[layer + "alpha_dense"].size > 1 else "scalar",
        feed_forward_without_image=True,
    )


def idefics_parameters(config: ModelConfig, arrays: Arrays) -> dict[str, np.ndarray]:
    """Returns the parameters of our `Transformer` by path, from those of a whole Idefics model."""
    vision = config.vision
    parts = {"vision_encoder": encoder_parameters(vision.encoder, below(arrays, VISION))}
    if vision.resampler is not None:
        parts["resampler"] = idefics_resampler_parameters(vision.resampler, below(arrays, RESAMPLER))
    cross = {name: array for name, array in arrays.items() if name.startswith(CROSS_LAYER.split("{")[0])}
    parts["cross_attention"] = idefics_cross_attention_parameters(config, cross)
    rest = {name: array for name, array in arrays.items() if name not in cross}
    rest = {name: array for name, array in rest.items() if not name.startswith((VISION, RESAMPLER))}
    parameters = {f"{place}.{path}": array for place, module in parts.items() for path, array in module.items()}
    return parameters | _text_parameters(config, rest)


def idefics_cross_attention_parameters(config: ModelConfig, arrays: Arrays) -> dict[str, np.ndarray]:
    """Returns the parameters of our `GatedCrossAttention`, stacked, from those of `gated_cross_attn_layers`."""
    cross = config.vision.cross_attention
    heads, attention = into_heads(cross.num_heads), CROSS_LAYER + "cross_attn."
    gate = np.ravel if cross.gate == "vector" else np.squeeze
    table = {
        "attention_norm.scale": (CROSS_LAYER + "input_layernorm.weight", same),
        "query": (attention + "q_proj.weight", heads),
        "key": (attention + "k_proj.weight", heads),
        "value": (attention + "v_proj.weight", heads),
        "output": (attention + "o_proj.weight", out_of_heads(cross.num_heads)),
        "attention_gate": (CROSS_LAYER + "alpha_cross_attn", gate),
        "feed_forward_norm.scale": (CROSS_LAYER + "post_attention_layernorm.weight", same),
        "dense.gate": (CROSS_LAYER + "mlp.gate_proj.weight", transposed),
        "dense.up": (CROSS_LAYER + "mlp.up_proj.weight", transposed),
        "dense.down": (CROSS_LAYER + "mlp.down_proj.weight", transposed),
        "feed_forward_gate": (CROSS_LAYER + "alpha_dense", gate),
    }
    if cross.qk_norm:
        table["query_norm.scale"] = (attention + "q_layer_norm.weight", same)
        table["key_norm.scale"] = (attention + "k_layer_norm.weight", same)
    return parameters_of(table, arrays, config.num_cross_attention_layers)


def _text_parameters(config: ModelConfig, arrays: Arrays) -> dict[str, np.ndarray]:
    """Parameters of the language model alone. A head that is tied to the embedding is stored or not."""
    tied = [name if name in arrays else other for name, other in zip(HEADS, EMBEDDINGS, strict=True)]
    tables = {"embedding": EMBEDDINGS, "head": tied}
    whole = {
        ours: np.concatenate([np.asarray(arrays[name], np.float32) for name in names if name in arrays])
        for ours, names in tables.items()
    }
    rest = {name: array for name, array in arrays.items() if name not in (*EMBEDDINGS, *HEADS)}
    # Older checkpoints hold what follows from the configuration.
    ignored = tuple(LAYER.format(layer) + "self_attn.rotary_emb." for layer in range(config.num_layers))
    parameters = parameters_of(_text_table(config), rest | whole, config.num_layers, ignored)
    router = np.zeros((config.num_layers, config.model_dim, 1), np.float32)
    return parameters | {"blocks.moe.router": router}


def _text_table(config: ModelConfig) -> Table:
    heads, one_expert = into_heads(config.attention.num_heads), lambda matrix: matrix.T[None]
    attention, feed_forward = LAYER + "self_attn.", LAYER + "mlp."
    return {
        "embedding": ("embedding", same),
        "blocks.attention_norm.scale": (LAYER + "input_layernorm.weight", same),
        "blocks.attention.query": (attention + "q_proj.weight", heads),
        "blocks.attention.key": (attention + "k_proj.weight", heads),
        "blocks.attention.value": (attention + "v_proj.weight", heads),
        "blocks.attention.output": (attention + "o_proj.weight", out_of_heads(config.attention.num_heads)),
        "blocks.feed_forward_norm.scale": (LAYER + "post_attention_layernorm.weight", same),
        "blocks.moe.experts.gate": (feed_forward + "gate_proj.weight", one_expert),
        "blocks.moe.experts.up": (feed_forward + "up_proj.weight", one_expert),
        "blocks.moe.experts.down": (feed_forward + "down_proj.weight", one_expert),
        "final_norm.scale": ("model.norm.weight", same),
        "head": ("head", same),
    }


def visible_images(mask_BTI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `image_index` and `first_image` [B, T] of `types.Batch` for an `image_attention_mask` [B, T, I] of 0, 1.

    Raises `CallerError` where the images that a token sees are not consecutive.
    """
    seen_BTI = np.asarray(mask_BTI) > 0
    sees_BT, num_images = seen_BTI.any(-1), seen_BTI.shape[-1]
    first_BT = np.where(sees_BT, seen_BTI.argmax(-1), -1)
    last_BT = np.where(sees_BT, num_images - 1 - seen_BTI[..., ::-1].argmax(-1), -1)
    consecutive = (seen_BTI.sum(-1) == np.where(sees_BT, last_BT - first_BT + 1, 0)).all()
    require(bool(consecutive), "image_attention_mask", "a token's images", "must be consecutive")
    return last_BT.astype(np.int32), first_BT.astype(np.int32)


def idefics_resampler_config(foreign: Mapping[str, Any], arrays: Arrays) -> ResamplerConfig:
    """Returns the configuration of Idefics' resampler from the model's config.json and the arrays."""
    perceiver, ours = foreign["perceiver_config"], part(arrays, "latents")
    return ResamplerConfig(
        num_latents=len(ours["latents"]),
        num_layers=count_layers(ours, "blocks.{}.0.q_proj.weight"),
        num_heads=perceiver.get("resampler_n_heads", 16),
        hidden_dim=len(ours["blocks.0.1.fc.weight"]),
        head_dim=perceiver.get("resampler_head_dim", 96),
        activation="relu",
        qk_norm="blocks.0.0.q_layer_norm.weight" in ours,
    )


def idefics_resampler_parameters(config: ResamplerConfig, arrays: Arrays) -> dict[str, np.ndarray]:
    """Returns the parameters of our `Resampler` by path, from those of Idefics' `perceiver_resampler`."""
    attention, feed_forward, heads = "blocks.{}.0.", "blocks.{}.1.", into_heads(config.num_heads)
    table = {
        "latents": ("latents", same),
        **norm_pair("blocks.features_norm", attention + "context_layer_norm"),
        **norm_pair("blocks.latents_norm", attention + "latents_layer_norm"),
        "blocks.query.weight": (attention + "q_proj.weight", heads),
        "blocks.key.weight": (attention + "k_proj.weight", heads),
        "blocks.value.weight": (attention + "v_proj.weight", heads),
        "blocks.output.weight": (attention + "output_proj.weight", out_of_heads(config.num_heads)),
        **norm_pair("blocks.feed_forward_norm", feed_forward + "ln"),
        "blocks.up.weight": (feed_forward + "fc.weight", transposed),
        "blocks.down.weight": (feed_forward + "c_proj.weight", transposed),
        **norm_pair("norm", "layer_norm"),
    }
    if config.qk_norm:
        table |= norm_pair("blocks.query_norm", attention + "q_layer_norm")
        table |= norm_pair("blocks.key_norm", attention + "k_layer_norm")
    return parameters_of(table, part(arrays, "latents"), config.num_layers)
