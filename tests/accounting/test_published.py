"""Counts of published models: those of the released checkpoints to the parameter, identities of the papers."""

import dataclasses

import pytest

from gpt4moe.accounting import chips, flops, parameters
from gpt4moe.accounting.published import SHAPES, shape_named
from gpt4moe.config.check import CallerError

# What the released checkpoints hold; of DeepSeek-V3 without its 58 x 256 correction biases of the router.
RELEASED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "mixtral_8x7b": 46_702_792_704,
    "mixtral_8x22b": 140_620_634_112,
    "deepseek_v3": 671_026_419_200 - 58 * 256,
}
# Billions in the papers: total, active where it is given.
REPORTED = {
    "gpt3_175b": (175, None),
    "palm_62b": (62.50, None),
    "palm_540b": (540.35, None),
    "opt_175b": (175, None),
    "llama1_65b": (65.2, None),
    "skywork_moe": (146, 22),
    "qwen2_57b_a14b": (57.4, 14.2),
    "bloom_176b": (176.2, None),
    "qwen3_30b_a3b": (30.5, 3.3),
    "qwen3_235b_a22b": (235, 22),
    "gpt_oss_120b": (116.8, None),
    "deepseek_v2": (236, 21),
    "deepseek_v3": (671, 37),
    "mixtral_8x7b": (46.7, 12.9),
    "mixtral_8x22b": (140.6, 39.1),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoints(name):
    assert parameters.count(shape_named(name)).total == RELEASED[name]


@pytest.mark.parametrize("name", REPORTED)
def test_reported_sizes(name):
    total, active = REPORTED[name]
    shape = shape_named(name)
    assert parameters.count(shape).total / 1e9 == pytest.approx(total, rel=0.0035)
    if active:
        assert parameters.count_active(shape) / 1e9 == pytest.approx(active, rel=0.035)


def test_the_identity_of_gpt():
    """12 L D^2 (1 + 13 / 12D + (V + T) / 12LD) of Narayanan et al. 2021, and the last norm, which it leaves out."""
    shape = shape_named("gpt3_175b")
    layers, dim = shape.num_layers, shape.model_dim
    rows = shape.vocab_size + shape.learned_positions
    assert parameters.count(shape).total == 12 * layers * dim**2 + 13 * layers * dim + rows * dim + 2 * dim


def test_palm_flops_of_a_token():
    """6N + 12 L N H T of Chowdhery et al. 2022, appendix B, with their non-causal attention."""
    shape = shape_named("palm_540b")
    core = 3 * flops.attention_core_flops_per_token(shape, 2048, causal=False)
    assert core == 12 * 118 * 48 * 256 * 2048
    assert flops.train_flops_per_token(shape) / (6 * parameters.count(shape).total) == pytest.approx(1, abs=1e-4)


def test_a_window_bounds_the_core_and_latents_the_cache():
    shape = shape_named("mixtral_8x7b")
    windowed = dataclasses.replace(shape, window=1000)
    whole, cut = (flops.attention_core_flops_per_token(item, 8000) for item in (shape, windowed))
    assert whole == 4 * cut
    deepseek = shape_named("deepseek_v3")
    assert 2 * deepseek.num_layers * deepseek.cache_width == pytest.approx(70.3e3, rel=1e-3)


def test_names_that_are_not_there():
    with pytest.raises(CallerError, match=r"shape='llama3_7b' .* near: llama3_"):
        shape_named("llama3_7b")
    with pytest.raises(CallerError, match=r"chip='H-100' .* near: h100"):
        chips.chip_named("H-100")
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
    assert chips.chip_named("tpu_v5p").network.domain_bytes_per_second == 540e9
