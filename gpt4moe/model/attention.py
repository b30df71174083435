"""Causal self-attention within segments, with grouped key/value heads, rotary positions and a decode cache."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Float, Int

from gpt4moe.config.model import ModelConfig
from gpt4moe.model.cache import KVCache
from gpt4moe.model.layers import RMSNorm, Slots, matmul, normal_parameter, normed
from gpt4moe.model.layout import Layout
from gpt4moe.model.rope import Rotation, rotate
from gpt4moe.types import Array


class Attention(nnx.Module):
    """query [D, N, H], key and value [D, M, H], output [N, H, D]; no biases; optional RMSNorm of queries and keys."""

    def __init__(self, layers: Slots | None, config: ModelConfig, layout: Layout, out_scale: float, rngs: nnx.Rngs):
        attention, dim, head_dim = config.attention, config.model_dim, config.head_dim
        heads, kv_heads = attention.num_heads, attention.num_kv_heads
        query_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.query = normal_parameter(rngs, layers, (dim, heads, head_dim), query_axes, dim**-0.5)
        self.key = normal_parameter(rngs, layers, (dim, kv_heads, head_dim), kv_axes, dim**-0.5)
        self.value = normal_parameter(rngs, layers, (dim, kv_heads, head_dim), kv_axes, dim**-0.5)
        output_std = (heads * head_dim) ** -0.5 * out_scale
        self.output = normal_parameter(rngs, layers, (heads, head_dim, dim), ("heads", "head_dim", "embed"), output_std)
        norm = attention.qk_norm
        self.query_norm = RMSNorm(layers, head_dim, config.norm_epsilon) if norm else None
        self.key_norm = RMSNorm(layers, head_dim, config.norm_epsilon) if norm else None
        self.query_chunk, self.layout = attention.query_chunk, layout

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        turn: Rotation,
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        cache: KVCache | None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Returns y_BTD and this layer's cache with the row's keys and values written (None without one)."""
        q_BTNH = rotate(normed(self.query_norm, matmul(x_BTD, self.query[...])), turn)
        k_BTMH = rotate(normed(self.key_norm, matmul(x_BTD, self.key[...])), turn)
        v_BTMH = matmul(x_BTD, self.value[...])
        if cache is None:
            y_BTNH = self.layout.attend(q_BTNH, k_BTMH, v_BTMH, segment_ids_BT, self.query_chunk)
        else:
            y_BTNH, cache = self.layout.attend_through(
                cache, q_BTNH, k_BTMH, v_BTMH, positions_BT, segment_ids_BT > 0, self.query_chunk
            )
        return matmul(y_BTNH, self.output[...], 2), cache
