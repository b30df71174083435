"""Why layouts lose, on cases small enough to say beforehand."""

import dataclasses

import pytest

from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.plan.search.layouts import Job
from gpt4moe.plan.search.ranking import cost_one
from gpt4moe.plan.search.reasons import expert_bound, losses_of_time, slow_widths, why
from gpt4moe.plan.training import memory
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.stacks import Stack


def costed(layout, shape="gpt4_1p8t", chip="a100_80", rows=7280, length=8192, **changes):
    numerics = changes.pop("numerics", memory.NUMERICS["mixed_adam_16"])
    given = (shape_named(shape), chip_named(chip), layout.chips, rows, length, changes.pop("stack", Stack()), numerics)
    return cost_one(Job(*given), layout, rows)


def test_the_layout_of_the_reference_does_not_fit_its_chips():
    """Analysis, claim 36: 30.5 GB of weights, as much of gradients, 0.9 of state, 2.6 of activations; 40 GB there."""
    layout = Layout(8, 1, 15, expert_tensor=8, data=208, zero=1, remat="full")
    item = costed(layout, chip="a100_40")
    parts = item.memory.parts
    assert parts["weight"] == parts["gradient"] == pytest.approx(30.5e9, rel=0.01)
    assert parts["optimizer"] == pytest.approx(0.9e9, rel=0.05)
    assert parts["activation"] == pytest.approx(2.6e9, rel=0.05)
    without_runtime = -item.memory.spare_bytes - parts["reserved"]
    rows = 7 / 8 * 8192 * 2 * 2 * 2 * 10_752  # there and back, whole on each chip that holds a part of an expert
    assert without_runtime == pytest.approx(64.6e9 + rows - 40e9, rel=0.05)
    said = why(item, None)
    missing = f"{-item.memory.spare_bytes / 1e9:.1f} GB"
    assert said == f"does not fit by {missing} on stage 0: weight 30.8, gradient 30.8, reserved 3.6"


def test_the_bubble_of_the_reference_is_named():
    """1F1B, 15 stages, 35 microbatches: 14 / (35 + 14) of the step; chunks take it away."""
    layout = Layout(8, 1, 15, expert_tensor=8, data=208, remat="full")
    chunks = dataclasses.replace(layout, virtual_stages=8, schedule="interleaved")
    roomy = {"numerics": dataclasses.replace(memory.NUMERICS["mixed_adam"], gradient_bytes=0)}
    plain, interleaved = (costed(each, **roomy) for each in (layout, chunks))
    assert plain.memory.fits and interleaved.memory.fits
    share = plain.step.bubble_fraction
    busy = sum(
        plain.step.parts[part] for part in ("matmul", "expert_matmul", "attention_core", "recompute", "elementwise")
    )
    beside = sum(plain.step.parts[part] for part in ("tensor_communication", "overhead", "head"))
    assert plain.step.parts["bubble"] / (busy + beside) == pytest.approx(14 / 35, rel=0.05)  # the head is uneven
    assert why(plain, interleaved) == f"bubble {100 * share:.0f} %"
    assert why(interleaved, interleaved) == "best"


def test_fine_experts_are_bound_by_the_network():
    """DeepSeek-V3: 256 experts of 2,048, 8-bit there and 16-bit back over 50 GB/s: 4.8 (Austin et al. say about 5)."""
    layout = Layout(expert=64, data=128, microbatch_rows=1, zero=3)
    chip, stack = chip_named("h800"), Stack(matmul_bits=8)
    bound = expert_bound(shape_named("deepseek_v3"), layout, chip, stack)
    assert bound == pytest.approx(4.8 * (1 - 8 / 64), rel=0.02)  # the eighth of it that stays in the server
    coarse = expert_bound(shape_named("gpt4_1p8t"), Layout(expert=16, data=128), chip_named("a100_80"), Stack())
    assert coarse == pytest.approx(12_480 / 43_008 * (1 - 8 / 16), rel=0.02)
    assert expert_bound(shape_named("gpt4_1p8t"), Layout(data=128), chip, stack) == 0


def test_a_bound_layout_says_so():
    wide = costed(Layout(expert=64, data=128, zero=3), "deepseek_v3", "h800", 1024, 4096, stack=Stack(matmul_bits=8))
    near = costed(Layout(expert=8, data=128, zero=3), "deepseek_v3", "h800", 1024, 4096, stack=Stack(matmul_bits=8))
    roomy = dataclasses.replace(wide.memory, chip_bytes=1e15)
    wide = dataclasses.replace(wide, memory=roomy)
    assert "EP bound by 4.2x" in why(wide, near)


def test_losses_add_up_to_the_difference():
    fast = costed(Layout(8, 1, 15, 8, expert_tensor=8, data=208, schedule="interleaved", remat="full"))
    slow = costed(Layout(8, 1, 15, expert_tensor=8, data=208, remat="full"))
    total = sum(losses_of_time(slow, fast).values())
    assert total == pytest.approx(slow.seconds_per_token / fast.seconds_per_token - 1)
    assert set(losses_of_time(slow, slow).values()) == {0.0}


def test_small_products_are_named():
    """Sixteen experts cut in eight, for 512 rows a microbatch on 64 chips: eight rows an expert."""
    few = costed(Layout(8, 8, 1, expert_tensor=8, data=10, zero=3, remat="full"), rows=7320)
    best = costed(Layout(8, 1, 8, expert=16, expert_tensor=8, data=80, remat="full"), rows=7280)
    few = dataclasses.replace(few, memory=dataclasses.replace(few.memory, chip_bytes=1e15))
    assert "small products (rows of an expert 128)" in why(few, best)


def test_slow_widths():
    shape = dataclasses.replace(shape_named("bloom_176b"), head_dim=108)
    assert any("head_dim=108 is no multiple of 64" in text for text in slow_widths(shape, Layout()))
    assert slow_widths(shape_named("gpt4_1p8t"), Layout(8, expert_tensor=8)) == []
    narrow = slow_widths(shape_named("llama3_70b"), Layout(8))
    assert narrow == ["vocab_size / tensor=16032 is no multiple of 128: tiles are cut"]


def test_the_bound_of_experts_on_few_servers_and_on_another_network():
    layout, shape = Layout(expert=64, data=128, zero=3), shape_named("deepseek_v3")
    chip = chip_named("h800")
    plain = expert_bound(shape, layout, chip, Stack(matmul_bits=8))
    assert expert_bound(shape, layout, chip, Stack(matmul_bits=8, domain_limit=4)) == pytest.approx(plain / 2)
    slow = chip.network.outside_bytes_per_second / 4
    assert expert_bound(shape, layout, chip, Stack(matmul_bits=8, scale_out_bytes_per_second=slow)) == pytest.approx(
        4 * plain
    )
