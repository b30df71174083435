"""A training run to be costed: a model, chips, tokens and what they reach in; time, chip-hours and dollars out."""

from __future__ import annotations

import dataclasses

from gpt4moe.accounting import flops
from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import require, require_count, require_not_negative, require_positive
from gpt4moe.plan.money import goodput, train_cost
from gpt4moe.plan.money.goodput import HOUR_SECONDS, Reliability

MOST_TOKENS = 1e18


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """A run. utilization: model FLOPs over the peak while it gets ahead; chip_mtbf_hours: of one chip, in this job."""

    shape: Shape
    chip: Chip
    num_chips: int
    tokens: float
    utilization: float
    dollars_per_chip_hour: float
    chip_mtbf_hours: float
    blocking_seconds: float
    restart_seconds: float
    write_seconds: float = 0.0

    def __post_init__(self) -> None:
        require_count("--num_chips", self.num_chips)
        require_positive("--tokens", self.tokens)
        require(self.tokens <= MOST_TOKENS, "--tokens", self.tokens, f"must be at most {MOST_TOKENS:g}")
        require_not_negative("price", self.dollars_per_chip_hour)
        require_positive("chip_mtbf_hours", self.chip_mtbf_hours)
        require(0 < self.utilization <= 1, "mfu", self.utilization, "must lie above 0 and be at most 1")

    @property
    def reliability(self) -> Reliability:
        """Of the whole job."""
        mtbf = goodput.job_mtbf_seconds(self.chip_mtbf_hours, self.num_chips)
        return Reliability(mtbf, self.blocking_seconds, self.restart_seconds, self.write_seconds)

    @property
    def goodput(self) -> float:
        """The share of time that is useful at the best save interval."""
        return goodput.goodput(self.reliability)

    @property
    def flops(self) -> float:
        """Model FLOPs of the run: matrix products, three times forward."""
        return flops.train_flops_per_token(self.shape) * self.tokens

    @property
    def work_seconds(self) -> float:
        """Time of the steps alone."""
        return train_cost.run_seconds(self.flops, self.num_chips, self.chip.peak_flops, self.utilization)

    @property
    def seconds(self) -> float:
        """Time of the run with its failures."""
        return self.work_seconds / self.goodput

    @property
    def chip_hours(self) -> float:
        """Hours of all chips, those lost to failures among them."""
        return self.seconds * self.num_chips / HOUR_SECONDS

    @property
    def dollars(self) -> float:
        """Of rented chips."""
        return train_cost.rental_dollars(self.chip_hours, self.dollars_per_chip_hour)
