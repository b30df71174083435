"""The law of fine-grained experts: total parameters, tokens and granularity to loss (Krajewski et al. 2024)."""

from __future__ import annotations

import dataclasses
import math

from scipy import optimize

from gpt4moe.analysis.scaling.law import Array, Law, Published, Ranges, constant

# FLOPs per active parameter and token, outside of the router and in it, and width per layer (section 6.1, appendix E).
BODY_FLOPS, ROUTER_FLOPS, WIDTH_PER_LAYER = 6, 14, 64
GRANULARITIES = tuple(2**power for power in range(9))


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What a compute budget is best spent on. loss: nats per token there."""

    active_parameters: float
    total_parameters: float
    tokens: float
    granularity: int
    loss: float


@dataclasses.dataclass(frozen=True)
class Granular(Law):
    """L = c + (g / G^gamma + a) / N^alpha + b / D^beta (Krajewski et al. 2024, eq. 9).

    N is ALL parameters without embeddings, not the active ones: 43 times them at 64 experts on every feed-forward. At
    one N and D a finer grain is always better here; what ends it is the cost of routing, in `optimum`.
    """

    a: float = constant((0, 2, 4), log=True)
    alpha: float = constant((0.1, 0.2, 0.4))
    b: float = constant((0, 3, 6), log=True)
    beta: float = constant((0.1, 0.2, 0.4))
    g: float = constant((-1, 1, 3), log=True)
    gamma: float = constant((0.3, 0.6, 1))
    c: float = constant((-1, 0, 0.7), log=True)

    def loss(self, total_parameters: Array, tokens: Array, granularity: Array) -> Array:
        """Returns nats per token."""
        scale = self.g / granularity**self.gamma + self.a
        return self.c + scale / total_parameters**self.alpha + self.b / tokens**self.beta

    def optimum(self, compute: float, expansion: int = 64) -> Configuration:
        """Returns the least loss for so many FLOPs, routing counted (section 6.2).

        expansion: parameters of the experts over those of the dense feed-forward; constants hold for the one that they
        were fitted at. Granularities are powers of two; width is 64 times depth.
        """
        return min((self._best(compute, expansion, grain) for grain in GRANULARITIES), key=lambda found: found.loss)

    def _best(self, compute: float, expansion: int, granularity: int) -> Configuration:
        def configuration(log_width: float) -> Configuration:
            width = math.exp(log_width)
            layers = width / WIDTH_PER_LAYER
            total = width**2 * (8 * expansion + 4) * layers
            flops = (12 * width**2 * BODY_FLOPS + width * expansion * granularity * ROUTER_FLOPS) * layers
            loss = self.loss(total, compute / flops, granularity)
            return Configuration(12 * width**2 * layers, total, compute / flops, granularity, loss)

        bounds = (math.log(16), math.log(1e6))
        found = optimize.minimize_scalar(lambda log_width: configuration(log_width).loss, bounds, bounds=bounds)
        return configuration(found.x)


_RUNS = {"total_parameters": (129e6, 3.7e9), "tokens": (16e9, 130e9)}
KRAJEWSKI = Published(
    Granular(a=18.1, alpha=0.115, b=30.8, beta=0.147, g=2.1, gamma=0.58, c=0.47),
    "Krajewski et al. 2024 (arXiv:2402.07871), table 1, 64 experts, expert choice, C4; RMSE 0.015",
    Ranges(_RUNS | {"granularity": (1, 16)}),
)
KRAJEWSKI_DENSE = Published(
    Granular(a=16.3, alpha=0.126, b=26.7, beta=0.127, g=0.0, gamma=1.0, c=0.47),
    "Krajewski et al. 2024 (arXiv:2402.07871), table 1, dense: total parameters are the active ones",
    Ranges({"total_parameters": (3e6, 85e6), "tokens": (16e9, 66e9)}),
)
