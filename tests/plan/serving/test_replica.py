"""One replica, step by step: what a step costs, what it brings, stages that work on one lane at a time."""

import collections
import dataclasses

import numpy as np
import pytest

from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.plan.serving.cluster import Cluster, simulate
from gpt4moe.plan.serving.layout import Efficiency, ServeLayout, cache_bytes_per_chip, weight_bytes_per_chip
from gpt4moe.plan.serving.replica import Policy, Replica
from gpt4moe.plan.serving.rooflines import Server, decode_step, prefill_step
from gpt4moe.plan.serving.traffic import Request

MIXTRAL, H100 = shape_named("mixtral_8x7b"), chip_named("h100")
ONE_STAGE = Server(MIXTRAL, H100, ServeLayout(2))


def step(replica: Replica, waiting: list[Request] = ()) -> tuple[float, object]:
    """Seconds of the next step of the first lane of a replica that begins it at 0, and what it brought."""
    lane, replica._free[0] = replica.lanes[0], 0.0
    replica.admit(lane, collections.deque(waiting))
    seconds = replica.start(lane, 0.0)
    return seconds, replica.finish(lane, seconds)


def test_a_prompt_of_700_joins_a_row_that_decodes():
    """Two chunks, then both rows decode. The weights of a step are read once, for whoever needs more of them."""
    replica = Replica(ONE_STAGE, Policy(rows=4), cache_tokens=10**6)
    seconds, brought = step(replica, [Request(0.0, 100, 5)])
    assert seconds == pytest.approx(prefill_step(ONE_STAGE, 1, 100).seconds)
    assert (brought.tokens, brought.repeated, len(brought.first)) == (1, 0, 1)
    for chunk, before, waiting in ((512, 0, [Request(0.0, 700, 2)]), (188, 512, [])):
        context = 101 + (before > 0)
        seconds, brought = step(replica, waiting)
        decode, prefill = decode_step(ONE_STAGE, 1, context), prefill_step(ONE_STAGE, 1, chunk, before)
        spared = min(decode.weights_seconds, prefill.weights_seconds)
        assert seconds == pytest.approx(decode.seconds + prefill.seconds - spared, rel=1e-9)
        assert (brought.tokens, brought.repeated) == (1 + (before > 0), 1)
    seconds, brought = step(replica)
    assert seconds == pytest.approx(decode_step(ONE_STAGE, 2, (103 + 701) / 2).seconds, rel=1e-9)
    assert [request.prompt_tokens for request in brought.ended] == [700]
    assert replica.kept_tokens == 105
    assert [request.prompt_tokens for request in step(replica)[1].ended] == [100]
    assert (replica.kept_tokens, replica.lanes[0].cached_tokens, replica.rows) == (0, 0, 0)


def test_a_static_batch_computes_the_rows_that_ended():
    replica = Replica(ONE_STAGE, Policy(2, "static", "elsewhere"), cache_tokens=10**6)
    seconds, _ = step(replica, [Request(0.0, 50, 1), Request(0.0, 50, 3), Request(0.0, 50, 9)])
    assert seconds == pytest.approx(decode_step(ONE_STAGE, 2, 50).seconds)
    for length in (51, 52):
        assert replica.rows == 1
        seconds, _ = step(replica, [Request(0.0, 50, 9)])
        assert seconds == pytest.approx(decode_step(ONE_STAGE, 2, length / 2).seconds)
    assert replica.rows == 0


def test_a_stage_works_on_one_lane_at_a_time():
    server = Server(MIXTRAL, H100, ServeLayout(2, 2))
    replica = Replica(server, Policy(1, prefill="elsewhere"), cache_tokens=10**6)
    queue = collections.deque(Request(0.0, 100, 5) for _ in range(2))
    ends = []
    for lane in replica.lanes:
        replica.admit(lane, queue)
        ends.append(replica.start(lane, 0.0))
    stage = decode_step(server, 1, 100).seconds
    assert ends == pytest.approx([2 * stage, 3 * stage])
    assert replica.busy_seconds == pytest.approx(4 * stage)


def test_room_that_one_lane_leaves_another_takes():
    """A cache of 1,000 tokens, two lanes of one row: A (900), then B (600) in A's lane and C (300) in the other."""
    server = Server(MIXTRAL, H100, ServeLayout(2, 2))
    needed = weight_bytes_per_chip(MIXTRAL, server.layout) + cache_bytes_per_chip(MIXTRAL, server.layout, 1, 1000.5)
    small = dataclasses.replace(H100, memory_bytes=needed / Efficiency().usable_memory)
    requests = [Request(0.0, 880, 20), Request(0.0, 580, 20), Request(0.0, 295, 5)]
    cluster = Cluster(dataclasses.replace(server, chip=small), Policy(1, prefill="elsewhere"))
    found = simulate(cluster, requests, 1.0, np.random.default_rng(0))
    step_seconds = 2 * decode_step(server, 1, 300).seconds
    # All three got their first token by the time A had ended and one more step was over: C did not wait for B.
    assert found.first_token_seconds[99] == pytest.approx(21 * step_seconds, rel=0.05)
    assert found.completed == 3
