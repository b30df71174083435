"""Times of decode steps and prompts: the audited table of the reference, formulas by hand, what must never rise."""

import dataclasses
import math

import pytest

from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.accounting.shape import shape_of
from gpt4moe.configure import build_model
from gpt4moe.plan.serving import expert_load
from gpt4moe.plan.serving.collectives import expert_exchange, tensor_exchange
from gpt4moe.plan.serving.cost import serve
from gpt4moe.plan.serving.layout import Efficiency, ServeLayout, max_context
from gpt4moe.plan.serving.rooflines import Server, core_flops_per_key, critical_rows, decode_step, prefill_step

REFERENCE = shape_of(build_model(["gin_configs/model/gpt4_1p8t.gin"]))
MIXTRAL = shape_named("mixtral_8x7b")
H100 = chip_named("h100")
# The audit let every chip send to the next stage over 200 Gbit/s.
AUDIT = Efficiency(stage_bytes_per_second=25e9)

# chip, weights, $/h, rows; distinct experts; stage ms (whole, weights, cache, FLOPs, tensor); tokens a second of the
# cluster and of a user; $ per 1k; MFU. None: the audit does not split that time.
AUDIT_TABLE = (
    ("a100_40", "bfloat16", 1, 8, 10.5, (15.9, 15.4, 0.1, 0.2, 0.3), 502, 3.9, 0.0708, 0.007),
    ("a100_40", "bfloat16", 1, 64, 16.0, (25.5, 23.0, 0.4, 1.5, 0.5), 2511, 2.45, 0.0142, 0.035),
    ("a100_40", "bfloat16", 1, 256, 16.0, (32.0, 23.0, 1.6, 6.2, 0.9), 8001, 1.95, 0.00444, 0.112),
    ("a100_40", "bfloat16", 1, 1024, 16.0, (58.0, 23.0, 6.5, 24.7, 2.9), 17_658, 1.08, 0.00201, 0.247),
    ("a100_40", "int8", 1, 256, 16.0, (20.5, None, None, None, None), 12_497, 3.05, 0.00285, 0.175),
    ("a100_80", "bfloat16", 1, 256, 16.0, (26.2, None, None, None, None), 9791, 2.39, 0.00363, 0.137),
    ("h100", "bfloat16", 1, 256, 16.0, (14.3, 10.7, 0.8, 2.0, 0.7), 17_846, 4.36, 0.00199, 0.079),
    ("h100", "bfloat16", 2, 256, 16.0, (14.3, 10.7, 0.8, 2.0, 0.7), 17_846, 4.36, 0.00398, 0.079),
    ("h100", "fp8", 2, 256, 16.0, (8.0, 5.3, 0.8, 1.0, 0.7), 31_892, 7.8, 0.00223, 0.140),
)


def is_printed(value: float, printed: float) -> bool:
    """Whether a value is within 1 % of a printed one, or rounds to it: the table prints 0.1 ms for 0.05."""
    digits = len(str(printed).partition(".")[2])
    return abs(value / printed - 1) < 0.01 or abs(value - printed) <= 0.5001 * 10**-digits


@pytest.mark.parametrize("row", AUDIT_TABLE, ids=lambda row: "-".join(map(str, row[:4])))
def test_the_audits_decode_table(row):
    chip, weights, price, rows, distinct, stage, cluster, user, dollars, utilization = row
    server = Server(REFERENCE, chip_named(chip), ServeLayout(tensor=8, stage=16, weights=weights), AUDIT)
    found = serve(server, rows, 2048, price)
    step = found.stage_time
    mine = (step.seconds, step.weights_seconds, step.cache_seconds, step.flops_seconds, step.exchange_seconds)
    assert is_printed(expert_load.distinct_experts(16, 2, rows), distinct)
    for seconds, printed in zip(mine, stage, strict=True):
        assert printed is None or is_printed(1e3 * seconds, printed)
    assert found.tokens_per_second == pytest.approx(cluster, rel=0.01)
    assert is_printed(found.user_tokens_per_second, user)
    assert found.dollars_per_1k_tokens == pytest.approx(dollars, rel=0.01)
    assert is_printed(found.model_flops_utilization, utilization)
    assert found.sequences == 16 * rows


def test_distinct_experts_of_the_audit():
    expected = {1: 2, 2: 3.75, 4: 6.62, 8: 10.5, 16: 14.1, 32: 15.8, 64: 16.0}
    for tokens, printed in expected.items():
        assert expert_load.distinct_experts(16, 2, tokens) == pytest.approx(printed, abs=0.051)
    uniform = expert_load.distinct_experts(16, 2, 8, [2 / 16] * 16)
    assert uniform == pytest.approx(expert_load.distinct_experts(16, 2, 8))
    assert expert_load.distinct_experts(16, 2, 8, [0.5, *[1.5 / 15] * 15]) < uniform


def test_the_fullest_expert_of_the_audit():
    assert expert_load.max_expert_rows(16, 2, 256) == pytest.approx(45, abs=0.5)
    assert expert_load.max_expert_rows(16, 2, 4096) / 512 == pytest.approx(1.10, abs=0.005)
    assert expert_load.group_imbalance(16, 2, 256, 16) == pytest.approx(1.42, abs=0.005)
    assert expert_load.group_imbalance(16, 2, 256, 1) == 1
    assert 7 < expert_load.group_imbalance(16, 2, 1, 16) <= 8  # one token: a group gets one row, 2 / 16 on average
    assert expert_load.group_distinct(2, 16, 16) == pytest.approx(1, abs=0.05)


def test_critical_batches_of_the_audit():
    dense = {"a100_40": 201, "a100_80": 153, "h100": 295, "h200": 206, "b200": 281}
    dense |= {"tpu_v5e": 240, "tpu_v5p": 166, "tpu_v6e": 560, "tpu_7x": 313}
    for chip, rows in dense.items():
        assert critical_rows(chip_named(chip)) == pytest.approx(rows, abs=0.6)
        assert critical_rows(chip_named(chip), "int8") == pytest.approx(rows / 2, abs=0.6)
    assert critical_rows(chip_named("a100_40"), shape=REFERENCE) == pytest.approx(1605, abs=1)
    assert critical_rows(H100, shape=REFERENCE) == pytest.approx(2363, abs=1)


def test_a_dense_step_by_hand():
    """One layer of one head, no latencies, all efficiencies 1: every term is a short product."""
    shape = dataclasses.replace(shape_named("llama2_7b"), num_layers=1, vocab_size=1)
    exact = Efficiency(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0)
    step = decode_step(Server(shape, H100, ServeLayout(), exact), rows=3, context=100)
    matrices = 4 * 4096**2 + 3 * 4096 * 11_008 + 4096
    assert step.weights_seconds == pytest.approx(2 * (matrices + 3 * 4096) / 3.35e12)
    assert step.cache_seconds == pytest.approx(3 * 100 * 2 * 4096 * 2 / 3.35e12)
    assert step.flops_seconds == pytest.approx(3 * (2 * matrices + 4 * 4096 * 100) / 989.4e12)
    assert step.exchange_seconds == step.hop_seconds == 0


def test_verifying_several_tokens_reads_a_cache_once():
    server = Server(MIXTRAL, H100)
    one, four = decode_step(server, 8, 4000), decode_step(server, 8, 4000, tokens_per_row=4)
    assert four.cache_seconds == one.cache_seconds
    assert four.flops_seconds == pytest.approx(4 * one.flops_seconds)
    assert decode_step(server, 32, 4000).weights_seconds == four.weights_seconds


def test_a_window_bounds_what_decode_reads():
    windowed = dataclasses.replace(MIXTRAL, window=1000)
    short, long = (decode_step(Server(windowed, H100), 8, context) for context in (1000, 8000))
    assert short == long
    assert decode_step(Server(windowed, H100), 8, 500).cache_seconds == short.cache_seconds / 2


def test_chunks_of_a_prompt_do_the_work_of_the_whole():
    """The causal triangle is the sum of its strips; weights and latencies are paid for each chunk."""
    exact = Efficiency(collective_seconds=0.0)
    server = Server(MIXTRAL, H100, ServeLayout(tensor=2), exact)
    whole = prefill_step(server, 1, 2048)
    chunks = [prefill_step(server, 1, 512, before) for before in (0, 512, 1024, 1536)]
    assert sum(chunk.flops_seconds for chunk in chunks) == pytest.approx(whole.flops_seconds)
    assert sum(chunk.exchange_seconds for chunk in chunks) == pytest.approx(whole.exchange_seconds)
    assert chunks[0].cache_seconds == 0 < chunks[1].cache_seconds < chunks[3].cache_seconds


@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("expert", [1, 8])
@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_no_step_is_slower_on_a_better_chip(tensor, expert, rows):
    layout = ServeLayout(tensor, 2, expert)
    usual = decode_step(Server(MIXTRAL, H100, layout), rows, 2048).seconds
    network = dataclasses.replace(H100.network, domain_bytes_per_second=9e11, outside_bytes_per_second=1e11)
    better = {"bandwidth_bytes_per_second": 7e12, "peak_flops": 2e15, "network": network}
    for name, value in better.items():
        chip = dataclasses.replace(H100, **{name: value})
        seconds = decode_step(Server(MIXTRAL, chip, layout), rows, 2048).seconds
        assert seconds < usual or (name == "network" and seconds <= usual)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("cache", ["heads", "batch"])
def test_more_kv_heads_are_never_cheaper(kv_heads, cache):
    few, many = (dataclasses.replace(MIXTRAL, num_kv_heads=heads) for heads in (kv_heads, 2 * kv_heads))
    layout = ServeLayout(8, 2, cache=cache)
    costs = [serve(Server(shape, H100, layout), 64, 4096, 2.0).dollars_per_1k_tokens for shape in (few, many)]
    assert costs[0] < costs[1]
    # More context and more rows take longer, more stages or expert groups do not.
    server = Server(few, H100, layout)
    steps = [decode_step(server, rows, context).seconds for rows, context in ((64, 4096), (64, 8192), (128, 8192))]
    assert steps == sorted(steps)


def test_one_dimensional_volume_does_not_fall_with_chips_and_two_dimensional_does():
    """Pope et al., section 3.2: 2 b d a against 8 b d a / sqrt(n); from 16 chips on the second is less."""
    shape, chip = shape_named("palm_540b"), dataclasses.replace(chip_named("h100"))
    wide = dataclasses.replace(chip, network=dataclasses.replace(chip.network, domain_chips=4096))
    plain = dataclasses.replace(shape, gated=False)

    def volume(tensor: int, feed_forward: str) -> float:
        layout = ServeLayout(tensor, feed_forward=feed_forward)
        return tensor_exchange(plain, wide, layout, 512).domain_seconds * wide.network.domain_bytes_per_second

    limit = 2 * 512 * 18_432 * 2
    for tensor in (64, 256, 1024):
        assert volume(tensor, "stationary_1d") == pytest.approx(limit, rel=2 / tensor)
        root = math.sqrt(tensor)
        two = volume(tensor, "stationary_2d")
        x, y = root / 2, 2 * root
        assert two == pytest.approx(2 * limit / root * ((1 - 1 / x) + (1 - 1 / y)))
        assert two < volume(tensor, "stationary_1d")


def test_weights_are_gathered_once_there_are_more_tokens_than_hidden_values():
    """The same, section 3.2.3: over no chips at a few tokens, over all of them from about F tokens a chip on."""
    shape, chip = shape_named("palm_540b"), chip_named("tpu_v4")

    def seconds(tokens: int, kind: str) -> float:
        return tensor_exchange(shape, chip, ServeLayout(64, feed_forward=kind), tokens).domain_seconds

    assert seconds(256, "gathered") == pytest.approx(seconds(256, "stationary_1d"))
    assert seconds(10**6, "gathered") < min(seconds(10**6, kind) for kind in ("stationary_1d", "stationary_2d"))
    layer = 3 * 18_432 * 73_728 + 2 * 18_432 * 48 * 256 + 2 * 18_432 * 256 + 18_432
    assert seconds(10**8, "gathered") == pytest.approx(2 * layer * 63 / 64 / 270e9, rel=1e-4)


def test_rows_go_to_experts_over_the_slow_network_once_for_each_domain():
    shape, chip = shape_named("deepseek_v3"), chip_named("h800")
    inside = expert_exchange(shape, chip, ServeLayout(expert=8, weights="fp8"), 80)
    assert inside.outside_seconds == 0
    assert inside.domain_seconds == pytest.approx(10 * 8 * 7 / 8 * 7168 * 3 / 200e9)
    limited = expert_exchange(shape, chip, ServeLayout(expert=64, weights="fp8"), 640, nodes_per_token=4)
    assert limited.outside_seconds == pytest.approx(10 * 4 * 7 / 8 * 7168 * 3 / 50e9)
    free = expert_exchange(shape, chip, ServeLayout(expert=64, weights="fp8"), 640)
    assert free.outside_seconds > limited.outside_seconds


def test_the_fullest_expert_gets_no_more_rows_than_there_are_tokens():
    assert expert_load.max_expert_rows(4, 2, 1) == 1
    assert expert_load.group_imbalance(8, 4, 1, 8) == 2  # one token's four choices on four of eight groups


def test_imbalance_slows_the_experts_alone():
    server = Server(MIXTRAL, H100, ServeLayout(expert=8))
    even, uneven = (decode_step(server, 64, 1, imbalance=load).flops_seconds for load in (1.0, 2.0))
    experts = 64 * server.sizes.expert_flops / (8 * H100.peak_flops * Efficiency().matmul)
    assert uneven - even == pytest.approx(experts)


def test_a_window_bounds_a_prompt_too():
    windowed = dataclasses.replace(shape_named("llama3_8b"), window=512)
    short, long = (prefill_step(Server(windowed, H100), 1, tokens).flops_seconds / tokens for tokens in (4096, 16_384))
    assert short == pytest.approx(long)


def test_the_core_of_a_latent():
    """DeepSeek scores and weights its latents: 61 layers, 128 heads, 2 (2 x 512 + 64) FLOPs a key."""
    assert core_flops_per_key(shape_named("deepseek_v3")) == 2 * 61 * 128 * (2 * 512 + 64)


def test_critical_rows_of_formats():
    """Twice the peak, half the bytes: as many as in 16 bits; in int8 half as many."""
    plain = critical_rows(H100)
    assert critical_rows(H100, "fp8") == pytest.approx(plain, rel=0.01) and critical_rows(H100, "int8") == plain / 2


def test_exchanges_hide_under_the_computing_of_all_stages():
    """What does not hide is left; with overlap 1 and slow products nothing is."""

    def exchange(overlap, **changes):
        efficiency = Efficiency(expert_overlap=overlap, **changes)
        server = Server(MIXTRAL, H100, ServeLayout(stage=4, expert=8), efficiency)
        step = decode_step(server, 4096, 1)
        return step, step.exchange_seconds

    (_, whole), (step, left) = exchange(0.0), exchange(0.001)
    computing = step.weights_seconds + step.flops_seconds
    assert whole - left == pytest.approx(0.001 * computing)


def test_a_hop_carries_the_rows_of_its_group():
    server = Server(MIXTRAL, H100, ServeLayout(stage=4, expert=8))
    step = decode_step(server, 64, 1)
    sent = 64 / 8 * MIXTRAL.model_dim * 2
    assert step.hop_seconds == pytest.approx(Efficiency().hop_seconds + sent / H100.network.outside_bytes_per_second)


def test_layers_without_experts_exchange_nothing():
    """DeepSeek's first three of 61."""
    deepseek = shape_named("deepseek_v3")
    layout, efficiency = ServeLayout(expert=8), Efficiency()
    found = decode_step(Server(deepseek, H100, layout, efficiency), 64, 1).exchange_seconds
    one = expert_exchange(deepseek, H100, layout, 64, None).seconds(efficiency)
    assert found == pytest.approx(58 * one + 61 * tensor_exchange(deepseek, H100, layout, 64).seconds(efficiency))


def test_the_network_between_servers_reaches_less():
    assert (Efficiency().link, Efficiency().outside_link) == (0.75, 0.55)


def test_a_window_does_not_make_contexts_endless():
    windowed = dataclasses.replace(MIXTRAL, window=512)
    assert max_context(windowed, ServeLayout(), 8, 1e9) == max_context(MIXTRAL, ServeLayout(), 8, 1e9)
