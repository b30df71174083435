"""Shapes of published models, to count and cost what others have trained and served.

Sources: the papers (GPT-3 2005.14165, PaLM 2204.02311, BLOOM 2211.05100, Llama 2302.13971, 2307.09288, 2407.21783,
OPT 2205.01068, Skywork-MoE 2406.06563, DeepSeek 2405.04434, 2412.19437) and the config.json of the released
checkpoints. gpt4_1p8t is gin_configs/model/gpt4_1p8t.gin: the shape that gives the counts reported of GPT-4
(SemiAnalysis, July 2023).
"""

from __future__ import annotations

import dataclasses

from gpt4moe.accounting.shape import LatentAttention, Shape
from gpt4moe.config.check import CallerError, near

DEEPSEEK_ATTENTION = LatentAttention(query_rank=1536, key_value_rank=512, plain_dim=128, rotary_dim=64, value_dim=128)


def gpt(name: str, num_layers: int, model_dim: int, num_heads: int, vocab_size: int = 51_200, **changes) -> Shape:
    """Returns a GPT-3-like shape: plain feed-forward four times as wide, biases, LayerNorm, learned positions, tied.

    The vocabulary is Megatron's, 50,257 padded to a multiple of 1,024.
    """
    usual = {"hidden_dim": 4 * model_dim, "learned_positions": 2048, "head_dim": model_dim // num_heads}
    shape = (
        usual | {"gated": False, "biases": True, "norms": "layer", "tied": True, "num_kv_heads": num_heads} | changes
    )
    return Shape(name, num_layers, model_dim, num_heads, vocab_size=vocab_size, **shape)


def palm(name: str, num_layers: int, model_dim: int, num_heads: int) -> Shape:
    """Returns a shape of PaLM: multi-query, SwiGLU four times as wide, one norm for each parallel block, tied."""
    parallel = {"norms": "layer_without_bias", "norms_per_layer": 1, "tied": True}
    return Shape(name, num_layers, model_dim, num_heads, 1, 256, 256_000, hidden_dim=4 * model_dim, **parallel)


def llama(
    name: str, num_layers: int, model_dim: int, num_heads: int, num_kv_heads: int, hidden_dim: int, **changes
) -> Shape:
    """Returns a shape of Llama: RMSNorm, SwiGLU, heads of 128, untied; the vocabulary of Llama 1 and 2."""
    vocab_size = changes.pop("vocab_size", 32_000)
    return Shape(name, num_layers, model_dim, num_heads, num_kv_heads, 128, vocab_size, hidden_dim, **changes)


def mixture(
    name: str, num_layers: int, model_dim: int, num_heads: int, num_kv_heads: int, vocab_size: int,
    experts: tuple[int, int, int], **changes,
) -> Shape:  # fmt: skip
    """Returns a shape of Mixtral's kind, experts in every layer; experts: number, how many a token takes, width."""
    num_experts, experts_per_token, width = experts
    of_experts = {"num_experts": num_experts, "experts_per_token": experts_per_token, "expert_hidden_dim": width}
    layers = {"num_moe_layers": num_layers} | of_experts | changes
    return Shape(name, num_layers, model_dim, num_heads, num_kv_heads, 128, vocab_size, **layers)


LLAMA3 = {"vocab_size": 128_256}
SHAPES = (
    gpt("gpt3_175b", 96, 12_288, 96, 50_257),
    gpt("opt_175b", 96, 12_288, 96, 50_272, learned_positions=2050),
    gpt("gpt_13b", 40, 5120, 40),
    gpt("gopher_280b", 80, 16_384, 128, 32_000),
    gpt("bloom_176b", 70, 14_336, 112, 250_880, learned_positions=0),
    palm("palm_62b", 64, 8192, 32),
    palm("palm_540b", 118, 18_432, 48),
    llama("llama1_33b", 60, 6656, 52, 52, 17_920),
    llama("llama1_65b", 80, 8192, 64, 64, 22_016),
    llama("llama2_7b", 32, 4096, 32, 32, 11_008),
    llama("llama2_13b", 40, 5120, 40, 40, 13_824),
    llama("llama2_34b", 48, 8192, 64, 8, 22_016),
    llama("llama2_70b", 80, 8192, 64, 8, 28_672),
    llama("llama3_8b", 32, 4096, 32, 8, 14_336, **LLAMA3),
    llama("llama3_70b", 80, 8192, 64, 8, 28_672, **LLAMA3),
    llama("llama3_405b", 126, 16_384, 128, 8, 53_248, **LLAMA3),
    mixture("gpt4_1p8t", 120, 10_752, 168, 1, 100_352, (16, 2, 43_008), gated=False, tied=True),
    mixture("mixtral_8x7b", 32, 4096, 32, 8, 32_000, (8, 2, 14_336)),
    mixture("mixtral_8x22b", 56, 6144, 48, 8, 32_000, (8, 2, 16_384)),
    mixture("skywork_moe", 52, 4608, 36, 36, 65_536, (16, 2, 12_288)),
    mixture("qwen2_57b_a14b", 28, 3584, 28, 4, 151_936, (64, 8, 2560), shared_hidden_dim=20_480, qkv_biases=True),
    mixture(
        "deepseek_v2", 60, 5120, 128, 128, 102_400, (160, 6, 1536), num_moe_layers=59, hidden_dim=12_288,
        shared_hidden_dim=3072, latent=DEEPSEEK_ATTENTION,
    ),
    mixture(
        "deepseek_v3", 61, 7168, 128, 128, 129_280, (256, 8, 2048), num_moe_layers=58, hidden_dim=18_432,
        shared_hidden_dim=2048, latent=DEEPSEEK_ATTENTION,
    ),
    mixture("llama4_scout", 48, 5120, 40, 8, 202_048, (16, 1, 8192), shared_hidden_dim=8192),
    mixture(
        "llama4_maverick", 48, 5120, 40, 8, 202_048, (128, 1, 8192), num_moe_layers=24, hidden_dim=16_384,
        shared_hidden_dim=8192,
    ),
    dataclasses.replace(mixture("gpt_oss_120b", 36, 2880, 64, 8, 201_088, (128, 4, 2880)), head_dim=64),
    mixture("qwen3_30b_a3b", 48, 2048, 32, 4, 151_936, (128, 8, 768), qk_norm=True),
    mixture("qwen3_235b_a22b", 94, 4096, 64, 4, 151_936, (128, 8, 1536), qk_norm=True),
)  # fmt: skip


def shape_named(name: str) -> Shape:
    """Returns a published shape; raises `CallerError` with the names nearest to an unknown one."""
    by_name = {shape.name: shape for shape in SHAPES}
    if name not in by_name:
        raise CallerError(f"shape={name!r} is not among the published ones; near: {near(name, by_name)}")
    return by_name[name]
