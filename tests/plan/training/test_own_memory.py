"""Bytes of our own step, each cause by hand on a case where it is alone."""

import dataclasses

import pytest

from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.plan.training import memory
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.own_memory import beside_bytes, kept_free_bytes

NUMERICS = memory.NUMERICS["float32_adam"]
MIXTRAL, LLAMA = shape_named("mixtral_8x7b"), shape_named("llama3_8b")
OURS = Layout(remat="full", schedule="circular", data=8, zero=3)


def beside(shape, layout, microbatches, length=4096):
    return beside_bytes(shape, layout, NUMERICS, length, microbatches)


def test_one_pass_of_a_dense_model_holds_nothing_more():
    assert beside(LLAMA, OURS, 1) == 0


def test_gradients_of_a_pass_and_the_new_sum():
    """8 bytes for each of a chip's 8.03 / 8 billion parameters."""
    assert beside(LLAMA, OURS, 2) == pytest.approx(8 * 8_030_261_248 / 8, rel=1e-6)
    assert beside(LLAMA, dataclasses.replace(OURS, zero=1), 2) == pytest.approx(8 * 8_030_261_248, rel=1e-6)
    staged = dataclasses.replace(OURS, stage=4, data=2, zero=0)
    assert beside(LLAMA, staged, 8) < beside(LLAMA, dataclasses.replace(staged, passes=2), 8)


def test_rows_on_their_way_to_experts():
    """4 copies of 4,096 tokens' two choices, 4,096 wide, 2 bytes; all of them on each chip of a tensor group."""
    kept = dataclasses.replace(OURS, remat="selective")
    assert beside(MIXTRAL, kept, 1) == 4 * 4096 * 2 * 4096 * 2
    assert beside(MIXTRAL, dataclasses.replace(kept, tensor=8, expert_tensor=8), 1) == 4 * 4096 * 2 * 4096 * 2
    assert beside(MIXTRAL, OURS, 1) == 2 * 4096 * 2 * 4096 * 2  # the others are in the layer that is computed again


def test_idle_ticks_keep_their_inputs():
    """4 stages of 8 layers, 8 microbatches: 11 ticks of 9 activations, of which 64 are those of `memory`."""
    staged = dataclasses.replace(OURS, stage=4, data=2, zero=0)
    assert beside(LLAMA, staged, 8) == (11 * 9 - 8 * 8) * 4096 * 4096 * 2


def test_what_is_kept_free():
    assert kept_free_bytes(chip_named("tpu_v5p")) == pytest.approx(0.5e9 + 0.03 * 95e9)
