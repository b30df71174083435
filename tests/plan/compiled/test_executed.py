"""FLOPs that a chip executes, counted by hand for a model small enough to."""

import dataclasses

import pytest

from gpt4moe.accounting import executed
from gpt4moe.config.data import ImageConfig
from gpt4moe.config.mesh import MESH_AXES
from gpt4moe.config.vision import CrossAttentionConfig, EncoderConfig, VisionConfig
from tests.plan.compiled.test_compile import run_of

ONE = dict.fromkeys(MESH_AXES, 1)
KERNEL = executed.CoreKernel(block=16, backward_products=5)
# Of the run: two microbatches of 16 rows of 64 tokens; D 64, four heads of 32 and one of keys, F 256, V 320.
TOKENS, LAYERS = 2048, 12


def test_every_component_by_hand():
    counted = executed.train_step(run_of({}, {}), ONE, KERNEL)
    passes = 1 + 1 + 2  # forward, recomputed, gradients of input and matrix
    assert counted.attention == passes * LAYERS * TOKENS * 2 * 64 * (2 * 4 * 32 + 2 * 32)
    pairs_of_a_row = 16 * (16 + 32 + 48 + 64)
    assert counted.attention_core == (2 + 2 + 5) * LAYERS * 32 * 2 * 4 * 32 * pairs_of_a_row
    places_of_a_row = 4 * 40  # ceil(64 * 2 / 4 * 1.25) at each of four experts
    assert counted.experts == passes * LAYERS * 32 * places_of_a_row * 2 * 2 * 64 * 256
    assert counted.router == passes * LAYERS * TOKENS * 2 * 64 * 4
    assert counted.head == passes * TOKENS * 2 * 64 * 320
    assert counted.dense == counted.shared_expert == 0
    assert counted.total == sum(dataclasses.astuple(counted))


def mixed_run():
    """Four dense layers of 192, then four with two of four experts and a shared one of 96 between four dense ones."""
    run = run_of({}, {})
    moe = dataclasses.replace(run.model.moe, shared_hidden_dim=96)
    pattern = {"leading_dense_layers": 4, "moe_every": 2, "dense_hidden_dim": 192}
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **pattern, moe=moe))


def test_dense_layers_and_the_shared_expert_by_hand():
    counted, plain = executed.train_step(mixed_run(), ONE, KERNEL), executed.train_step(run_of({}, {}), ONE, KERNEL)
    assert counted.dense == 4 * 8 * TOKENS * 2 * (2 * 64 * 192)
    assert counted.shared_expert == 4 * 4 * TOKENS * 2 * (2 * 64 * 96)
    assert (counted.attention, counted.experts) == (plain.attention, plain.experts / 3)


def test_a_decode_step_by_hand():
    """Eight rows with caches of 40 slots; an expert block of 20 rows."""
    counted = executed.decode_step(mixed_run(), ONE, 8, 40, 20)
    assert dataclasses.asdict(counted) == {
        "attention": 12 * 8 * 2 * 64 * (2 * 4 * 32 + 2 * 32),
        "attention_core": 12 * 8 * 2 * 2 * 4 * 32 * 40,
        "experts": 4 * 20 * 2 * 2 * 64 * 256,
        "shared_expert": 4 * 8 * 2 * 2 * 64 * 96,
        "dense": 8 * 8 * 2 * 2 * 64 * 192,
        "router": 4 * 8 * 2 * 64 * 4,
        "head": 8 * 2 * 64 * 320,
        "vision": 0.0,
    }


def test_tokens_that_read_and_the_images_they_read_by_hand():
    """Every second layer reads three images a row, of four features: patches of 192 numbers, one layer of 16."""
    encoder = EncoderConfig(height=16, width=16, patch_size=8, dim=16, num_layers=1, num_heads=2, hidden_dim=32)
    vision = VisionConfig(encoder, CrossAttentionConfig(every=2, num_heads=4, head_dim=8, hidden_dim=48))
    run = run_of({}, {})
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vision=vision))
    assert executed.train_step(run, ONE, KERNEL).vision == 0.0, "a run that feeds none"
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, images=ImageConfig(16, 16, per_row=3)))
    of_token = 4 * 6 * 2 * (2 * 64 * 32 + 3 * 64 * 48) + (4 + 1 / 2) * 6 * 2 * 2 * (3 * 4) * 32
    of_image = 2 * 4 * (192 * 16 + 4 * 16 * 16 + 2 * 16 * 32) + 2 * 2 * 4 * 4 * 16 + 6 * 2 * 2 * 4 * 16 * 32
    assert executed.train_step(run, ONE, KERNEL).vision == TOKENS * of_token + 32 * 3 * 4 * of_image
    # Clips of two frames: twice the features to encode, to keep and to look at.
    encoder, images = dataclasses.replace(encoder, max_frames=2), ImageConfig(16, 16, per_row=3, frames=2)
    model = dataclasses.replace(run.model, vision=dataclasses.replace(vision, encoder=encoder))
    clips = dataclasses.replace(run, model=model, data=dataclasses.replace(run.data, images=images))
    more = (4 + 1 / 2) * 6 * 2 * 2 * (3 * 4) * 32
    assert executed.train_step(clips, ONE, KERNEL).vision == TOKENS * (of_token + more) + 32 * 3 * 4 * 2 * of_image
    halved = executed.train_step(run, ONE | {"tensor": 2}, KERNEL)
    assert halved.vision == (TOKENS * of_token + 32 * 3 * 4 * of_image) / 2


def test_each_axis_takes_its_part():
    whole = executed.train_step(run_of({}, {}), ONE, KERNEL)
    data = executed.train_step(run_of({"data": 4}, {}), ONE | {"data": 4}, KERNEL)
    assert data.total == whole.total / 4
    tensor = executed.train_step(run_of({"tensor": 2}, {}), ONE | {"tensor": 2}, KERNEL)
    assert tensor.experts == whole.experts / 2 and tensor.attention_core == whole.attention_core / 2
    assert tensor.attention > whole.attention / 2, "every chip makes the key and value that its heads share"
    assert tensor.router == whole.router, "every chip routes all tokens"


def test_a_chip_with_part_of_the_queries_goes_over_all_keys():
    counted = executed.train_step(run_of({"context": 4}, {}), ONE | {"context": 4}, KERNEL)
    assert counted.attention_core == (2 + 2 + 5) * LAYERS * 32 * 2 * 4 * 32 * (64 / 4 * 64)


@pytest.mark.parametrize(("settings", "layers"), [({}, (16 + 3) * 3 / 16), ({"virtual_stages": 3}, (3 * 16 + 3) / 16)])
def test_ticks_without_work_cost_as_much_as_others(settings, layers):
    run = run_of({"stage": 4}, settings)
    assert executed.executed_layers(run, ONE | {"stage": 4}) == layers


def test_layers_before_a_pipeline_are_run_by_every_stage_for_all_its_rows():
    run = run_of({"stage": 4}, {})
    model = dataclasses.replace(run.model, num_layers=14, leading_dense_layers=2, dense_hidden_dim=192)
    counted = executed.train_step(dataclasses.replace(run, model=model), ONE | {"stage": 4}, KERNEL)
    assert counted.dense == 4 * 2 * TOKENS * 2 * (2 * 64 * 192)
    assert counted.attention == 4 * ((16 + 3) * 3 / 16 + 2) * TOKENS * 2 * 64 * (2 * 4 * 32 + 2 * 32)


def test_a_single_expert_is_a_dense_product_whose_results_are_kept():
    """As the shared expert of equal width: every token, no capacity, what the policy `dots` keeps."""
    run = run_of({}, {})
    one = dataclasses.replace(run.model.moe, num_experts=1, experts_per_token=1, shared_hidden_dim=256)
    one = dataclasses.replace(one, capacity_factor=None)
    counted = executed.train_step(
        dataclasses.replace(run, model=dataclasses.replace(run.model, moe=one, remat="dots")), ONE, KERNEL
    )
    assert counted.experts == counted.shared_expert == 3 * LAYERS * TOKENS * 2 * (2 * 64 * 256)


@pytest.mark.parametrize(("remat", "attention", "experts"), [("none", 3, 3), ("dots", 3, 4), ("full", 4, 4)])
def test_recomputation_is_what_the_policy_does_not_keep(remat, attention, experts):
    run = run_of({}, {})
    counted = executed.train_step(
        dataclasses.replace(run, model=dataclasses.replace(run.model, remat=remat)), ONE, KERNEL
    )
    full = executed.train_step(run, ONE, KERNEL)
    assert (counted.attention / full.attention, counted.experts / full.experts) == (attention / 4, experts / 4)
