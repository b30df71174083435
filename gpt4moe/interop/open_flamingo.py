"""OpenFlamingo's resampler and gated cross-attention (src/helpers.py) as configurations and parameters of ours.

Its arrays do not tell the number of heads: 8 in every released model.
"""

from __future__ import annotations

import numpy as np

from gpt4moe.config.vision import CrossAttentionConfig, ResamplerConfig
from gpt4moe.interop.arrays import (
    Arrays,
    count_layers,
    into_heads,
    norm_pair,
    out_of_heads,
    parameters_of,
    part,
    same,
    transposed,
)

NUM_HEADS = 8


def flamingo_resampler_config(arrays: Arrays, num_heads: int = NUM_HEADS) -> ResamplerConfig:
    """Returns the configuration of OpenFlamingo's `PerceiverResampler`."""
    ours = part(arrays, "latents")
    return ResamplerConfig(
        num_latents=len(ours["latents"]),
        num_layers=count_layers(ours, "layers.{}.0.to_q.weight"),
        num_heads=num_heads,
        hidden_dim=len(ours["layers.0.1.1.weight"]),
        head_dim=len(ours["layers.0.0.to_q.weight"]) // num_heads,
        activation="gelu",
        max_frames=len(ours.get("frame_embs", ())),
        max_images=len(ours.get("media_time_embs", ())),
    )


def flamingo_resampler_parameters(config: ResamplerConfig, arrays: Arrays) -> dict[str, np.ndarray]:
    """Returns the parameters of our `Resampler` by path, from those of OpenFlamingo's (src/helpers.py)."""
    attention, feed_forward, heads = "layers.{}.0.", "layers.{}.1.", into_heads(config.num_heads)
    table = {
        "latents": ("latents", same),
        **norm_pair("blocks.features_norm", attention + "norm_media"),
        **norm_pair("blocks.latents_norm", attention + "norm_latents"),
        "blocks.query.weight": (attention + "to_q.weight", heads),
        "blocks.key.weight": (attention + "to_kv.weight", lambda kv: heads(np.split(kv, 2)[0])),
        "blocks.value.weight": (attention + "to_kv.weight", lambda kv: heads(np.split(kv, 2)[1])),
        "blocks.output.weight": (attention + "to_out.weight", out_of_heads(config.num_heads)),
        **norm_pair("blocks.feed_forward_norm", feed_forward + "0"),
        "blocks.up.weight": (feed_forward + "1.weight", transposed),
        "blocks.down.weight": (feed_forward + "3.weight", transposed),
        **norm_pair("norm", "norm"),
    }
    if config.max_frames:
        table["frame_embedding"] = ("frame_embs", same)
    if config.max_images:
        table["image_embedding"] = ("media_time_embs", lambda table: table.reshape(len(table), -1))
    return parameters_of(table, part(arrays, "latents"), config.num_layers)


def flamingo_block_config(
    arrays: Arrays, every: int, num_heads: int = NUM_HEADS, sees: str = "latest"
) -> CrossAttentionConfig:
    """Returns the configuration of `GatedCrossAttentionBlock`s that come before every `every`-th decoder layer.

    `arrays` are of one of them. OpenFlamingo counts so that the first is before layer `every` - 1. Its LayerNorms have
    epsilon 1e-5, which is `ModelConfig.norm_epsilon` here.
    """
    ours = part(arrays, "attn_gate")
    return CrossAttentionConfig(
        every=every,
        offset=every - 1,
        num_heads=num_heads,
        head_dim=len(ours["attn.to_q.weight"]) // num_heads,
        hidden_dim=len(ours["ff.1.weight"]),
        activation="gelu",
        norm="layer",
        qk_norm=False,
        sees=sees,
        feed_forward_without_image=True,
    )


def flamingo_block_parameters(config: CrossAttentionConfig, arrays: Arrays) -> dict[str, np.ndarray]:
    """Returns the parameters of one layer of our `GatedCrossAttention` by path, from those of one of their blocks."""
    heads = into_heads(config.num_heads)
    table = {
        **norm_pair("attention_norm", "attn.norm"),
        "query": ("attn.to_q.weight", heads),
        "key": ("attn.to_kv.weight", lambda kv: heads(np.split(kv, 2)[0])),
        "value": ("attn.to_kv.weight", lambda kv: heads(np.split(kv, 2)[1])),
        "output": ("attn.to_out.weight", out_of_heads(config.num_heads)),
        "attention_gate": ("attn_gate", np.squeeze),
        **norm_pair("feed_forward_norm", "ff.0"),
        "dense.up": ("ff.1.weight", transposed),
        "dense.down": ("ff.3.weight", transposed),
        "feed_forward_gate": ("ff_gate", np.squeeze),
    }
    return parameters_of(table, part(arrays, "attn_gate"), 1)
