"""Attention kernels of accelerators, behind the contract of `attention_kernel.attend`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Float, Int

from gpt4moe.types import Array

# Both kernels work on whole lanes of a head and whole blocks of a row; other shapes take the plain form.
SPLASH_HEAD_MULTIPLE, SPLASH_LENGTH_MULTIPLE = 128, 128
SPLASH_BLOCKS = (512, 256, 128)
CUDNN_HEAD_MULTIPLE, CUDNN_LARGEST_HEAD = 8, 128


def splash_fits(q_BTNH: Float[Array, "B T N H"]) -> bool:
    """Whether the TPU kernel takes these shapes."""
    return q_BTNH.shape[3] % SPLASH_HEAD_MULTIPLE == 0 and q_BTNH.shape[1] % SPLASH_LENGTH_MULTIPLE == 0


def splash_attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BTMH: Float[Array, "B T M H"],
    v_BTMH: Float[Array, "B T M H"],
    segment_ids_BT: Int[Array, "B T"],
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """TPU: the splash kernel with a causal mask and segments; differentiable, stores no scores."""
    length, heads = q_BTNH.shape[1:3]
    kv_heads = k_BTMH.shape[2]
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * (heads // kv_heads))
    kernel = splash.make_splash_mqa_single_device(mask, block_sizes=_splash_blocks(length), interpret=interpret)

    def one_row(q_NTH: Array, k_MTH: Array, v_MTH: Array, segments_T: Array) -> Array:
        segments = splash.SegmentIds(segments_T, segments_T)
        q_MGTH = q_NTH.reshape(kv_heads, -1, *q_NTH.shape[1:])
        y_MGTH = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(q_MGTH, k_MTH, v_MTH)
        return y_MGTH.reshape(q_NTH.shape)

    scaled_BTNH = (q_BTNH * q_BTNH.shape[-1] ** -0.5).astype(q_BTNH.dtype)
    y_BNTH = jax.vmap(one_row)(*(x.swapaxes(1, 2) for x in (scaled_BTNH, k_BTMH, v_BTMH)), segment_ids_BT)
    return y_BNTH.swapaxes(1, 2)


def _splash_blocks(length: int) -> splash.BlockSizes:
    """Blocks of queries and keys: the largest that divides the row. The kernel's own default, 128, is far slower."""
    block = next(size for size in SPLASH_BLOCKS if length % size == 0)
    forward = {"block_q": block, "block_kv": block, "block_kv_compute": block}
    backward = {"block_q_dkv": block, "block_kv_dkv": block, "block_kv_dkv_compute": block}
    return splash.BlockSizes(**forward, **backward, block_q_dq=block, block_kv_dq=block)


def cudnn_fits(q_BTNH: Float[Array, "B T N H"]) -> bool:
    """Whether cuDNN's fused attention takes these shapes and dtype."""
    head_dim = q_BTNH.shape[3]
    half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    return half and head_dim % CUDNN_HEAD_MULTIPLE == 0 and head_dim <= CUDNN_LARGEST_HEAD


def cudnn_attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BTMH: Float[Array, "B T M H"],
    v_BTMH: Float[Array, "B T M H"],
    segment_ids_BT: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """GPU: cuDNN's fused attention; segments enter as one mask [B, 1, T, T] shared by the heads."""
    same_segment_BNTS = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    attention = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return attention(q_BTNH, k_BTMH, v_BTMH, mask=same_segment_BNTS)
