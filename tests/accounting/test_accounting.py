"""Parameter and FLOP counts: the reference's published numbers, one small model by hand, and invariants."""

import dataclasses

import pytest

from gpt4moe.accounting import chips, flops, memory, parameters, summary
from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.vision import CrossAttentionConfig, EncoderConfig, VisionConfig
from gpt4moe.configure import build_model


def small(**changes) -> ModelConfig:
    config = ModelConfig(
        num_layers=2,
        model_dim=8,
        vocab_size=10,
        context_length=16,
        attention=AttentionConfig(num_heads=2, head_dim=6),
        moe=MoeConfig(num_experts=4, experts_per_token=2, hidden_dim=3),
    )
    return dataclasses.replace(config, **changes)


def test_the_reference_has_the_published_counts():
    config = build_model(["gin_configs/model/gpt4_1p8t.gin"])
    counted = parameters.count(config)
    assert round(counted.experts / config.moe.num_experts / 1e9, 2) == 110.98
    assert round(counted.attention / 1e9, 2) == 55.82
    assert round(counted.total / 1e9, 1) == 1832.6
    assert round(parameters.count_active(config) / 1e9, 1) == 278.9
    assert round(flops.forward_flops_per_token(config) / 1e9, 1) == 557.8
    assert round(flops.attention_core_flops_per_token(config, 8192, causal=False) / 1e9, 1) == 84.6
    assert memory.cache_bytes_per_token(config) == 61_440


def test_the_sibling_is_a_thousandth_with_the_same_ratios():
    reference, sibling = (build_model([f"gin_configs/model/gpt4_1p8{size}.gin"]) for size in "tb")
    assert parameters.count(reference).total / parameters.count(sibling).total == pytest.approx(1000, rel=0.01)
    for config in (reference, sibling):
        assert config.moe.hidden_dim == 4 * config.model_dim
        assert config.attention.num_heads * config.head_dim == 2 * config.model_dim
    shares = [parameters.count_active(config) / parameters.count(config).total for config in (reference, sibling)]
    assert shares[0] == pytest.approx(shares[1], rel=0.05)


def test_a_small_model_counted_by_hand():
    counted = parameters.count(small())
    assert counted.embedding == 10 * 8
    assert counted.attention == 2 * (8 * 12 + 2 * 8 * 6 + 12 * 8)  # query, key and value, output
    assert counted.experts == 2 * 4 * 3 * 8 * 3  # layers, experts, SwiGLU's three matrices
    assert counted.router == 2 * 8 * 4
    assert counted.norms == 5 * 8
    assert counted.head == 0
    active = 80 + 576 + 2 * 2 * 72 + 64 + 40
    assert parameters.count_active(small()) == active
    assert flops.forward_flops_per_token(small()) == 2 * (active - 40)
    assert flops.train_flops_per_token(small()) == 6 * (active - 40)
    core = 2 * 2 * 6 * 2 * 2  # layers, heads, their width, scores and weighted values, a multiply-add is two
    assert flops.attention_core_flops_per_token(small(), 16) == core * 8  # half of the row is ahead
    assert flops.attention_core_flops_per_token(small(), 16, causal=False) == core * 16


def test_untied_head_dense_layers_shared_expert_and_qk_norm_are_counted():
    config = small(tie_embeddings=False, moe_every=2, dense_hidden_dim=5)
    config = dataclasses.replace(
        config,
        moe=dataclasses.replace(config.moe, shared_hidden_dim=7, gated=False),
        attention=dataclasses.replace(config.attention, qk_norm=True),
    )
    counted = parameters.count(config)
    assert counted.head == counted.embedding == 80
    assert counted.dense == 2 * 8 * 5
    assert counted.shared_experts == 2 * 8 * 7
    assert counted.norms == 5 * 8 + 2 * 2 * 6
    assert flops.forward_flops_per_token(config) == 2 * (576 + 2 * 48 + 112 + 80 + 32 + 80)


def test_leading_dense_layers_are_counted():
    config = small(num_layers=5, leading_dense_layers=3, moe_every=2, dense_hidden_dim=5)
    counted = parameters.count(config)
    assert counted.dense == (3 + 1) * 3 * 8 * 5
    assert (counted.experts, counted.router) == (4 * 3 * 8 * 3, 8 * 4)
    assert counted.attention == 5 * (8 * 12 + 2 * 8 * 6 + 12 * 8)
    assert counted.norms == 11 * 8
    assert flops.forward_flops_per_token(config) == 2 * (80 + 5 * 288 + 2 * 72 + 480 + 32)
    assert memory.cache_bytes_per_token(config) == 2 * 5 * 6 * 2


@pytest.mark.parametrize("num_experts", [1, 2, 8, 64])
def test_active_parameters_do_not_depend_on_the_number_of_experts_but_for_the_router(num_experts):
    moe = MoeConfig(num_experts, 1, 3, normalize_gates=False)
    config = small(moe=moe)
    router = parameters.count(config).router
    assert (
        parameters.count_active(config) - router
        == parameters.count_active(small(moe=MoeConfig(2, 1, 3, normalize_gates=False))) - 32
    )


def test_summary_document_adds_up():
    document = summary.summarize(small())
    assert sum(document["parameters"].values()) == document["total"]
    assert str(document["total"]) in summary.format_summary(document).replace(",", "")


def test_an_image_costs_as_many_times_as_it_has_frames():
    encoder = EncoderConfig(
        height=8, width=8, patch_size=4, dim=8, num_layers=1, num_heads=2, hidden_dim=16, max_frames=4
    )
    seeing = small(vision=VisionConfig(encoder, CrossAttentionConfig(every=1, num_heads=2, head_dim=4, hidden_dim=8)))
    one, two, most = (summary.summarize(seeing, frames=frames) for frames in (1, 2, None))
    for name in ("frames", "features", "forward_flops", "cache_bytes", "input_bytes"):
        assert [document[f"{name}_per_image"] // one[f"{name}_per_image"] for document in (two, most)] == [2, 4]
    assert (one["features_per_image"], one["input_bytes_per_image"]) == (4, 8 * 8 * 3)
    text = summary.format_summary(most)
    assert "an image (4 frames)           16 features, 768 B of pixels fed" in text
    assert "an image                      4 features" in summary.format_summary(one)


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100_80"), ("NVIDIA A100-SXM4-40GB", "a100_40"),
     ("TPU v5 lite", "tpu_v5e"), ("TPU v5", "tpu_v5p"), ("TPU v6 lite", "tpu_v6e")],
)  # fmt: skip
def test_devices_are_found_by_the_name_jax_gives_them(device_kind, name):
    assert chips.find_chip(device_kind).name == name


def test_a_cpu_is_in_no_table():
    assert chips.find_chip("cpu") is None
