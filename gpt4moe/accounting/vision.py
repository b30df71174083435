"""Exact counts of what reads images: parameters of its parts, FLOPs and bytes of an image (a multiply-add is two)."""

from __future__ import annotations

from gpt4moe.config.model import ModelConfig
from gpt4moe.config.vision import EncoderConfig, ResamplerConfig, VisionConfig


def encoder_parameters(config: EncoderConfig) -> int:
    """Returns the parameters of the image encoder."""
    dim, hidden = config.dim, config.hidden_dim
    patches = config.num_features - config.num_leading
    patch = config.patch_values * dim + (dim if config.patch_bias else 0)
    frames = config.max_frames if config.max_frames > 1 else 0
    tables = (config.num_leading + frames + (patches if config.positions == "learned" else 0)) * dim
    norms = 2 * dim * (config.norm_before + config.norm_after)
    layer = 4 * dim + 4 * (dim * dim + dim) + 2 * dim * hidden + hidden + dim
    return patch + tables + norms + config.num_layers * layer


def resampler_parameters(config: ResamplerConfig | None, dim: int) -> int:
    """Returns the parameters of the resampler of features `dim` wide; 0 without one."""
    if config is None:
        return 0
    head_dim = config.head_dim or dim // config.num_heads
    tables = (config.num_latents + config.max_frames + config.max_images) * dim
    matrices = 4 * dim * config.num_heads * head_dim + 2 * dim * config.hidden_dim
    layer = 6 * dim + matrices + (4 * head_dim if config.qk_norm else 0)
    return tables + 2 * dim + config.num_layers * layer


def spelling_parameters(config: VisionConfig) -> int:
    """Returns the parameters by which features spell in training; 0 without them."""
    return (config.encoder.dim + 1) * (config.spelling.num_ids + 1) if config.spelling else 0


def cross_attention_parameters(config: ModelConfig) -> int:
    """Returns the parameters of all blocks of gated cross-attention."""
    cross, dim = config.vision.cross_attention, config.model_dim
    norms = 2 * dim * (1 if cross.norm == "rms" else 2) + (2 * cross.head_dim if cross.qk_norm else 0)
    gates = 2 * (dim if cross.gate == "vector" else 1)
    keys_values = 2 * config.vision.encoder.dim * cross.kv_heads * cross.head_dim
    return config.num_cross_attention_layers * (_of_tokens(config) + keys_values + norms + gates)


def cross_attention_flops_per_token(config: ModelConfig) -> int:
    """Returns the forward matmul FLOPs of a token in all blocks of cross-attention, without scores and averages."""
    return 2 * config.num_cross_attention_layers * _of_tokens(config) if config.vision else 0


def flops_per_image(config: ModelConfig, frames: int = 1) -> int:
    """Returns the forward FLOPs of an image: encoder, resampler, keys and values of every block of cross-attention.

    Attention among patches, which see all of their frame, is counted in full.
    """
    vision, encoder = config.vision, config.vision.encoder
    dim, features = encoder.dim, encoder.num_features
    matrices = encoder.num_layers * (4 * dim * dim + 2 * dim * encoder.hidden_dim)
    patches = (features - encoder.num_leading) * encoder.patch_values * dim
    frame = 2 * (features * matrices + patches) + 4 * encoder.num_layers * features * features * dim
    cross = vision.cross_attention
    read = vision.features_per_image(frames)
    keys_values = 4 * config.num_cross_attention_layers * read * dim * cross.kv_heads * cross.head_dim
    return frames * frame + _resampler_flops(vision.resampler, dim, frames * features) + keys_values


def cache_bytes_per_image(config: ModelConfig, dtype_bytes: int, frames: int = 1) -> int:
    """Returns the bytes of an image's keys and values in all blocks of cross-attention."""
    cross, read = config.vision.cross_attention, config.vision.features_per_image(frames)
    return 2 * config.num_cross_attention_layers * read * cross.kv_heads * cross.head_dim * dtype_bytes


def input_bytes_per_image(config: EncoderConfig, frames: int = 1) -> int:
    """Returns the bytes of an image as it is fed to the device: three colours of 8 bits."""
    return frames * config.height * config.width * 3


def _of_tokens(config: ModelConfig) -> int:
    """Matrix parameters of a block of cross-attention that a token meets."""
    cross, dim = config.vision.cross_attention, config.model_dim
    feed_forward = (3 if cross.activation is None else 2) * dim * cross.hidden_dim
    return 2 * dim * cross.num_heads * cross.head_dim + feed_forward


def _resampler_flops(config: ResamplerConfig | None, dim: int, features: int) -> int:
    if config is None:
        return 0
    width, latents = config.num_heads * (config.head_dim or dim // config.num_heads), config.num_latents
    keys = features + latents
    matrices = 2 * latents * dim * width + 2 * keys * dim * width + 2 * latents * dim * config.hidden_dim
    return config.num_layers * (2 * matrices + 4 * latents * keys * width)
