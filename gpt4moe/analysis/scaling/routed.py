"""The law of routed models at one token budget: parameters and experts to loss (Clark et al. 2022)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from gpt4moe.analysis.scaling.law import Array, Law, Published, Ranges, constant


@dataclasses.dataclass(frozen=True)
class Routed(Law):
    """log L = a log N + b log E^ + c log N log E^ + d, logarithms to base 10 (Clark et al. 2022, eq. 1).

    1 / E^ = 1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max lets the experts begin at E_start and saturate at
    E_max. One expert for each token, every second layer routed, all runs of one token budget: nothing here says how the
    gain depends on tokens. Published coefficients have three digits, too few for `cutoff`.
    """

    a: float = constant((-0.2, -0.1, -0.05))
    b: float = constant((-0.3, -0.15, -0.05, 0.0))
    c: float = constant((0.0, 0.01, 0.03))
    d: float = constant((0.5, 1.0, 1.5, 2.0))
    E_start: float = constant([math.log(experts) for experts in (1.2, 2, 4)], log=True)
    E_max: float = constant([math.log(experts) for experts in (30, 100, 300, 1000)], log=True)

    def loss(self, active_parameters: Array, num_experts: Array) -> Array:
        """Returns nats per token."""
        size, experts = np.log10(active_parameters), np.log10(self.saturated(num_experts))
        return 10.0 ** (self.a * size + self.b * experts + self.c * size * experts + self.d)

    def saturated(self, num_experts: Array) -> Array:
        """Returns E^, which is E_start for one expert and never reaches E_max."""
        with np.errstate(divide="ignore"):  # E_start = E_max, as a resampled fit may have it: no experts count
            offset = 1 / (1 / self.E_start - 1 / self.E_max)
            return 1 / (1 / (num_experts - 1 + offset) + 1 / self.E_max)

    def dense_parameters(self, active_parameters: Array, num_experts: Array) -> Array:
        """Returns the parameters of the dense model of the same loss, the effective parameter count (eq. 11)."""
        start, experts = np.log10(self.E_start), np.log10(self.saturated(num_experts))
        size = (self.a + self.c * experts) * np.log10(active_parameters) + self.b * (experts - start)
        return 10.0 ** (size / (self.a + self.c * start))

    def dense_multiplier(self, active_parameters: Array, num_experts: Array) -> Array:
        """Returns how many times its own size a dense model must be to match."""
        return self.dense_parameters(active_parameters, num_experts) / active_parameters

    @property
    def cutoff(self) -> float:
        """Parameters beyond which more experts no longer help, 10^(-b / c): as uncertain as c, tenfold for 0.01."""
        return 10.0 ** (-self.b / self.c)


_RUNS = Ranges({"active_parameters": (15e6, 1.3e9), "num_experts": (1, 512)})
_TABLE = "Clark et al. 2022 (arXiv:2202.01169), table 3, 130B tokens"
_REFIT = "refit to the open table of Clark et al. 2022, k = 1, every second layer, last step, dense runs as E = 1"
CLARK_S_BASE = Published(Routed(a=-0.082, b=-0.108, c=0.009, d=1.104, E_start=1.847, E_max=314.478), _TABLE, _RUNS)
CLARK_RL_R = Published(Routed(a=-0.083, b=-0.126, c=0.012, d=1.111, E_start=1.880, E_max=469.982), _TABLE, _RUNS)
CLARK_HASH = Published(Routed(a=-0.087, b=-0.136, c=0.012, d=1.157, E_start=4.175, E_max=477.741), _TABLE, _RUNS)
REFIT_S_BASE = Published(Routed(a=-0.0838, b=-0.1234, c=0.0104, d=1.1216, E_start=2.394, E_max=217.7), _REFIT, _RUNS)
REFIT_RL_R = Published(Routed(a=-0.0835, b=-0.1279, c=0.0117, d=1.1143, E_start=1.987, E_max=424.5), _REFIT, _RUNS)
REFIT_HASH = Published(Routed(a=-0.0887, b=-0.1464, c=0.0134, d=1.1730, E_start=4.988, E_max=369.1), _REFIT, _RUNS)
# Where routing stops to help, as the paper has it from unrounded coefficients, and as the refit has it from its own.
PUBLISHED_CUTOFF = {"S-Base": 937e9, "RL-R": 85e9, "Hash": 83e9}
REFIT_CUTOFF = {"S-Base": 6.8e11, "RL-R": 8.8e10, "Hash": 8.1e10}
DENSE_EXPONENT, DENSE_SCALE = 0.078, 3.568e13  # L = (DENSE_SCALE / N)^DENSE_EXPONENT of the dense runs, table 3
