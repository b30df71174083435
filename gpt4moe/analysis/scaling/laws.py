"""Scaling laws with their published constants: parameters, tokens, experts in, nats per token out.

A law is a frozen dataclass of its constants; `loss(...)` takes numpy arrays that broadcast. N counts parameters as each
paper does, D training tokens.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import optimize

FLOPS_PER_PARAMETER_TOKEN = 6  # forward and backward
Number = float | np.ndarray


@dataclasses.dataclass(frozen=True)
class Chinchilla:
    """L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, eq. 10), N parameters and D tokens seen once."""

    A: float
    B: float
    E: float
    alpha: float
    beta: float

    def loss(self, parameters: Number, tokens: Number) -> Number:
        """Returns nats per token."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    @property
    def G(self) -> float:
        """(alpha A / beta B)^(1 / (alpha + beta)): what the optimal sizes are proportional to."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def optimum(self, flops: Number) -> tuple[Number, Number]:
        """Returns the parameters and tokens of the least loss for C = 6 N D FLOPs (eq. 4)."""
        product = flops / FLOPS_PER_PARAMETER_TOKEN
        exponent = self.beta / (self.alpha + self.beta)
        return self.G * product**exponent, product ** (1 - exponent) / self.G


@dataclasses.dataclass(frozen=True)
class DataConstrained:
    """Chinchilla's law where U unique tokens are repeated (Muennighoff et al. 2023, eq. 5).

    D and N count as U_D + U_D R_D* (1 - exp(-R_D / R_D*)) and the same of U_N, what U_D tokens would best be spent on:
    `tokens_half` R_D* and `parameters_half` R_N* are how fast repetition and excess parameters lose their worth.
    """

    law: Chinchilla
    tokens_half: float
    parameters_half: float

    def loss(self, parameters: Number, tokens: Number, unique_tokens: Number) -> Number:
        """Returns nats per token after `tokens` of which `unique_tokens` (at most as many) differ."""
        unique = np.minimum(unique_tokens, tokens)
        useful = np.minimum(parameters, self.useful_parameters(unique))
        return self.law.loss(
            useful * worth(parameters / useful, self.parameters_half), unique * worth(tokens / unique, self.tokens_half)
        )

    def useful_parameters(self, unique_tokens: Number) -> Number:
        """Returns the parameters that Chinchilla's law would give a model of so many tokens (U_N)."""
        return (unique_tokens * self.law.G) ** (self.law.beta / self.law.alpha) * self.law.G

    def optimum(self, flops: float, unique_tokens: float) -> tuple[float, float]:
        """Returns parameters and tokens of the least loss for 6 N D FLOPs over so many unique tokens."""
        product = flops / FLOPS_PER_PARAMETER_TOKEN
        found = optimize.minimize_scalar(
            lambda log_tokens: self.loss(product / math.exp(log_tokens), math.exp(log_tokens), unique_tokens),
            bounds=(math.log(unique_tokens) - 5, math.log(unique_tokens) + 10),
            method="bounded",
            options={"xatol": 1e-10},
        )
        tokens = math.exp(found.x)
        return product / tokens, tokens


def worth(times: Number, half: float) -> Number:
    """Returns what `times` repetitions are worth in fresh ones: 1 + R* (1 - exp(-(times - 1) / R*))."""
    return 1 + half * -np.expm1(-(times - 1) / half)


@dataclasses.dataclass(frozen=True)
class Routed:
    """log10 L = a log N + b log E^ + c log N log E^ + d (Clark et al. 2022, eq. 2), logarithms to base 10.

    N: parameters of the dense model that routing was added to, K = 1, 130B tokens. E^ lies between `least` (E = 1) and
    `most`: 1/E^ = 1 / (E - 1 + (1/least - 1/most)^-1) + 1/most.
    """

    a: float
    b: float
    c: float
    d: float
    least: float
    most: float

    def saturated(self, experts: Number) -> Number:
        """Returns E^."""
        return 1 / (1 / (experts - 1 + 1 / (1 / self.least - 1 / self.most)) + 1 / self.most)

    def loss(self, parameters: Number, experts: Number) -> Number:
        """Returns nats per token."""
        size, routed = np.log10(parameters), np.log10(self.saturated(experts))
        return 10 ** (self.a * size + self.b * routed + self.c * size * routed + self.d)

    def dense_equivalent(self, parameters: Number, experts: Number) -> Number:
        """Returns the parameters of the dense model (E = 1) of the same loss: the effective parameter count."""
        dense = math.log10(self.least)
        routed = np.log10(self.saturated(experts))
        size = np.log10(parameters)
        gained = self.a * size + self.b * routed + self.c * size * routed - self.b * dense
        return 10 ** (gained / (self.a + self.c * dense))

    @property
    def cutoff(self) -> float:
        """10^(-b / c): parameters beyond which more experts no longer help."""
        return 10 ** (-self.b / self.c)


@dataclasses.dataclass(frozen=True)
class FineGrained:
    """L = c + (g / G^gamma + a) / N^alpha + b / D^beta (Krajewski et al. 2024, eq. 9).

    N: ALL parameters but embeddings, not the active ones; G: granularity. A dense model has g = 0.
    """

    a: float
    alpha: float
    b: float
    beta: float
    g: float
    gamma: float
    c: float

    def loss(self, parameters: Number, tokens: Number, granularity: Number = 1.0) -> Number:
        """Returns nats per token."""
        capacity = (self.g / granularity**self.gamma + self.a) / parameters**self.alpha
        return self.c + capacity + self.b / tokens**self.beta


@dataclasses.dataclass(frozen=True)
class Sparse:
    """L = a/N^alpha + b/D^beta + c/(1-S)^lambda + d/((1-S)^delta N^gamma) + e (Abnar et al. 2025, eq. 5).

    N: all parameters; S = (E - K) / E, the share of experts that a token leaves out. `lambda_` is negative. In-sample
    R^2 is 99 %, held out (S = 0.98) 68 %: not for extrapolation.
    """

    a: float
    alpha: float
    b: float
    beta: float
    c: float
    lambda_: float
    d: float
    delta: float
    gamma: float
    e: float

    def loss(self, parameters: Number, tokens: Number, sparsity: Number) -> Number:
        """Returns nats per token."""
        dense = 1 - np.asarray(sparsity, np.float64)
        base = self.a / parameters**self.alpha + self.b / tokens**self.beta + self.e
        return base + self.c / dense**self.lambda_ + self.d / (dense**self.delta * parameters**self.gamma)


# The unrounded constants of approach 3, from the paper's sources.
HOFFMANN = Chinchilla(math.exp(6.0073404), math.exp(6.0179186), math.exp(0.5267228), 0.33917084, 0.2849083)
# Besiroglu et al. 2024 (Epoch), a replication from the paper's figure, n = 240.
EPOCH = Chinchilla(482.01, 2085.43, 1.8172, 0.3478, 0.3658)
# Muennighoff et al. 2023, C4, and their constants of repetition.
C4 = Chinchilla(math.exp(6.255414), math.exp(7.3049974), math.exp(0.6254804), 0.3526596, 0.3526596)
MUENNIGHOFF = DataConstrained(C4, 15.387756, 5.309743)
# Clark et al. 2022, table 3: three digits, which do not reproduce the paper's own cut-offs.
CLARK_PUBLISHED = {
    "s_base": Routed(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
    "rl_r": Routed(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
    "hash": Routed(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
}
# The same form fitted again to the open table of their runs, dense ones included: rms error of log10 L 0.003.
CLARK_REFIT = {
    "s_base": Routed(-0.0838, -0.1234, 0.0104, 1.1216, 2.394, 217.7),
    "rl_r": Routed(-0.0835, -0.1279, 0.0117, 1.1143, 1.987, 424.5),
    "hash": Routed(-0.0887, -0.1464, 0.0134, 1.1730, 4.988, 369.1),
}
# Krajewski et al. 2024: 64 times as many experts' parameters as the dense feed-forward's; G 1 to 16.
KRAJEWSKI = FineGrained(18.1, 0.115, 30.8, 0.147, 2.1, 0.58, 0.47)
KRAJEWSKI_DENSE = FineGrained(16.3, 0.126, 26.7, 0.127, 0.0, 1.0, 0.47)
ABNAR = Sparse(16612.50, 0.5962, 5455.67, 0.3954, 0.4598, -0.1666, 17.26, 0.1603, 0.1595, 0.94)
