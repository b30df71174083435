"""The pipeline schedule: a pass followed by hand, what waits for what at random, the bubble against a simulation."""

import json
import random
from fractions import Fraction

import pytest

from benchmarks import pipeline_bubble
from gpt4moe.accounting import pipeline

DRAW = random.Random(0)
RANDOM_PASSES = [
    (stages, stages + DRAW.randrange(0, 9), virtual) for virtual in (1, 2, 5) for stages in DRAW.sample(range(1, 12), 4)
]


def units(stages: int, microbatches: int, virtual: int) -> dict[tuple[int, int], int]:
    """The tick at which every (virtual stage, microbatch) is worked on."""
    done = {}
    for tick in range(pipeline.num_ticks(stages, microbatches, virtual)):
        for stage in range(stages):
            work = pipeline.work_at(tick, stage, microbatches, virtual)
            if work.is_busy:
                unit = (work.chunk * stages + stage, work.microbatch)
                assert unit not in done
                done[unit] = tick
    return done


def test_two_stages_with_two_chunks_each_followed_by_hand():
    """Three microbatches a, b, c go round twice; the second stage is one tick behind and idle in the first tick."""
    words = []
    for stage in range(2):
        work = [pipeline.work_at(tick, stage, 3, 2) for tick in range(7)]
        words.append([f"{'abc'[item.microbatch]}{item.chunk}" if item.is_busy else "--" for item in work])
    assert words[0] == ["a0", "b0", "c0", "a1", "b1", "c1", "--"]
    assert words[1] == ["--", "a0", "b0", "c0", "a1", "b1", "c1"]
    assert pipeline.num_ticks(2, 3, 2) == 7
    assert pipeline.idle_fraction(2, 3, 2) == Fraction(2, 14)


@pytest.mark.parametrize(("stages", "microbatches", "virtual"), RANDOM_PASSES)
def test_every_unit_is_worked_on_once_and_after_the_one_it_needs(stages, microbatches, virtual):
    ticks = units(stages, microbatches, virtual)
    assert len(ticks) == stages * virtual * microbatches
    for (virtual_stage, microbatch), tick in ticks.items():
        assert virtual_stage == 0 or ticks[virtual_stage - 1, microbatch] < tick


@pytest.mark.parametrize(("stages", "microbatches", "virtual"), RANDOM_PASSES)
def test_idle_stage_ticks_are_the_formula(stages, microbatches, virtual):
    slots = stages * pipeline.num_ticks(stages, microbatches, virtual)
    idle = 1 - Fraction(len(units(stages, microbatches, virtual)), slots)
    assert pipeline.idle_fraction(stages, microbatches, virtual) == idle
    equal = (3,) * (stages * virtual)
    assert pipeline.uneven_idle_fraction(equal, stages, microbatches) == idle


def test_a_short_stage_waits_for_the_long_one():
    """One and two layers, four microbatches: 5 ticks of 2 slots on 2 stages, in which 4 * 3 layers are passed."""
    assert pipeline.uneven_idle_fraction((1, 2), 2, 4) == 1 - Fraction(12, 20)


def test_the_simulation_followed_by_hand():
    """Two stages, two microbatches: forward ends at 3, backward takes 2 a unit and so 6; 2 * 2 * 3 of 18 are work."""
    assert pipeline_bubble.run((1, 1), 2, 2) == 3
    assert pipeline_bubble.run((2, 2), 2, 2) == 6
    assert pipeline_bubble.simulate((1, 1), 2, 2) == Fraction(6, 18)


@pytest.mark.parametrize(("stages", "microbatches", "virtual"), RANDOM_PASSES)
def test_the_simulation_agrees_exactly_for_equal_stages(stages, microbatches, virtual):
    simulated = pipeline_bubble.simulate((2,) * (stages * virtual), stages, microbatches)
    assert simulated == pipeline.idle_fraction(stages, microbatches, virtual)


def test_the_benchmark_prints_one_document(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pipeline_bubble.py", "--json"])
    pipeline_bubble.main()
    document = json.loads(capsys.readouterr().out)
    assert {row["difference"] for row in document["equal"]} == {0.0}
    assert all(row["simulated"] < row["formula"] for row in document["uneven"])
    reference = [row for row in document["equal"] if (row["stages"], row["virtual_stages"]) == (15, 1)]
    assert reference[0]["formula"] == pytest.approx(14 / 29)
