"""Days, dollars and energy of a training run: FLOPs, chips and prices in.

Two kinds of dollars: rented, chip-hours at a price; and amortized, the part of owned hardware's value that a run uses
up, with its electricity (Cottier et al. 2024, "The rising costs of training frontier AI models", section 2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from gpt4moe.accounting import pipeline
from gpt4moe.config.check import require, require_count, require_fraction, require_not_negative, require_positive

HOUR_SECONDS, YEAR_HOURS = 3600, 8760
# Value of hardware falls by so many powers of ten a year (Cottier et al. 2024): by 28 %.
DEPRECIATION_PER_YEAR = 0.14


@dataclasses.dataclass(frozen=True)
class Power:
    """What a chip draws at the meter.

    watts: of the chip at full load; server_factor: its whole server over its chips (a DGX H100 has 10.2 kW for 8 of
    700 W); utilization: mean draw over full load; usage_effectiveness: the building over its servers; carbon_free:
    share of the electricity that costs no emissions, carbon_kg_per_kwh: what the rest costs.
    """

    watts: float
    server_factor: float = 1.82
    utilization: float = 0.75
    usage_effectiveness: float = 1.1
    dollars_per_kwh: float = 0.08
    carbon_kg_per_kwh: float = 0.4
    carbon_free: float = 0.0

    def __post_init__(self) -> None:
        require_positive("watts", self.watts)
        for name in ("server_factor", "usage_effectiveness"):
            require_positive(name, getattr(self, name))
        require_fraction("utilization", self.utilization)
        require_fraction("carbon_free", self.carbon_free)
        require_not_negative("dollars_per_kwh", self.dollars_per_kwh)
        require_not_negative("carbon_kg_per_kwh", self.carbon_kg_per_kwh)

    def energy_kwh(self, chip_hours: float) -> float:
        """Returns what so many chip-hours draw."""
        watts = self.watts * self.server_factor * self.utilization * self.usage_effectiveness
        return chip_hours * watts / 1000

    def carbon_kg(self, chip_hours: float) -> float:
        """Returns the emissions of so many chip-hours, of electricity that is not free of them."""
        return self.energy_kwh(chip_hours) * self.carbon_kg_per_kwh * (1 - self.carbon_free)


@dataclasses.dataclass(frozen=True)
class RampStage:
    """Part of a run with one batch size: its tokens, and tokens of a batch."""

    tokens: float
    batch_tokens: float


def run_seconds(flops: float, num_chips: int, peak_flops: float, utilization: float, goodput: float = 1.0) -> float:
    """Returns the time of `flops` model FLOPs at a model FLOPs utilisation, failures included by `goodput`."""
    require_positive("flops", flops)
    require_count("num_chips", num_chips)
    require_positive("peak_flops", peak_flops)
    for name, value in (("utilization", utilization), ("goodput", goodput)):
        require(0 < value <= 1, name, value, "must lie above 0 and be at most 1")
    return flops / (num_chips * peak_flops * utilization * goodput)


def rental_dollars(chip_hours: float, dollars_per_chip_hour: float) -> float:
    """Returns the price of rented chips; chip_hours count those lost to failures."""
    require_not_negative("chip_hours", chip_hours)
    require_not_negative("dollars_per_chip_hour", dollars_per_chip_hour)
    return chip_hours * dollars_per_chip_hour


def amortized_dollars(
    chip_hours: float, dollars_per_chip: float, depreciation_per_year: float = DEPRECIATION_PER_YEAR
) -> float:
    """Returns the value that hardware of `dollars_per_chip`, server included, loses over so many chip-hours.

    Its value falls as 10^(-r t), at the start by r ln 10 a year.
    """
    require_not_negative("dollars_per_chip", dollars_per_chip)
    require_not_negative("depreciation_per_year", depreciation_per_year)
    return chip_hours / YEAR_HOURS * dollars_per_chip * depreciation_per_year * math.log(10)


def ramp_seconds(stages: Sequence[RampStage], tokens_per_second: Callable[[float], float]) -> float:
    """Returns the time of a run whose batch grows; `tokens_per_second` is the rate at a batch of so many tokens."""
    require(bool(stages), "stages", tuple(stages), "must hold at least one stage")
    return sum(stage.tokens / tokens_per_second(stage.batch_tokens) for stage in stages)


def busy_share(batch_rows: int, replicas: int, microbatch_rows: int, num_stages: int, virtual_stages: int = 1) -> float:
    """Returns the share of chips' time that a batch of so many sequences keeps busy: pipeline and replicas.

    Each replica gets m = rows / (replicas * microbatch) microbatches, of which p stages with v chunks each use m v /
    (m v + p - 1) (`accounting.pipeline`); replicas for which no sequence is left idle.
    """
    for name, value in (("batch_rows", batch_rows), ("replicas", replicas), ("microbatch_rows", microbatch_rows)):
        require_count(name, value)
    microbatches = math.ceil(batch_rows / (replicas * microbatch_rows))
    idle = pipeline.idle_fraction(num_stages, microbatches, virtual_stages)
    given = batch_rows / (microbatches * replicas * microbatch_rows)
    return float(1 - idle) * given
