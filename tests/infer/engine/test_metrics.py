"""Counts of steps and of experts, and the times of events."""

import numpy as np

from gpt4moe.infer.engine.metrics import Record, Times


def test_distinct_experts_are_counted_in_decode_steps_alone_and_loads_in_all():
    record = Record(num_layers=2, num_experts=4)
    assert record.snapshot()["distinct_experts_L"].tolist() == [0, 0]
    prefilled_LE, first_LE, last_LE = np.array(
        [[[9, 9, 9, 9]] * 2, [[5, 0, 0, 1], [2, 2, 1, 1]], [[0, 6, 0, 0], [3, 3, 0, 0]]]
    )
    record.add_decode(first_LE)
    record.add_prefill(prefilled_LE)
    record.add_decode(last_LE)
    told = record.snapshot()
    assert told["last_distinct_experts_L"].tolist() == [1, 2]
    assert told["distinct_experts_L"].tolist() == [1.5, 3]  # 2 and 1 in the one layer, 4 and 2 in the other
    assert told["expert_load_LE"].tolist() == [[14, 15, 9, 10], [14, 14, 10, 10]]
    assert (told["prefill_steps"], told["decode_steps"]) == (1, 2)


def test_times_are_counted_up_to_their_bounds_and_beyond_the_last():
    times = Times((0.1, 1.0))
    for seconds in (0.0, 0.1, 0.5, 1.0, 7.0):
        times.add(seconds)
    told = times.snapshot()
    assert (told.bounds, told.counts, told.count) == ((0.1, 1.0), (2, 2, 1), 5)
    assert abs(told.total_seconds - 8.6) < 1e-9
