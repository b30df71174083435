"""What failures leave of a run: failure rate, saves and restarts in; save interval, goodput and spare chips out.

Goodput is the share of time in which a run gets ahead: not saving, not lost, not starting again. Failures are
independent and come at a constant rate, so that a job of n chips fails n times as often as one chip.
"""

from __future__ import annotations

import dataclasses
import math
import statistics

from gpt4moe.config.check import require, require_count, require_not_negative, require_positive

HOUR_SECONDS = 3600
MOST_CHIPS = 10_000_000
LARGE_MEAN = 10_000  # of a Poisson law
# Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 H100 (Grattafiori et al. 2024, section 3.3.4).
LLAMA3_FAILURES, LLAMA3_CHIPS, LLAMA3_DAYS = 419, 16_384, 54


@dataclasses.dataclass(frozen=True)
class Reliability:
    """How often a job stops, and what a save and a stop cost.

    job_mtbf_seconds: mean time between failures of the whole job; blocking_seconds: of a save, in which no step runs
    (an asynchronous save: the copy to the host); write_seconds: after that until the save is safe, beside the steps;
    restart_seconds: from a failure until steps run again (find it, replace, restore, compile).
    """

    job_mtbf_seconds: float
    blocking_seconds: float
    restart_seconds: float
    write_seconds: float = 0.0

    def __post_init__(self) -> None:
        require_positive("job_mtbf_seconds", self.job_mtbf_seconds)
        require_positive("blocking_seconds", self.blocking_seconds)
        require_not_negative("restart_seconds", self.restart_seconds)
        require_not_negative("write_seconds", self.write_seconds)


def observed_chip_mtbf_hours(failures: int, chips: int, days: float) -> float:
    """Returns the chip-hours for each failure that was seen."""
    require_count("failures", failures)
    return chips * days * 24 / failures


def job_mtbf_seconds(chip_mtbf_hours: float, num_chips: int) -> float:
    """Returns the mean time between failures of a job that stops with any of its chips."""
    require_positive("chip_mtbf_hours", chip_mtbf_hours)
    require_count("--num_chips", num_chips)
    require(num_chips <= MOST_CHIPS, "--num_chips", num_chips, f"must be at most {MOST_CHIPS:,}")
    return chip_mtbf_hours * HOUR_SECONDS / num_chips


def young_interval_seconds(reliability: Reliability) -> float:
    """Returns the work between two saves that loses least, to first order: sqrt(2 C M) (Young 1974)."""
    return math.sqrt(2 * reliability.blocking_seconds * reliability.job_mtbf_seconds)


def daly_interval_seconds(reliability: Reliability) -> float:
    """Returns the same to higher order (Daly 2006, equation 37); M where a save takes 2 M or longer."""
    save, mtbf = reliability.blocking_seconds, reliability.job_mtbf_seconds
    if save >= 2 * mtbf:
        return mtbf
    half = save / (2 * mtbf)
    return young_interval_seconds(reliability) * (1 + math.sqrt(half) / 3 + half / 9) - save


def best_interval_seconds(reliability: Reliability) -> float:
    """Returns Young's interval, or how long a save is being written where that is longer."""
    return max(young_interval_seconds(reliability), reliability.write_seconds)


def goodput(reliability: Reliability, interval_seconds: float | None = None) -> float:
    """Returns the share of time that is useful, to first order in the rate of failures.

    1 / [(1 + C / t) (1 + (t / 2 + C + W + R) / M)]: a save each interval t, and with a failure half an interval, the
    save, what had not been written yet, and the restart. interval_seconds None: the best one.
    """
    interval = _checked(reliability, interval_seconds)
    lost = interval / 2 + reliability.blocking_seconds + reliability.write_seconds + reliability.restart_seconds
    return 1 / ((1 + reliability.blocking_seconds / interval) * (1 + lost / reliability.job_mtbf_seconds))


def exact_goodput(reliability: Reliability, interval_seconds: float | None = None) -> float:
    """Returns the same for any rate of exponential failures, restarts that fail among them, of blocking saves.

    t / (M e^(R / M) (e^((t + C) / M) - 1)) (Daly 2006, equation 13). Raises where a save is written beside steps.
    """
    require(reliability.write_seconds == 0, "write_seconds", reliability.write_seconds, "must be 0 for the exact form")
    interval, mtbf = _checked(reliability, interval_seconds), reliability.job_mtbf_seconds
    attempts = math.expm1((interval + reliability.blocking_seconds) / mtbf)
    return interval / (mtbf * math.exp(reliability.restart_seconds / mtbf) * attempts)


def spare_chips(num_chips: int, chip_mtbf_hours: float, repair_hours: float, risk: float = 0.01) -> int:
    """Returns the fewest spares that are used up with a chance of at most `risk` at any moment.

    Chips under repair follow a Poisson law with mean n * repair / M_1. Of a large mean the law is summed no more:
    its quantile is the normal one with the first term for skewness (Cornish and Fisher 1937), right to one chip.
    """
    require(1e-9 <= risk < 1, "risk", risk, "must lie between 1e-9 and 1")
    require_positive("repair_hours", repair_hours)
    mean = repair_hours * HOUR_SECONDS / job_mtbf_seconds(chip_mtbf_hours, num_chips)
    if mean > LARGE_MEAN:
        normal = statistics.NormalDist().inv_cdf(1 - risk)
        return math.ceil(mean + normal * math.sqrt(mean) + (normal**2 - 1) / 6 - 0.5)
    spares, log_term = 0, -mean
    below = math.exp(log_term)
    while 1 - below > risk:
        spares += 1
        log_term += math.log(mean / spares)
        below += math.exp(log_term)
    return spares


def _checked(reliability: Reliability, interval_seconds: float | None) -> float:
    interval = best_interval_seconds(reliability) if interval_seconds is None else interval_seconds
    require_positive("interval_seconds", interval)
    constraint = f"must be at least write_seconds ({reliability.write_seconds:g}): one save is written at a time"
    require(interval >= reliability.write_seconds, "interval_seconds", interval, constraint)
    return interval
