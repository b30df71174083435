"""Time of a step: products by hand, what may only fall, parts that add up, experts."""

import dataclasses

import pytest

from gpt4moe.accounting import flops, parameters
from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.published import gpt, shape_named
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import CallerError
from gpt4moe.configure import build_model
from gpt4moe.plan.training import layer_time, step_time
from gpt4moe.plan.training.communication import Group, all_gather_seconds, message_seconds
from gpt4moe.plan.training.layer_time import Place, expert_rows, product_seconds
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.stacks import MEMORY_EFFICIENCY, MESSAGE_SECONDS, Stack, matmul_efficiency

A100, H100 = chip_named("a100_80"), chip_named("h100")
GPT, MIXTRAL = gpt("gpt", 96, 12_288, 96), shape_named("mixtral_8x22b")
PIPELINE = Layout(tensor=8, stage=8, data=4, virtual_stages=3, schedule="interleaved", zero=1)
JOBS = {
    "pipeline": (GPT, PIPELINE, 128 * 2048, 2048),
    "fsdp": (shape_named("llama3_70b"), Layout(data=256, zero=3), 256 * 8192, 8192),
    "context": (shape_named("llama3_70b"), Layout(tensor=8, context=8, data=4), 8 * 65_536, 65_536),
    "experts": (MIXTRAL, Layout(tensor=2, stage=8, data=8, expert=8, expert_tensor=1), 256 * 4096, 4096),
}


def _estimate(shape=GPT, layout=PIPELINE, chip=A100, tokens=128 * 2048, length=2048, **stack):
    return step_time.estimate(shape, layout, chip, tokens, length, Stack(**stack))


def test_a_product_by_hand():
    """1024 x 2048 x 512: the smallest dimension costs 512 / 576."""
    found = product_seconds(A100, Stack(), 1024, 2048, 512)
    assert found == pytest.approx(2 * 1024 * 2048 * 512 / (312e12 * 0.72 * 512 / 576))
    assert product_seconds(H100, Stack(matmul_bits=8), 4096, 4096, 4096) < product_seconds(H100, Stack(), *(4096,) * 3)


def test_without_inefficiencies_it_is_the_flops_over_the_peak():
    """Products alone, at efficiencies that are counted: 3 forward passes of the layers' matrices and the head."""
    step = _estimate(layout=Layout(), tokens=2048)
    wanted = 3 * flops.forward_flops_per_token(GPT) * 2048 / (312e12 * matmul_efficiency("a100_80"))
    assert wanted < step.parts["matmul"] + step.parts["head"] < 1.1 * wanted


@pytest.mark.parametrize("job", JOBS)
def test_parts_add_up(job):
    shape, layout, tokens, length = JOBS[job]
    step = _estimate(shape, layout, H100, tokens, length)
    assert step.seconds == pytest.approx(sum(step.parts.values()))
    assert min(step.parts.values()) >= 0
    assert set(step.parts) == set(step_time.KIND_OF)
    assert step.tokens_per_second == pytest.approx(tokens / step.seconds)
    peak = layout.chips * H100.peak_flops
    assert step.model_flops_utilization == pytest.approx(
        flops.train_flops_per_token(shape) * step.tokens_per_second / peak
    )
    assert 0.1 < step.model_flops_utilization < 0.61


def test_the_head_is_three_products():
    """Twice the vocabulary adds three products of it and 16 bytes a logit through memory; the layers stay."""
    once, twice = (dataclasses.replace(GPT, vocab_size=size) for size in (2**17, 2**18))
    step, wide = (_estimate(shape, Layout(), tokens=2048) for shape in (once, twice))
    product = product_seconds(A100, Stack(), 2048, 12_288, 2**17)
    traffic = 2048 * 2**17 * 16 / (A100.bandwidth_bytes_per_second * 0.8)
    assert wide.parts["head"] - step.parts["head"] == pytest.approx(3 * product + traffic)
    assert wide.parts["matmul"] == step.parts["matmul"]


def _better(field, factor):
    network = dataclasses.replace(H100.network, **{field: factor * getattr(H100.network, field)})
    return dataclasses.replace(H100, network=network)


FASTER = {
    "peak": lambda factor: dataclasses.replace(H100, peak_flops=factor * H100.peak_flops),
    "memory": lambda factor: dataclasses.replace(
        H100, bandwidth_bytes_per_second=factor * H100.bandwidth_bytes_per_second
    ),
    "inside": lambda factor: _better("domain_bytes_per_second", factor),
    "outside": lambda factor: _better("outside_bytes_per_second", factor),
}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("what", FASTER)
def test_a_faster_chip_or_network_is_never_slower(job, what):
    shape, layout, tokens, length = JOBS[job]
    times = [_estimate(shape, layout, FASTER[what](factor), tokens, length).seconds for factor in (0.1, 0.5, 1, 2, 10)]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


@pytest.mark.parametrize("data", [1, 2, 8, 32])
def test_more_replicas_are_never_slower(data):
    """The same batch on more chips, microbatches of one row."""
    once, twice = (_estimate(layout=Layout(8, 1, 4, data=number), tokens=64 * 2048) for number in (data, 2 * data))
    assert twice.seconds < once.seconds
    assert twice.bubble_fraction > once.bubble_fraction


def test_the_bubble_is_that_of_the_schedule():
    """p = 4, m = 8 of equal stages: 3/8 of the work, 3/16 with two chunks; the head makes the last stage longer."""
    shape = dataclasses.replace(GPT, vocab_size=64)
    plain = _estimate(shape, Layout(8, 1, 4), tokens=8 * 2048)
    again = _estimate(shape, Layout(8, 1, 4, 2, schedule="interleaved"), tokens=8 * 2048)
    outside = ("bubble", "stage_communication", "data_communication", "optimizer")
    busy = sum(seconds for name, seconds in plain.parts.items() if name not in outside)
    assert plain.parts["bubble"] / busy == pytest.approx(3 / 8, rel=1e-3)
    assert again.parts["bubble"] == pytest.approx(plain.parts["bubble"] / 2, rel=1e-3)
    assert again.parts["stage_communication"] == pytest.approx(2 * plain.parts["stage_communication"])


def test_the_slowest_stage_sets_the_pace():
    """7 layers over 4 stages take as long a microbatch as 8."""
    seven, eight = (dataclasses.replace(GPT, num_layers=number, vocab_size=64) for number in (7, 8))
    busy = [_estimate(shape, Layout(8, 1, 4), tokens=512 * 2048).parts["matmul"] for shape in (seven, eight)]
    assert busy[0] == pytest.approx(busy[1])


def test_a_wide_head_slows_the_last_stage_and_a_folded_schedule_halves_that():
    shape = gpt("wide", 16, 4096, 32, 400_000)
    plain, folded = (
        _estimate(shape, Layout(stage=4, schedule=schedule), tokens=64 * 2048) for schedule in ("1f1b", "dualpipe")
    )
    assert folded.parts["head"] == pytest.approx(plain.parts["head"] / 2)


def test_what_is_computed_again():
    none, selective, full = (
        _estimate(layout=dataclasses.replace(PIPELINE, remat=remat), flash=False)
        for remat in ("none", "selective", "full")
    )
    assert none.parts["recompute"] == 0
    assert selective.parts["recompute"] < 0.1 * selective.seconds
    layers = full.parts["matmul"] + full.parts["attention_core"] + full.parts["elementwise"]
    assert full.parts["recompute"] == pytest.approx(layers / 3, rel=1e-6)
    assert full.parts["tensor_communication"] == pytest.approx(1.5 * none.parts["tensor_communication"])


def test_sequence_parallel_spreads_norms_and_costs_no_more_to_send():
    whole, spread = (
        _estimate(layout=dataclasses.replace(PIPELINE, sequence_parallel=parallel)) for parallel in (False, True)
    )
    assert spread.parts["elementwise"] < 0.5 * whole.parts["elementwise"]
    assert spread.parts["tensor_communication"] == whole.parts["tensor_communication"]


def test_overlap_hides_no_more_than_there_is_to_compute():
    shape, layout = shape_named("llama3_70b"), Layout(data=1024, zero=3)
    bare, hidden = (_estimate(shape, layout, H100, 1024 * 256, 256, data_overlap=overlap) for overlap in (0.0, 1.0))
    computed = bare.seconds - bare.parts["data_communication"] - bare.parts["optimizer"]
    assert bare.parts["data_communication"] - hidden.parts["data_communication"] == pytest.approx(computed)
    assert hidden.parts["data_communication"] > 0


def test_rows_of_an_expert_by_hand():
    """8 replicas x 4,096 tokens, 2 of 8 experts each: 8,192 rows; a capacity factor of 1.25 executes as many more."""
    place = Place(MIXTRAL, Layout(data=8, expert=8), H100, Stack(), 4096)
    assert expert_rows(place) == 8 * 4096 * 2 / 8
    roomy = dataclasses.replace(MIXTRAL, capacity_factor=1.25)
    assert expert_rows(dataclasses.replace(place, shape=roomy)) == 1.25 * expert_rows(place)
    split = dataclasses.replace(place, layout=Layout(tensor=2, data=4, expert=4, expert_tensor=2))
    assert expert_rows(split) == 4 * 4096 * 2 / 8


def test_capacity_is_executed_and_imbalance_waits():
    plain = dataclasses.replace(MIXTRAL, capacity_factor=1.0)
    layout = Layout(data=8, expert=8)
    tight, roomy = (
        layer_time.forward(
            Place(dataclasses.replace(plain, capacity_factor=factor), layout, H100, Stack(), 4096), experts=True
        )
        for factor in (1.0, 1.5)
    )
    assert roomy.expert_products == pytest.approx(1.5 * tight.expert_products)
    assert roomy.expert == pytest.approx(1.5 * tight.expert, rel=0.06)  # starts of messages stay
    dropless = layer_time.forward(Place(MIXTRAL, layout, H100, Stack(imbalance=1.5), 4096), experts=True)
    assert dropless.expert_products == pytest.approx((1 + 0.5 * 7 / 8) * tight.expert_products)


def test_the_all_to_all_hides_behind_the_rest():
    shown, hidden = (
        _estimate(MIXTRAL, JOBS["experts"][1], H100, 256 * 4096, 4096, expert_overlap=overlap) for overlap in (0, 0.8)
    )
    assert hidden.parts["expert_communication"] == pytest.approx(0.2 * shown.parts["expert_communication"])


def test_a_calibrated_stack():
    plain = _estimate()
    assert _estimate(seconds_scale=1.25).seconds == pytest.approx(1.25 * plain.seconds)
    slow = _estimate(communication_scale=2.0)
    sent = sum(plain.parts[name] for name in step_time.KINDS["communication"])
    assert slow.seconds == pytest.approx(plain.seconds + sent)


def test_our_configuration_is_costed_by_the_same_function():
    model = build_model(["gin_configs/run/tiny.gin"], [])
    step = step_time.estimate(model, Layout(data=2), H100, 32 * 256, 256)
    assert step.parts["expert_matmul"] > 0 and step.seconds > 0


def test_eight_bits_need_a_chip_that_has_them():
    with pytest.raises(CallerError, match="matmul_bits=8 needs fp8 products, which v100 lacks; take 16"):
        _estimate(chip=chip_named("v100"), matmul_bits=8)


def test_a_batch_that_does_not_divide():
    with pytest.raises(CallerError, match=r"batch_rows=6 must be a multiple of data \* microbatch_rows"):
        _estimate(tokens=6 * 2048)


def test_experts_move_rows_that_a_dense_layer_does_not():
    """One expert as wide as the dense layer: a row is read and written as it goes there, read and written as it comes.

    Beside its own input and output, 4 + 2 values of the model's width a token, in 16 bits.
    """
    shape = Shape("one", 2, 1024, 8, 8, 128, 32_000, 4096, num_moe_layers=1, expert_hidden_dim=4096)
    place = Place(shape, Layout(), H100, Stack(), 2048)
    dense, routed = (layer_time.forward(place, experts=experts).elementwise for experts in (False, True))
    moved_bytes = 2 * 6 * 1024 * 2048
    assert routed - dense == pytest.approx(moved_bytes / (H100.bandwidth_bytes_per_second * MEMORY_EFFICIENCY))


def test_zero_2_reduces_the_gradients_of_every_microbatch():
    """Without overlap: one gather of weights and one reduction of as many bytes, or one for each of 4 microbatches."""
    shape, stack = gpt("x", 8, 4096, 32), Stack(data_overlap=0.0)
    sent = {
        (zero, rows): step_time.estimate(
            shape, Layout(data=8, zero=zero, microbatch_rows=rows), chip_named("h100"), 32 * 2048, 2048, stack
        ).parts["data_communication"]
        for zero in (1, 2)
        for rows in (1, 4)
    }
    assert sent[1, 1] == sent[1, 4] == sent[2, 4]
    assert sent[2, 1] == pytest.approx((4 + 1) / 2 * sent[1, 1], rel=1e-3)


def test_dots_computes_all_again_but_products_with_matrices():
    shape, again = gpt("x", 8, 4096, 32), {}
    for remat in ("selective", "dots", "full"):
        layout = Layout(data=8, remat=remat)
        again[remat] = step_time.estimate(shape, layout, chip_named("h100"), 8 * 2048, 2048).parts["recompute"]
    parts = step_time.estimate(shape, Layout(data=8), chip_named("h100"), 8 * 2048, 2048).parts
    assert again["selective"] == 0
    assert again["full"] - again["dots"] == pytest.approx(parts["matmul"] / 3)


def test_experts_between_groups_of_replicas_are_summed_over_their_copies():
    """64 replicas in groups of 4, 32 chips to a set of experts: 2 copies of each expert, not 16."""
    shape = shape_named("qwen3_30b_a3b")
    stack = Stack(data_overlap=0.0, scale_out_bytes_per_second=1e6)
    times = [
        step_time.estimate(
            shape, Layout(data=data, expert=32, zero=3, zero_group=4), chip_named("h100"), data * 2048, 2048, stack
        ).parts["data_communication"]
        for data in (32, 64)
    ]
    counted = parameters.count(shape)
    dense, routed = counted.total - counted.experts, counted.experts
    more = 2 * 2 / 1e6 / 0.6 * (routed / 32 / 2 + dense / 4 / 2 * (7 / 8 - 3 / 4))
    assert times[1] - times[0] == pytest.approx(more, rel=0.02)


@pytest.mark.parametrize(
    ("chip", "share"),
    [("a100_40", 0.72), ("v100", 0.60), ("h800", 0.61), ("b200", 0.65), ("gb200", 0.65), ("tpu_v4", 0.8)],
)
def test_shares_of_the_peak(chip, share):
    assert matmul_efficiency(chip) == share


def test_scores_through_memory_take_eleven_bytes():
    """A head of 128 over 2,048 tokens: the core without fusion moves 11 bytes a score, once forward and twice back."""
    shape = gpt("x", 1, 128, 1)
    slow = dataclasses.replace(A100, bandwidth_bytes_per_second=1e3)
    part = _estimate(shape, Layout(remat="none"), slow, 2048, flash=False).parts["attention_core"]
    assert part == pytest.approx(3 * 11 * 2048 * 2048 / (1e3 * MEMORY_EFFICIENCY), rel=1e-3)


def test_keys_are_gathered_once_forward_and_twice_back():
    shape, layout = gpt("x", 4, 1024, 8), Layout(context=4, zero=0)
    whole = 2048 * 2 * 1024 * 2
    one = all_gather_seconds(whole, A100, Group(4, 1, 4), Stack())
    found = _estimate(shape, layout, tokens=2048, context_overlap=0.0).parts["context_communication"]
    assert found == pytest.approx(4 * 3 * one)


def test_gaps_of_a_layer_come_forward_and_back():
    """Attention and feed-forward share one gap a pass."""
    parts = _estimate(gpt("x", 4, 1024, 8), Layout(), tokens=2048, layer_pass_seconds=0.5).parts
    assert parts["overhead"] == pytest.approx(4 * 2 * 0.5)


def test_products_of_a_latent_layer_are_its_matrices():
    """At the peak: two FLOPs a parameter and token, three times forward; shared experts and router as well."""
    shape = dataclasses.replace(shape_named("deepseek_v3"), num_layers=2, num_moe_layers=1)
    counted = parameters.count(shape)
    beside = counted.attention + counted.dense + counted.shared_experts + counted.router
    large = dataclasses.replace(shape, num_experts=256)
    step = _estimate(large, Layout(remat="none"), H100, 4096, 4096, network_share=0.0)
    ideal = 6 * beside * 4096 / H100.peak_flops
    assert 1 / 0.61 < step.parts["matmul"] / ideal < 1.1 / 0.61


def test_a_window_bounds_the_core():
    shape = shape_named("llama3_8b")
    windowed = dataclasses.replace(shape, window=1024)
    whole, cut = (
        _estimate(each, Layout(remat="none"), H100, 65_536, 65_536).parts["attention_core"]
        for each in (shape, windowed)
    )
    assert cut == pytest.approx(whole / 32, rel=0.1)


def test_eight_bits_are_for_products_and_what_goes_to_experts():
    layout = Layout(expert=8, data=8, remat="none")
    parts = {bits: _estimate(MIXTRAL, layout, H100, 8 * 4096, 4096, matmul_bits=bits).parts for bits in (8, 16)}
    assert parts[8]["attention_core"] == parts[16]["attention_core"]
    starts = MIXTRAL.num_layers * 4 * MESSAGE_SECONDS * 4  # forward and backward, there and back, over 8 chips
    eight, sixteen = (parts[bits]["expert_communication"] - starts for bits in (8, 16))
    assert eight == pytest.approx(3 / 4 * sixteen)


def test_rows_that_go_to_few_servers():
    shape = shape_named("deepseek_v3")
    layout = Layout(expert=64, data=64, remat="none")
    free, limited = (
        _estimate(shape, layout, H100, 64 * 4096, 4096, domain_limit=limit).parts["expert_communication"]
        for limit in (0, 4)
    )
    assert limited == pytest.approx(free / 2, rel=0.05)


def test_key_heads_are_stored_again_beyond_their_number():
    """Mixtral has 8: over 16 chips each keeps one, of which 8 chips had one each."""
    place = [Place(MIXTRAL, Layout(tensor=tensor, expert_tensor=tensor), H100, Stack(), 4096) for tensor in (8, 16)]
    eight, sixteen = (layer_time.forward(each, experts=False).products for each in place)
    assert sixteen > eight / 2 * 1.001


def test_the_optimizer_moves_thirty_bytes_a_parameter():
    shape = gpt("x", 4, 1024, 8)
    found = _estimate(shape, Layout(data=4, zero=1), tokens=4 * 2048).parts["optimizer"]
    moved = 30 * parameters.count(shape).total / 4
    assert found == pytest.approx(moved / (A100.bandwidth_bytes_per_second * MEMORY_EFFICIENCY))


def test_messages_that_fill_and_empty_the_pipeline_are_not_hidden():
    shape, layout = gpt("x", 8, 1024, 8), Layout(tensor=2, stage=4, sequence_parallel=False)
    one = message_seconds(2048 * 1024 * 2 / 2, A100, 2, Stack())
    hidden, shown, whole = (
        _estimate(shape, layout, tokens=8 * 2048, **stack).parts["stage_communication"]
        for stack in ({"stage_overlap": 1.0}, {"stage_overlap": 0.0}, {"stage_overlap": 0.0, "scatter_gather": False})
    )
    assert hidden == pytest.approx(2 * 3 * one) and shown == pytest.approx(2 * 8 * one)
    assert whole == pytest.approx(2 * 8 * message_seconds(2048 * 1024 * 2, A100, 2, Stack()))


def _data_seconds(layout, **stack):
    shape = gpt("x", 8, 1024, 8, learned_positions=0)
    tokens = layout.data * 2048 * 2
    return _estimate(shape, layout, tokens=tokens, data_overlap=0.0, **stack).parts["data_communication"]


def test_collectives_of_every_zero():
    """One ring of a server: 7/8 of the bytes each time; two microbatches, two bytes a value."""
    count = parameters.count(gpt("x", 8, 1024, 8, learned_positions=0)).total
    once = all_gather_seconds(2 * count, A100, Group(8, 1, 8), Stack())
    times = {zero: _data_seconds(Layout(data=8, zero=zero)) / once for zero in range(4)}
    assert times == pytest.approx({0: 2, 1: 2, 2: 3, 3: 6})
    four = all_gather_seconds(4 * count, A100, Group(8, 1, 8), Stack())
    assert _data_seconds(Layout(data=8, zero=1), gradient_bytes=4) == pytest.approx(once + four)


def test_context_and_other_slices_take_part_in_the_sum():
    count = parameters.count(gpt("x", 8, 1024, 8, learned_positions=0)).total
    spread = all_gather_seconds(2 * count, A100, Group(8, 1, 8), Stack())
    assert _data_seconds(Layout(context=2, data=4, zero=1)) == pytest.approx(2 * spread)
    inside = all_gather_seconds(2 * count, A100, Group(8, 1, 32), Stack())
    across = all_gather_seconds(2 * count / 8, A100, Group(4, 8, 32), Stack())
    assert _data_seconds(Layout(data=32, zero=1, zero_group=8)) == pytest.approx(2 * inside + 2 * across)


def test_the_first_stage_sums_its_embedding():
    shape = gpt("x", 8, 1024, 8, learned_positions=0)
    layout = Layout(stage=4, data=2, zero=0)
    counted = parameters.count(shape)
    fullest = (counted.attention + counted.dense) / 4 + counted.embedding
    expected = 2 * all_gather_seconds(2 * fullest, A100, Group(2, 1, 2), Stack())
    found = _estimate(shape, layout, tokens=8 * 2048, data_overlap=0.0).parts["data_communication"]
    assert found == pytest.approx(expected, rel=0.01)


def test_only_computing_hides_what_replicas_send():
    """All of it may hide: what is left is what exceeds the last microbatch's products, elementwise work and head."""
    shape, layout = gpt("x", 8, 1024, 8), Layout(tensor=8, data=8)
    parts = _estimate(shape, layout, tokens=8 * 2048, data_overlap=1.0, scale_out_bytes_per_second=1e7).parts
    whole = _estimate(shape, layout, tokens=8 * 2048, data_overlap=0.0, scale_out_bytes_per_second=1e7).parts
    beside = sum(parts[name] for name in ("matmul", "attention_core", "elementwise", "overhead", "recompute", "head"))
    assert whole["data_communication"] - parts["data_communication"] == pytest.approx(beside)


def test_exchanges_hide_no_more_than_there_is_to_compute():
    layout = Layout(expert=8, data=64, remat="none")
    slow = {"scale_out_bytes_per_second": 1e6, "expert_overlap": 1.0}
    shape = dataclasses.replace(MIXTRAL, num_experts=64)
    apart = dataclasses.replace(layout, expert=64)
    assert _estimate(shape, apart, H100, 64 * 4096, 4096, **slow).parts["expert_communication"] > 0


def test_a_shared_expert_is_summed_over_tensor():
    plain = dataclasses.replace(MIXTRAL, shared_hidden_dim=0)
    shared = dataclasses.replace(MIXTRAL, shared_hidden_dim=1024)
    layout = Layout(tensor=8, expert=1, expert_tensor=8)
    one, two = (_estimate(shape, layout, H100, 4096, 4096).parts["tensor_communication"] for shape in (plain, shared))
    sums = two - one
    each = 2 * all_gather_seconds(4096 * MIXTRAL.model_dim * 2, H100, Group(8, 1, 8), Stack())
    assert sums == pytest.approx(MIXTRAL.num_layers * 2 * each, rel=0.01)


def test_two_passes_fill_the_pipeline_twice():
    shape = gpt("x", 8, 1024, 8)
    one = Layout(stage=4, schedule="circular", zero=0)
    bubbles = [
        _estimate(shape, dataclasses.replace(one, passes=passes), tokens=16 * 2048).parts["bubble"] for passes in (1, 2)
    ]
    assert bubbles[1] == pytest.approx(2 * bubbles[0])


def test_the_bubble_lasts_as_long_as_the_mean_stage():
    """2 stages, 2 microbatches: half a step of the mean, though the last has the head."""
    shape = gpt("x", 4, 1024, 8, 200_000)
    parts = _estimate(shape, Layout(stage=2, zero=0), tokens=2 * 2048).parts
    last = sum(parts[name] for name in ("matmul", "attention_core", "elementwise", "overhead", "recompute", "head"))
    assert parts["bubble"] == pytest.approx((last + last - parts["head"]) / 2 / 2)
