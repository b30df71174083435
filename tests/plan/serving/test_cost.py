"""Dollars and frontiers of serving: nothing on a frontier is beaten, more chips or memory never cost more."""

import dataclasses
import itertools

import pytest

from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.config.check import CallerError
from gpt4moe.plan.serving.cost import (
    LEAST_PROMPT_GAIN,
    Service,
    blended_dollars_per_1k_tokens,
    day_utilization,
    disaggregation_ratio,
    dollars_per_1k_tokens,
    frontier,
    prefill_tokens_per_second,
    prompts_at_once,
    rows_at_speed,
    serve,
)
from gpt4moe.plan.serving.frontier import Question, layouts, sweep
from gpt4moe.plan.serving.layout import ServeLayout, cache_bytes_per_chip, weight_bytes_per_chip
from gpt4moe.plan.serving.rooflines import Server, decode_step

MIXTRAL, H100 = shape_named("mixtral_8x7b"), chip_named("h100")
QUESTION = Question(MIXTRAL, H100, 16, 2048, 3.0, weights=("bfloat16", "fp8"))
FOUND = sweep(QUESTION)


def measures(service: Service) -> tuple[float, float, int]:
    """All three the less the better."""
    return -service.user_tokens_per_second, service.dollars_per_1k_tokens, service.chips


def test_the_frontier_is_all_that_nothing_beats():
    kept = {id(service) for service in FOUND.frontier}
    for service in FOUND.services:
        mine = measures(service)
        beaten = any(
            all(a <= b for a, b in zip(measures(other), mine, strict=True)) and measures(other) != mine
            for other in FOUND.services
        )
        assert (id(service) in kept) != beaten or (not beaten and mine in map(measures, FOUND.frontier))
    assert len(FOUND.frontier) > 5
    assert all(service.fits and service.chips <= 16 for service in FOUND.services)


def test_the_frontier_does_not_depend_on_order():
    assert list(map(measures, frontier(reversed(FOUND.services)))) == list(map(measures, FOUND.frontier))


@pytest.mark.parametrize("speed", [0.0, 20.0, 100.0])
def test_more_chips_memory_or_bandwidth_never_cost_more(speed):
    dollars = [
        sweep(dataclasses.replace(QUESTION, **changes)).cheapest(speed).dollars_per_1k_tokens
        for changes in (
            {"num_chips": 4},
            {},
            {"num_chips": 64},
            {"num_chips": 64, "chip": dataclasses.replace(H100, memory_bytes=160e9)},
            {"num_chips": 64, "chip": dataclasses.replace(H100, memory_bytes=160e9, bandwidth_bytes_per_second=7e12)},
        )
    ]
    assert dollars == sorted(dollars, reverse=True)
    assert dollars[-1] < dollars[0]


def test_more_kv_heads_never_cheaper_on_the_whole_frontier():
    many = sweep(dataclasses.replace(QUESTION, shape=dataclasses.replace(MIXTRAL, num_kv_heads=32)))
    for speed in (0.0, 10.0, 50.0, 100.0):
        assert FOUND.cheapest(speed).dollars_per_1k_tokens < many.cheapest(speed).dollars_per_1k_tokens


def test_a_days_utilisation_and_dollars():
    """DeepSeek's day had 226.75 nodes busy of 278 at its peak."""
    half_day = [278.0] * 12 + [2 * 226.75 - 278] * 12
    assert day_utilization(half_day) == pytest.approx(0.82, abs=0.005)
    assert dollars_per_1k_tokens(128, 1.0, 8001) == pytest.approx(0.00444, rel=0.01)
    assert dollars_per_1k_tokens(128, 1.0, 8001, 0.5) == pytest.approx(2 * dollars_per_1k_tokens(128, 1.0, 8001))
    assert blended_dollars_per_1k_tokens(1.0, 4.0, 300, 100) == pytest.approx(1.75)


def test_readers_and_writers_in_the_ratio_wait_for_nobody():
    server = Server(MIXTRAL, H100, ServeLayout(2))
    read, write = prefill_tokens_per_second(server, 1, 512) / 2, serve(server, 64, 1024, 3.0).tokens_per_second / 2
    ratio = disaggregation_ratio(512, 128, read, write)
    assert ratio * read / 512 == pytest.approx(1 * write / 128)  # requests a second of either side
    assert disaggregation_ratio(1, 1, 73_700, 14_800) == pytest.approx(0.2008, rel=1e-3)


def test_prompts_are_read_together_as_long_as_that_pays():
    """A group of 32 chips has 32 tokens of a prompt for each; long prompts fill it alone, and memory bounds them."""
    server = Server(shape_named("deepseek_v3"), chip_named("h800"), ServeLayout(expert=32, weights="fp8"))
    together = prompts_at_once(server, 1024)
    alone, at_once, twice = (prefill_tokens_per_second(server, many, 1024) for many in (1, together, 2 * together))
    assert together > 8 and at_once > 1.5 * alone and at_once * (1 + LEAST_PROMPT_GAIN) > twice
    assert prompts_at_once(server, 65_536) < together
    held = weight_bytes_per_chip(server.shape, server.layout) + cache_bytes_per_chip(
        server.shape, server.layout, 5, 1024
    )
    tight = dataclasses.replace(server.chip, memory_bytes=held / server.efficiency.usable_memory)
    assert prompts_at_once(dataclasses.replace(server, chip=tight), 1024) == 4  # five have room


@pytest.mark.parametrize("speed", [5.0, 20.0, 60.0])
def test_rows_at_a_speed_have_that_speed(speed):
    server = Server(MIXTRAL, H100, ServeLayout(2, 2))
    rows = rows_at_speed(server, 2048, speed)
    assert 1 / (2 * decode_step(server, rows, 2048).seconds) == pytest.approx(speed, rel=1e-6)
    assert rows_at_speed(server, 2048, 1e6) == 0


def test_every_layout_of_a_sweep_is_one_of_its_axes():
    sizes = {(item.tensor, item.stage, item.expert) for item in layouts(QUESTION)}
    expected = {
        (tensor, stage, expert)
        for tensor, stage, expert in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8))
        if tensor * stage * expert <= 16
    }
    assert sizes == expected
    assert {item.cache for item in layouts(QUESTION)} == {"heads"}  # eight heads for up to eight chips
    one_head = dataclasses.replace(QUESTION, shape=dataclasses.replace(MIXTRAL, num_kv_heads=1))
    assert {item.cache for item in layouts(one_head)} == {"heads", "batch"}
    torus = dataclasses.replace(QUESTION, chip=chip_named("tpu_v5p"), weights=("int8",))
    assert {item.feed_forward for item in layouts(torus) if item.tensor == 16} == {"stationary_1d", "stationary_2d"}
    fixed = dataclasses.replace(QUESTION, tensor=2, stage=3, expert=1, cache="batch", rows=8)
    assert [(item.tensor, item.stage, item.cache) for item in layouts(fixed)] == [(2, 3, "batch")] * 2
    assert {service.rows for service in sweep(fixed).services} == {8}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dollars_per_hour": -1.0}, "price=-1.0 must be a number of at least 0"),
        ({"num_chips": 0}, "num_chips=0 must be an integer of at least 1"),
        ({"num_chips": 1, "weights": ("bfloat16",)}, "num_chips=1 hold no layout, the weights alone by 19.8 GB a chip"),
        ({"tensor": 8, "stage": 4}, "num_chips=16 must be at least tensor x stage x expert (32)"),
        ({"utilization": 0.0}, "utilization=0.0 must be a number above 0"),
        ({"context": 10**9}, "num_chips=16 hold no layout"),
    ],
)
def test_questions_without_an_answer(changes, says):
    with pytest.raises(CallerError) as caught:
        sweep(dataclasses.replace(QUESTION, **changes))
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
