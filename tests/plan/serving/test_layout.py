"""What a chip of a served model holds: limits of the reference's cache, replication, and layouts that cannot be."""

import dataclasses

import pytest

from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.accounting.shape import shape_of
from gpt4moe.config.check import CallerError
from gpt4moe.configure import build_model
from gpt4moe.plan.serving.layout import (
    Efficiency,
    ServeLayout,
    cache_bytes_per_chip,
    cache_share,
    max_context,
    max_sequences,
    token_cache_bytes,
    total_weight_bytes,
    weight_bytes_per_chip,
)
from gpt4moe.plan.serving.rooflines import Server

REFERENCE = shape_of(build_model(["gin_configs/model/gpt4_1p8t.gin"]))
A100 = chip_named("a100_40")


@pytest.mark.parametrize(
    ("context", "cache", "sequences"),
    [(8192, "batch", 2076), (8192, "heads", 260), (32_768, "batch", 519), (32_768, "heads", 65)],
)
def test_the_references_limits(context, cache, sequences):
    """128 A100 of 40 GB leave 1.05 TB: eight times the rows where the one head is not copied to eight chips."""
    found = max_sequences(REFERENCE, A100, ServeLayout(8, 16, cache=cache), context)
    assert found == pytest.approx(sequences, abs=0.7)


def test_cache_of_the_reference():
    assert token_cache_bytes(REFERENCE) == 61_440
    assert 8192 * token_cache_bytes(REFERENCE) == pytest.approx(0.503e9, rel=1e-3)
    multi_head = dataclasses.replace(REFERENCE, num_kv_heads=168)
    assert 8192 * token_cache_bytes(multi_head) == pytest.approx(84.6e9, rel=1e-3)


def test_shares_of_the_cache():
    """Whole heads on every chip: 8 over 8 share, 8 over 16 are there twice, 48 over 64 take the room of 64."""
    shape = dataclasses.replace(REFERENCE, num_kv_heads=8)
    assert [cache_share(shape, ServeLayout(tensor)) for tensor in (1, 4, 8, 16)] == [1, 1 / 4, 1 / 8, 1 / 8]
    some = dataclasses.replace(shape, num_kv_heads=48)
    assert [cache_share(some, ServeLayout(tensor)) for tensor in (32, 64)] == [2 / 48, 1 / 48]
    assert cache_share(shape, ServeLayout(16, cache="batch")) == 1 / 16
    assert cache_share(shape_named("deepseek_v3"), ServeLayout(8)) == 1
    palm = shape_named("palm_540b")  # one key head
    assert [cache_share(palm, ServeLayout(64, cache=cache)) for cache in ("heads", "batch")] == [1, 1 / 64]


def test_a_replicas_weights_are_there_once_but_for_what_every_group_holds():
    layout = ServeLayout(8, 16)
    assert 128 * weight_bytes_per_chip(REFERENCE, layout) == pytest.approx(total_weight_bytes(REFERENCE, layout))
    grouped = ServeLayout(8, 1, 16)
    extra = 128 * weight_bytes_per_chip(REFERENCE, grouped) - total_weight_bytes(REFERENCE, grouped)
    assert extra / 2 == pytest.approx(15 * 56.92e9, rel=1e-3)  # fifteen more copies of all that is no expert
    halved = weight_bytes_per_chip(REFERENCE, dataclasses.replace(layout, weights="int8"))
    assert halved == weight_bytes_per_chip(REFERENCE, layout) / 2


@pytest.mark.parametrize("layout", [ServeLayout(8, 16), ServeLayout(8, 1, 16), ServeLayout(4, 30, cache="batch")])
def test_more_memory_and_more_chips_never_hold_fewer_rows(layout):
    large = dataclasses.replace(A100, memory_bytes=80e9)
    assert max_sequences(REFERENCE, large, layout, 2048) > max_sequences(REFERENCE, A100, layout, 2048)
    doubled = dataclasses.replace(layout, stage=2 * layout.stage)
    assert max_sequences(REFERENCE, large, doubled, 2048) > max_sequences(REFERENCE, large, layout, 2048)
    more = dataclasses.replace(REFERENCE, num_kv_heads=2)
    assert max_sequences(more, large, layout, 2048) < max_sequences(REFERENCE, large, layout, 2048)


def test_expert_groups_divide_the_rows():
    one, four = (cache_bytes_per_chip(REFERENCE, ServeLayout(8, 1, expert), 64, 2048) for expert in (1, 4))
    assert one == 4 * four == 64 * 2048 * 61_440


def test_context_and_rows_share_one_memory():
    layout = ServeLayout(8, 16)
    context = max_context(REFERENCE, layout, 100, 5e9)
    free = Efficiency(usable_memory=(5e9 + weight_bytes_per_chip(REFERENCE, layout)) / 40e9)
    assert max_sequences(REFERENCE, A100, layout, context, free) == pytest.approx(100)


@pytest.mark.parametrize(
    ("changes", "chip", "says"),
    [
        ({"tensor": 7}, "h100", "tensor=7 must divide model_dim"),
        ({"expert": 3}, "h100", "expert=3 must divide num_experts (8); choose a divisor"),
        ({"stage": 33}, "h100", "stage=33 must be at most num_layers (32)"),
        ({"weights": "fp8"}, "a100_80", "weights='fp8' is not what a100_80 computes in; choose int8 or another chip"),
        ({"tensor": 2}, "l4", "chips of a replica=2 l4, whose network is not known"),
        ({"weights": "fp4"}, "h100", "weights='fp4' must be in ('bfloat16', 'int8', 'fp8')"),
        ({"cache": "rows"}, "h100", "cache='rows' must be in ('heads', 'batch')"),
        ({"stage": 0}, "h100", "stage=0 must be an integer of at least 1"),
        ({"feed_forward": "moving"}, "h100", "feed_forward='moving' must be in"),
    ],
)
def test_layouts_that_cannot_be(changes, chip, says):
    with pytest.raises(CallerError) as caught:
        Server(shape_named("mixtral_8x7b"), chip_named(chip), ServeLayout(**changes))
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["matmul", "memory", "link", "outside_link", "usable_memory"])
@pytest.mark.parametrize("value", [0.0, 1.1, float("nan")])
def test_shares_that_are_none(field, value):
    with pytest.raises(CallerError, match=f"efficiency {field}="):
        Efficiency(**{field: value})
