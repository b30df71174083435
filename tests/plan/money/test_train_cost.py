"""Days, dollars, energy and batch ramps against published runs."""

import pytest

from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.config.check import CallerError
from gpt4moe.plan.money import train_cost
from gpt4moe.plan.money.train_cost import Power, RampStage
from gpt4moe.plan.money.training_job import TrainingJob

GPT4_CHIP_HOURS = 57e6  # 25,000 A100 for 95 days


def test_the_days_of_the_reference():
    days = train_cost.run_seconds(2.15e25, 25_000, 312e12, 0.34) / 86_400
    assert days == pytest.approx(93.8, abs=0.1)
    assert train_cost.run_seconds(2.15e25, 25_000, 312e12, 0.34, goodput=0.5) / 86_400 == pytest.approx(2 * days)


def test_the_chip_hours_of_llama3():
    """30.84M H100-hours in its model card, at 380 to 430 of 989 TFLOP/s (table 4) and failures as it reports them."""
    shape, chip = shape_named("llama3_405b"), chip_named("h100")
    job = TrainingJob(shape, chip, 16_384, 15.6e12, 0.38, 2.99, 50_700, blocking_seconds=30, restart_seconds=600)
    assert job.chip_hours == pytest.approx(30.84e6, rel=0.04)
    assert job.dollars == pytest.approx(2.99 * job.chip_hours)


def test_epochs_two_costs_of_gpt4():
    """Value of $17,500 a chip gives $37M, against Epoch's $40.7M with energy; their $78.6M of rent is $1.38 an hour."""
    used_up = train_cost.amortized_dollars(GPT4_CHIP_HOURS, 17_500)
    assert used_up == pytest.approx(36.7e6, rel=0.005)
    power = Power(400, server_factor=2.03)
    energy = power.energy_kwh(GPT4_CHIP_HOURS) * power.dollars_per_kwh
    assert used_up + energy == pytest.approx(40.7e6, rel=0.05)
    assert train_cost.rental_dollars(GPT4_CHIP_HOURS, 1.38) == pytest.approx(78.6e6, rel=0.002)


def test_hardware_loses_the_same_share_each_year():
    """An hour's loss is the derivative of a value that falls to 10^-0.14 of itself in a year."""
    hour = train_cost.amortized_dollars(1, 1.0)
    assert hour == pytest.approx(1 - 10 ** (-0.14 / 8760), rel=1e-4)


def test_energy_by_hand():
    power = Power(
        500, server_factor=2, utilization=0.5, usage_effectiveness=1.2, carbon_kg_per_kwh=0.5, carbon_free=0.8
    )
    assert power.energy_kwh(10) == pytest.approx(6.0)
    assert power.carbon_kg(10) == pytest.approx(0.6)


def test_small_batches_of_bloom_run_as_slowly_as_measured():
    """BLOOM, 12 stages and 8 replicas of 2 sequences: 113 TFLOP/s at 512 sequences where 2,048 give 150 (its log)."""
    full, half = (train_cost.busy_share(rows, 8, 2, 12) for rows in (2048, 512))
    assert 150 * half / full == pytest.approx(113, rel=0.08)
    first = train_cost.busy_share(16, 8, 2, 12)
    assert first == pytest.approx(1 / 12)
    assert train_cost.busy_share(8, 8, 2, 12) == pytest.approx(1 / 24)


def test_a_ramp_takes_the_time_of_its_parts():
    stages = (RampStage(100, 10), RampStage(900, 100))
    assert train_cost.ramp_seconds(stages, lambda batch: batch) == 10 + 9
    whole = train_cost.ramp_seconds((RampStage(1000, 100),), lambda batch: batch)
    assert train_cost.ramp_seconds(stages, lambda batch: batch) > whole


def test_more_virtual_stages_keep_chips_busier():
    shares = [train_cost.busy_share(7324, 208, 1, 15, virtual) for virtual in (1, 2, 4, 8)]
    assert shares == sorted(shares) and shares[0] > 0.69


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: train_cost.rental_dollars(1, -2), "dollars_per_chip_hour=-2 must be a number of at least 0"),
        (lambda: train_cost.run_seconds(1e20, 8, 1e15, 1.2), "utilization=1.2 must lie above 0"),
        (lambda: train_cost.run_seconds(1e20, 0, 1e15, 0.4), "num_chips=0 must be an integer"),
        (lambda: Power(-1), "watts=-1 must be a number above 0"),
        (lambda: Power(400, carbon_free=2), "carbon_free=2 must lie between 0 and 1"),
        (lambda: train_cost.ramp_seconds((), float), "stages=() must hold"),
    ],
)
def test_what_cannot_be_is_named(call, said):
    with pytest.raises(CallerError, match=said.replace("(", r"\(").replace(")", r"\)")):
        call()
