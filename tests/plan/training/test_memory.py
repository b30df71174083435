"""Bytes of a chip: identities of the papers, and what sharding may never do."""

import dataclasses

import pytest

from gpt4moe.accounting import memory as exact
from gpt4moe.accounting import parameters
from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.published import gpt, shape_named
from gpt4moe.config.check import CallerError
from gpt4moe.configure import build_model
from gpt4moe.plan.training import memory
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.memory import NUMERICS

A100, LENGTH = chip_named("a100_80"), 2048
# Korthikanti et al. 2022, table 3: layers, width, heads, tensor, stages, chunks, rows of a microbatch.
MODELS = {
    "22B": (48, 6144, 64, 8, 1, 1, 4),
    "175B": (96, 12_288, 96, 8, 8, 3, 1),
    "530B": (105, 20_480, 128, 8, 35, 3, 1),
    "1T": (128, 25_600, 160, 8, 64, 1, 1),
}


def _estimate(shape, layout, **given):
    return memory.estimate(shape, layout, A100, **{"sequence_length": LENGTH} | given)


def _layout(tensor, stages, chunks, rows, **changes):
    given = {"virtual_stages": chunks, "schedule": "interleaved", "microbatch_rows": rows, "zero": 0}
    return Layout(tensor=tensor, stage=stages, **given | changes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["tensor", "sequence", "selective", "full"])
def test_activations_of_korthikanti(name, kind):
    """Their equations 2, 4, 6 and section 5: s b h L (...) (1 + (p-1)/pv) on the first stage."""
    layers, dim, heads, tensor, stages, chunks, rows = MODELS[name]
    shape = gpt(name, layers, dim, heads)
    remat = kind if kind in ("selective", "full") else "none"
    parallel = kind not in ("tensor", "full")
    layout = _layout(tensor, stages, chunks, rows, remat=remat, sequence_parallel=parallel)
    numerics = dataclasses.replace(NUMERICS["korthikanti"], flash=kind == "selective")
    found = _estimate(shape, layout, numerics=numerics).activation_bytes
    scores = 5 * heads * LENGTH / dim / tensor
    factor = {
        "tensor": 10 + 24 / tensor + scores,
        "sequence": 34 / tensor + scores,
        "selective": 34 / tensor,
        "full": 2,
    }
    interleaved = 1 + (stages - 1) / (stages * chunks) if chunks > 1 else 1
    assert found == pytest.approx(LENGTH * rows * dim * layers * factor[kind] * interleaved, rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_eighteen_bytes_a_parameter(name):
    """Of the first stage's share of layers and embedding, nothing sharded."""
    layers, dim, heads, tensor, stages, chunks, rows = MODELS[name]
    shape = gpt(name, layers, dim, heads)
    found = _estimate(shape, _layout(tensor, stages, chunks, rows))
    counted = parameters.count(shape)
    share = (counted.total - counted.embedding) / stages + counted.embedding
    state = found.weight_bytes + found.gradient_bytes + found.optimizer_bytes
    assert found.most_loaded_stage in (0, stages - 1)
    assert state == pytest.approx(18 * share / tensor, rel=1e-3)


@pytest.mark.parametrize("shape", ["llama3_70b", "mixtral_8x22b", "deepseek_v3"])
@pytest.mark.parametrize("expert", [1, 8])
def test_zero_shards_more_and_more(shape, expert):
    shape = shape_named(shape)
    expert = expert if shape.num_moe_layers else 1
    totals = []
    for zero in range(4):
        found = _estimate(shape, Layout(data=64, zero=zero, expert=expert, remat="full"))
        totals.append(found.total_bytes - found.gathered_bytes)
    assert totals == sorted(totals, reverse=True)
    assert _estimate(shape, Layout(data=64, zero=3, expert=expert, remat="full")).total_bytes < totals[1]
    assert totals[3] < 0.25 * totals[0]


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("shape", ["llama3_70b", "mixtral_8x22b"])
def test_more_replicas_never_need_more(zero, shape):
    shape = shape_named(shape)
    totals = [_estimate(shape, Layout(data=data, zero=zero)).total_bytes for data in (1, 2, 4, 8, 32, 512)]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == (1 if zero == 0 else 6)
    state = [_estimate(shape, Layout(data=data, zero=zero)).optimizer_bytes for data in (1, 2, 4)]
    assert zero == 0 or state[0] == pytest.approx(4 * state[2])


def test_experts_are_sharded_over_their_own_replicas():
    """64 replicas with every expert on 8 chips: experts have 8 copies, all else 64."""
    shape = shape_named("mixtral_8x7b")
    counted = parameters.count(shape)
    found = _estimate(shape, Layout(data=64, zero=1, expert=8))
    dense = (counted.total - counted.experts) / 64
    assert found.optimizer_bytes == pytest.approx(12 * (dense + counted.experts / 8 / 8), rel=1e-9)
    assert found.weight_bytes == pytest.approx(2 * (64 * dense + counted.experts / 8), rel=1e-9)


def test_activations_of_experts_by_hand():
    """Mixtral 8x7B, two experts a token: 8 d for norms, 4 d and keys of attention, experts 4 d + 6 f, the router."""
    shape, dim, hidden = shape_named("mixtral_8x7b"), 4096, 14_336
    attention = 8 * dim + 2 * dim + 2 * dim + 2 * 2 * 8 * 128
    wanted = attention + 2 * (4 * dim + 6 * hidden) + 4 * 8
    given = {"shape": shape, "numerics": memory.MIXED_ADAM, "sequence_length": LENGTH, "experts": True}
    assert memory.activation_bytes_per_token(layout=Layout(), **given) == wanted
    spread = Layout(tensor=4, expert=4, data=1)
    assert memory.activation_bytes_per_token(layout=spread, **given) == pytest.approx(wanted / 4)
    given["shape"] = dataclasses.replace(shape, capacity_factor=1.5)
    assert memory.activation_bytes_per_token(layout=Layout(), **given) == wanted + 4 * dim + 6 * hidden


def test_a_slice_of_replicas_shards_for_itself():
    shape = shape_named("llama2_7b")
    alone, sliced = (_estimate(shape, Layout(data=16, zero=3, zero_group=size)) for size in (0, 4))
    assert sliced.optimizer_bytes == pytest.approx(4 * alone.optimizer_bytes)


def test_the_bytes_of_our_trainer():
    model = build_model(["gin_configs/run/tiny.gin"], [])
    found = _estimate(model, Layout(zero=0), numerics=NUMERICS["float32_adam"])
    state = found.weight_bytes + found.gradient_bytes + found.optimizer_bytes
    assert state == exact.train_state_bytes(model)


def test_stages_that_differ():
    """The head's logits make the last stage fullest once microbatches are few, the first stage's activations else."""
    shape = gpt("wide vocabulary", 8, 1024, 8, 250_880)
    few = _estimate(shape, Layout(stage=4), microbatches=1)
    many = _estimate(gpt("deep", 64, 4096, 32, 1024), Layout(stage=4, remat="none"), sequence_length=8192)
    assert (few.most_loaded_stage, many.most_loaded_stage) == (3, 0)
    assert few.logit_bytes == pytest.approx(2048 * 250_880 * 10)


def test_it_fits_or_does_not():
    small, large = (_estimate(shape_named(name), Layout(zero=0)) for name in ("llama2_7b", "llama2_70b"))
    assert not small.fits and small.spare_bytes == 80e9 - small.total_bytes < 0
    assert _estimate(shape_named("llama2_7b"), Layout(data=8, zero=3)).fits
    assert large.total_bytes > 10 * 80e9
    assert sum(small.parts.values()) == small.total_bytes


def test_remat_keeps_less():
    shape = shape_named("mixtral_8x7b")
    kept = [_estimate(shape, Layout(data=8, remat=remat)).activation_bytes for remat in ("none", "selective", "full")]
    assert kept[0] == kept[1] > 10 * kept[2]
    unfused = dataclasses.replace(memory.MIXED_ADAM, flash=False)
    kept = [
        _estimate(shape, Layout(data=8, remat=remat), numerics=unfused).activation_bytes for remat in ("none", "full")
    ]
    assert kept[0] > 15 * kept[1]


def test_a_layout_that_is_none_is_refused():
    with pytest.raises(CallerError, match="num_heads=32 must be divisible by the tensor degree"):
        _estimate(shape_named("llama2_7b"), Layout(tensor=3))


def test_rows_of_a_split_expert_lie_whole_on_its_chips():
    """Rows go there and back in 16 bits: over 4 chips that share each expert, four times the bytes of one alone."""
    shape = shape_named("mixtral_8x7b")
    split, whole = (
        _estimate(shape, Layout(tensor=4, expert=2, expert_tensor=parts, data=4)).activation_bytes for parts in (4, 1)
    )
    rows = LENGTH * shape.experts_per_token * shape.num_layers
    assert split - whole == pytest.approx(3 / 4 * rows * 2 * 2 * shape.model_dim)


def test_zero_shards_over_the_chips_of_a_row_too():
    """All replicas and their context chips, unless a group of replicas is named."""
    shape = gpt("x", 8, 1024, 16)
    one, two = (_estimate(shape, Layout(context=context, data=4, zero=1)) for context in (1, 2))
    assert two.optimizer_bytes == pytest.approx(one.optimizer_bytes / 2)
    named = _estimate(shape, Layout(context=2, data=4, zero=1, zero_group=4))
    assert named.optimizer_bytes == one.optimizer_bytes


def test_what_dots_keeps():
    """Of a layer of width d with a feed-forward of 4 d: input, query, key, value, output, and both products: 11 d."""
    shape = gpt("x", 8, 1024, 8)
    kept = {
        remat: _estimate(shape, Layout(remat=remat, sequence_parallel=False)).activation_bytes
        for remat in ("none", "dots", "full")
    }
    assert kept["dots"] == pytest.approx(LENGTH * 8 * 2 * (3 + 3 + 4) * 1024)
    assert kept["full"] < kept["dots"] < kept["none"]
    experts = shape_named("mixtral_8x7b")
    routed, none = (_estimate(experts, Layout(remat=remat)).activation_bytes for remat in ("dots", "none"))
    assert routed < none / 3


BYTES_OF_A_PARAMETER = {
    "mixed_adam": (2, 4, 12), "mixed_adam_16": (2, 2, 12), "float32_adam": (4, 4, 8), "fp8_adam": (1, 4, 8),
    "bfloat16": (2, 2, 4), "adafactor": (4, 4, 0.01), "korthikanti": (2, 4, 12),
}  # fmt: skip


def test_state_of_every_numerics():
    shape = gpt("x", 4, 512, 4)
    total = parameters.count(shape).total
    assert set(NUMERICS) == set(BYTES_OF_A_PARAMETER)
    for name, each in BYTES_OF_A_PARAMETER.items():
        found = _estimate(shape, Layout(zero=0), numerics=NUMERICS[name])
        held = (found.weight_bytes, found.gradient_bytes, found.optimizer_bytes)
        assert held == pytest.approx([total * size for size in each]), name


def test_context_halves_activations_and_logits():
    shape = gpt("x", 4, 512, 4)
    one, two = (_estimate(shape, Layout(context=context)) for context in (1, 2))
    assert (one.activation_bytes, one.logit_bytes) == (2 * two.activation_bytes, 2 * two.logit_bytes)


def test_a_tied_table_lies_on_both_ends():
    shape = dataclasses.replace(gpt("x", 4, 512, 4, learned_positions=0), tied=True)
    counted, layout = parameters.count(shape), Layout(stage=2)
    first, last = (memory.stage_parameters(shape, layout, stage)[0] for stage in (0, 1))
    assert first == pytest.approx(last) and first + last == pytest.approx(counted.total + counted.embedding)


@pytest.mark.parametrize("stages", [1, 4, 16])
def test_the_stages_hold_every_parameter_of_deepseek(stages):
    """Shared experts, routers and the latent's matrices among them."""
    shape = shape_named("deepseek_v3")
    layout = Layout(tensor=4, stage=stages, expert=8, expert_tensor=2, data=16)
    held = [memory.stage_parameters(shape, layout, stage)[:2] for stage in range(stages)]
    total = sum(4 * dense + 16 * routed for dense, routed in held)
    assert total == pytest.approx(parameters.count(shape).total)


def test_what_a_layer_of_deepseek_keeps():
    """Of 7,168: four inputs, queries and outputs, keys and values of heads, the latent, experts there and back."""
    shape = shape_named("deepseek_v3")
    latent, dim = shape.latent, 7168
    heads = 128 * (latent.plain_dim + latent.value_dim)
    core = 2 * 128 * (latent.plain_dim + latent.rotary_dim + latent.value_dim) / 2
    inside = core + heads + latent.key_value_rank + latent.rotary_dim
    routed = 8 * (2 * dim + 3 * 2048)
    kept = memory.activation_bytes_per_token(shape, Layout(), NUMERICS["mixed_adam"], LENGTH, experts=True)
    assert kept == pytest.approx(2 * (4 * dim + inside + 3 * 2048 + routed) + 4 * 256)


def test_dualpipe_holds_weights_twice():
    shape = gpt("x", 8, 512, 4)
    once, twice = (_estimate(shape, Layout(stage=4, schedule=name)).weight_bytes for name in ("1f1b", "dualpipe"))
    assert twice == 2 * once


def test_the_first_stage_with_experts_only_is_looked_at():
    """DeepSeek over 16 stages: three layers without experts, then three of four with them."""
    shape = shape_named("deepseek_v3")
    found = _estimate(shape, Layout(stage=16, expert=8, data=64, zero=0, schedule="1f1b"))
    assert found.most_loaded_stage == 1


def test_zero_3_gathers_two_layers():
    shape = gpt("x", 8, 512, 4, learned_positions=0)
    counted = parameters.count(shape)
    layer = (counted.attention + counted.dense + counted.norms) / 8
    assert _estimate(shape, Layout(data=4, zero=3)).gathered_bytes == pytest.approx(2 * layer * 2)
    assert _estimate(shape, Layout(data=1, zero=3)).gathered_bytes == 0
    assert _estimate(shape, Layout(data=4, zero=2)).gathered_bytes == 0


def test_a_layer_that_is_computed_again_is_there_once():
    shape = gpt("x", 8, 512, 4)
    again, kept = (_estimate(shape, Layout(remat=remat)) for remat in ("full", "selective"))
    assert again.working_bytes == pytest.approx(kept.activation_bytes / 8) and kept.working_bytes == 0
