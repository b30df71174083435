"""Goodput: the formula at published rates, and against runs in which failures are drawn one by one."""

import dataclasses

import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.plan.money import goodput
from gpt4moe.plan.money.failure_simulation import Job, expected_events, mean_goodput, simulate, simulate_many
from gpt4moe.plan.money.goodput import Reliability

CHIP_HOURS = goodput.observed_chip_mtbf_hours(419, 16_384, 54)
DAY = 86_400


def of_chips(chips, blocking, restart, rate=1.0, **more):
    return Reliability(goodput.job_mtbf_seconds(CHIP_HOURS / rate, chips), blocking, restart, **more)


@pytest.mark.parametrize(
    ("chips", "rate", "blocking", "restart", "interval", "useful"),
    [(16_384, 1, 30, 600, 817, 0.88), (25_000, 1, 60, 600, 936, 0.81), (25_000, 2, 120, 900, 936, 0.63)],
)
def test_goodput_at_the_rate_of_llama3(chips, rate, blocking, restart, interval, useful):
    reliability = of_chips(chips, blocking, restart, rate)
    assert goodput.young_interval_seconds(reliability) == pytest.approx(interval, abs=1)
    assert goodput.goodput(reliability) == pytest.approx(useful, abs=0.005)


def test_mean_times_between_failures():
    assert pytest.approx(50_700, rel=0.001) == CHIP_HOURS
    assert goodput.job_mtbf_seconds(CHIP_HOURS, 16_384) / 3600 == pytest.approx(3.09, abs=0.005)
    assert goodput.job_mtbf_seconds(CHIP_HOURS, 25_000) / 3600 == pytest.approx(2.03, abs=0.005)


def test_dalys_interval_is_the_best_of_the_exact_form():
    reliability = of_chips(25_000, 120, 900, 2)
    best = max(range(100, 3000, 5), key=lambda seconds: goodput.exact_goodput(reliability, seconds))
    assert goodput.daly_interval_seconds(reliability) == pytest.approx(best, abs=5)
    assert abs(goodput.young_interval_seconds(reliability) - best) > 50
    rare = of_chips(100, 30, 600)
    assert goodput.daly_interval_seconds(rare) == pytest.approx(goodput.young_interval_seconds(rare), rel=0.01)
    assert goodput.daly_interval_seconds(Reliability(10, 30, 0)) == 10


@pytest.mark.parametrize("chips", [16_384, 25_000])
def test_runs_drawn_at_random_have_the_goodput_of_the_formulas(chips):
    reliability = of_chips(chips, 60, 600)
    mean, error = mean_goodput(simulate_many(Job(200 * DAY, reliability), seed=1, runs=10))
    assert error < 0.002
    assert mean == pytest.approx(goodput.exact_goodput(reliability), abs=4 * error)
    assert mean == pytest.approx(goodput.goodput(reliability), rel=0.03)


def test_at_high_rates_the_exact_form_holds_and_the_first_order_is_too_kind():
    reliability = of_chips(25_000, 120, 900, 2)
    mean, error = mean_goodput(simulate_many(Job(100 * DAY, reliability), seed=1, runs=10))
    assert mean == pytest.approx(goodput.exact_goodput(reliability), abs=4 * error)
    assert goodput.goodput(reliability) - mean > 4 * error


def test_saves_that_are_written_beside_the_steps():
    """Less time stands still, and more work is lost with a failure: the formula has both."""
    blocking, written = of_chips(25_000, 60, 600), of_chips(25_000, 5, 600, write_seconds=240)
    mean, error = mean_goodput(simulate_many(Job(200 * DAY, written), seed=3, runs=10))
    assert mean == pytest.approx(goodput.goodput(written), rel=0.03)
    assert mean > goodput.goodput(blocking) + 4 * error
    without = dataclasses.replace(written, write_seconds=0)
    ideal, _ = mean_goodput(simulate_many(Job(200 * DAY, without, goodput.best_interval_seconds(written)), 3, 10))
    assert mean < ideal - 4 * error


def test_time_is_accounted_for():
    job = Job(20 * DAY, of_chips(25_000, 60, 600), spares=1, repair_seconds=DAY / 4)
    time = simulate(job, 0)
    assert time.work == pytest.approx(job.work_seconds)
    assert min(time.saving, time.lost, time.restarting, time.waiting) > 0 and time.failures > 100
    assert time.elapsed == pytest.approx(time.work + time.saving + time.lost + time.restarting + time.waiting)
    assert simulate(job, 0) == time != simulate(job, 1)


def test_a_run_without_failures_pays_for_its_saves_alone():
    time = simulate(Job(1000, Reliability(1e15, 10, 50), interval_seconds=100), 0)
    assert time.failures == 0 and time.lost == 0
    assert (time.work, time.saving) == (1000, 90)  # no save after the last step


def test_one_failure_by_hand():
    """With seed 4 the first failure comes in the middle of the run, and the next one long after it."""
    job = Job(1000, Reliability(800, 10, 50), interval_seconds=100)
    time = next(found for found in (simulate(job, seed) for seed in range(50)) if found.failures == 1)
    assert time.work == pytest.approx(1000) and time.restarting == pytest.approx(50) and time.waiting == 0
    assert 0 < time.lost <= 100 and 90 <= time.saving < 100


def test_spares():
    """A mean of 2 under repair: 5 or fewer of them in 98.3 % of the time, 6 in 99.5 %."""
    assert goodput.spare_chips(1000, 12_000, 24, risk=0.02) == 5
    assert goodput.spare_chips(1000, 12_000, 24, risk=0.01) == 6
    reliability = of_chips(25_000, 60, 600)
    few, many = (Job(50 * DAY, reliability, spares=spares, repair_seconds=DAY) for spares in (6, 30))
    assert simulate(few, 0).waiting > 0.05 * simulate(few, 0).elapsed
    enough = goodput.spare_chips(25_000, CHIP_HOURS, 24, risk=1e-6)
    assert enough <= 31 and simulate(many, 0).waiting == 0
    assert 5000 < goodput.spare_chips(2_500_000, 12_000, 24) < 5200


def test_spares_of_many_chips_are_those_of_the_sum(monkeypatch):
    """Chips under repair: 24 h of 2,000 h, so 12,000 of a million; both ways agree to a chip."""
    for chips in (4000, 100_000, 1_000_000):
        for risk in (0.3, 0.01, 1e-6):
            monkeypatch.setattr(goodput, "LARGE_MEAN", 0)
            near = goodput.spare_chips(chips, 2000, 24, risk)
            monkeypatch.setattr(goodput, "LARGE_MEAN", 1e9)
            assert abs(near - goodput.spare_chips(chips, 2000, 24, risk)) <= 1
    monkeypatch.undo()
    assert goodput.spare_chips(10**7, 1e-3, 24) == pytest.approx(10**7 * 24 / 1e-3, rel=1e-4)


@pytest.mark.parametrize("chips", [1000, 16_384, 100_000])
def test_expected_events_are_those_of_a_run(chips):
    job = Job(30 * DAY, of_chips(chips, 60, 600))
    run = simulate(job, 1)
    assert expected_events(job) == pytest.approx(run.failures + run.work / job.interval, rel=0.15)


def test_without_spares_every_failure_waits_for_its_repair():
    reliability = of_chips(25_000, 60, 600)
    alone = simulate(Job(5 * DAY, reliability, spares=0, repair_seconds=3000), 0)
    assert alone.failures > 20 and alone.waiting == pytest.approx(3000 * alone.failures)
    one = simulate(Job(5 * DAY, reliability, spares=1, repair_seconds=3000), 0)
    assert 0 < one.waiting < alone.waiting / 2


def test_goodput_falls_with_chips_and_with_dearer_stops():
    values = [goodput.goodput(of_chips(chips, 60, 600)) for chips in (1000, 4000, 16_000, 64_000)]
    assert values == sorted(values, reverse=True)
    assert goodput.goodput(of_chips(4000, 60, 1200)) < goodput.goodput(of_chips(4000, 60, 600))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Reliability(0, 30, 600), "job_mtbf_seconds=0 must be a number above 0"),
        (lambda: Reliability(1e4, 30, -600), "restart_seconds=-600 must be a number of at least 0"),
        (lambda: goodput.job_mtbf_seconds(-1, 8), "chip_mtbf_hours=-1"),
        (lambda: goodput.goodput(Reliability(1e4, 30, 600, 500), 100), "interval_seconds=100 must be at least write"),
        (lambda: Job(1e4, Reliability(1e4, 30, 600), 0), "interval_seconds=0 must be a number above 0"),
        (lambda: goodput.spare_chips(100, 1e4, 24, 0), "risk=0 must lie between"),
        (lambda: Job(1e4, Reliability(1e4, 30, 600, 500), 100), "interval_seconds=100 must be at least write"),
        (lambda: goodput.exact_goodput(Reliability(1e4, 30, 600, 500)), "write_seconds=500 must be 0"),
        (lambda: simulate_many(Job(1e4, Reliability(1e4, 30, 600)), 0, 0), "runs=0 must be an integer"),
    ],
)
def test_what_cannot_be_is_named(call, said):
    with pytest.raises(CallerError, match=said):
        call()


@pytest.mark.parametrize("restart", [6, 600])
def test_a_job_that_gets_nowhere_says_so(restart):
    with pytest.raises(CallerError, match="job_mtbf_seconds=10 leaves no time to get ahead"):
        simulate(Job(1e5, Reliability(10, 30, restart), interval_seconds=200), 0)
