"""Dense laws: loss from parameters and tokens (Hoffmann), and where the tokens repeat (Muennighoff)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import optimize

from gpt4moe.analysis.scaling.law import Array, Law, Published, Ranges, constant

FLOPS_PER_PARAMETER_AND_TOKEN = 6  # forward and backward
# The grid of Hoffmann et al. 2022, section D.2.
SCALES, OFFSETS, EXPONENTS = (0, 5, 10, 15, 20, 25), (-1, -0.5, 0, 0.5, 1), (0, 0.5, 1, 1.5, 2)


@dataclasses.dataclass(frozen=True)
class Optimum:
    """What a compute budget is best spent on. loss: nats per token there."""

    active_parameters: Array
    tokens: Array
    loss: Array


@dataclasses.dataclass(frozen=True)
class Chinchilla(Law):
    """L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, eq. 2), each of D tokens seen once.

    E is the entropy of the text per token of its tokenizer: no constant of it carries over to another tokenizer. Never
    round the exponents before `optimum`: 0.34 and 0.28 move it by a fifth.
    """

    A: float = constant(SCALES, log=True)
    B: float = constant(SCALES, log=True)
    E: float = constant(OFFSETS, log=True)
    alpha: float = constant(EXPONENTS)
    beta: float = constant(EXPONENTS)

    def loss(self, active_parameters: Array, tokens: Array) -> Array:
        """Returns nats per token."""
        return self.E + self.A / active_parameters**self.alpha + self.B / tokens**self.beta

    @property
    def G(self) -> float:
        """(alpha A / beta B)^(1 / (alpha + beta)), which sets parameters against tokens (eq. 4)."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def optimum(self, compute: Array) -> Optimum:
        """Returns the least loss for `compute` = 6 N D FLOPs (eq. 4)."""
        product = np.asarray(compute, np.float64) / FLOPS_PER_PARAMETER_AND_TOKEN
        parameters = self.G * product ** (self.beta / (self.alpha + self.beta))
        return Optimum(parameters, product / parameters, self.loss(parameters, product / parameters))

    def best_parameters(self, tokens: Array) -> Array:
        """Returns the parameters of the optimum that has so many tokens."""
        return (tokens * self.G) ** (self.beta / self.alpha) * self.G


@dataclasses.dataclass(frozen=True)
class DataConstrained(Law):
    """Chinchilla's law of what N parameters and D tokens are worth (Muennighoff et al. 2023, eq. 5 and 6).

    U unique tokens seen R = D / U - 1 times again are worth U + U R_D (1 - exp(-R / R_D)) fresh ones; parameters beyond
    those that U fresh tokens would best be given lose their worth in the same way by R_N. Repetition can only flatten
    the loss here, never raise it: leave runs out of a fit in which it rose. Fit R_D and R_N with the rest fixed at what
    runs without repetition give, as the paper does.
    """

    A: float = constant(SCALES, log=True)
    B: float = constant(SCALES, log=True)
    E: float = constant(OFFSETS, log=True)
    alpha: float = constant(EXPONENTS)
    beta: float = constant(EXPONENTS)
    R_D: float = constant([math.log(repeats) for repeats in (1, 4, 8, 12, 16, 20)], log=True)
    R_N: float = constant([math.log(repeats) for repeats in (1, 4, 8, 12, 16, 20)], log=True)

    def loss(self, active_parameters: Array, tokens: Array, unique_tokens: Array) -> Array:
        """Returns nats per token; fewer tokens than are unique leave the rest unseen."""
        unique = np.minimum(unique_tokens, tokens)
        best = self.fresh.best_parameters(unique)
        useful = np.where(np.real(best) < active_parameters, best, active_parameters)
        return self.fresh.loss(
            useful * worth(active_parameters / useful, self.R_N), unique * worth(tokens / unique, self.R_D)
        )

    @property
    def fresh(self) -> Chinchilla:
        """The law of tokens seen once."""
        return Chinchilla(self.A, self.B, self.E, self.alpha, self.beta)

    def effective_tokens(self, tokens: Array, unique_tokens: Array) -> Array:
        """Returns how many fresh tokens the `tokens` are worth (eq. 5)."""
        unique = np.minimum(unique_tokens, tokens)
        return unique * worth(tokens / unique, self.R_D)

    def epochs_worth(self, epochs: Array) -> Array:
        """Returns how many epochs of fresh tokens so many epochs of the same ones are worth."""
        return worth(epochs, self.R_D)

    def optimum(self, compute: float, unique_tokens: float) -> Optimum:
        """Returns the least loss for `compute` = 6 N D FLOPs over so many unique tokens, at most 1000 epochs."""
        product = compute / FLOPS_PER_PARAMETER_AND_TOKEN
        found = optimize.minimize_scalar(
            lambda log_tokens: self.loss(product / math.exp(log_tokens), math.exp(log_tokens), unique_tokens),
            bounds=(math.log(unique_tokens) - 10, math.log(unique_tokens) + math.log(1000)),
            method="bounded",
            options={"xatol": 1e-9},
        )
        tokens = math.exp(found.x)
        return Optimum(product / tokens, tokens, found.fun)


def worth(times: Array, decay: Array) -> Array:
    """Returns what a thing seen `times` times is worth in things seen once: 1 + R* (1 - exp(-(times - 1) / R*))."""
    return 1 - decay * np.expm1(-(times - 1) / decay)


HOFFMANN = Published(
    Chinchilla(A=math.exp(6.0073404), B=math.exp(6.0179186), E=math.exp(0.5267228), alpha=0.33917084, beta=0.2849083),
    "Hoffmann et al. 2022 (arXiv:2203.15556), approach 3, unrounded from the TeX source",
    Ranges({"active_parameters": (70e6, 16e9), "tokens": (5e9, 500e9)}),
)
EPOCH = Published(
    Chinchilla(A=482.01, B=2085.43, E=1.8172, alpha=0.3478, beta=0.3658),
    "Besiroglu et al. 2024 (arXiv:2404.10102), the same runs read from the figure, n = 240",
    Ranges({"active_parameters": (70e6, 16e9), "tokens": (5e9, 500e9)}),
)
C4 = Published(
    Chinchilla(A=math.exp(6.255414), B=math.exp(7.3049974), E=math.exp(0.6254804), alpha=0.3526596, beta=0.3526596),
    "Muennighoff et al. 2023 (arXiv:2305.16264), appendix A, C4, alpha tied to beta",
    Ranges({"active_parameters": (7e6, 9e9), "tokens": (100e6, 900e9)}),
)
MUENNIGHOFF = Published(
    DataConstrained(**dataclasses.asdict(C4.law), R_D=15.387756, R_N=5.309743),
    "Muennighoff et al. 2023 (arXiv:2305.16264), eq. 17, 182 dense runs on C4",
    Ranges({"active_parameters": (7e6, 9e9), "tokens": (100e6, 900e9)}),
)
