"""The law of sparsity: total parameters, tokens and the share of experts left out to loss (Abnar et al. 2025)."""

from __future__ import annotations

import dataclasses

import numpy as np

from gpt4moe.analysis.scaling.law import Array, Law, Published, Ranges, constant


@dataclasses.dataclass(frozen=True)
class Sparse(Law):
    """L = a/N^alpha + b/D^beta + c/(1-S)^lambda + d/((1-S)^delta N^gamma) + e (Abnar et al. 2025, eq. 6).

    N is ALL parameters. `lambda_` comes out NEGATIVE: the term of c falls as the model gets sparser, and the term of d
    rises. Ten constants: 99 % of the variance of what was fitted and 68 % of the held-out S = 0.98. Show it, do not
    extrapolate it.
    """

    a: float = constant((0, 5, 10), log=True)
    alpha: float = constant((0.2, 0.4, 0.6))
    b: float = constant((0, 5, 10), log=True)
    beta: float = constant((0.2, 0.4, 0.6))
    c: float = constant((-2, -1, 0), log=True)
    lambda_: float = constant((-0.5, -0.2, 0.2))
    d: float = constant((0, 2, 4), log=True)
    delta: float = constant((-0.2, 0.1, 0.4))
    gamma: float = constant((0.1, 0.2, 0.4))
    e: float = constant((-1, 0, 0.7), log=True)

    def loss(self, total_parameters: Array, tokens: Array, sparsity: Array) -> Array:
        """Returns nats per token."""
        met = 1 - np.asarray(sparsity, np.float64)
        dense = self.a / total_parameters**self.alpha + self.b / tokens**self.beta + self.e
        return dense + self.c / met**self.lambda_ + self.d / (met**self.delta * total_parameters**self.gamma)


def sparsity(num_experts: Array, experts_per_token: Array) -> Array:
    """Returns the share of experts that a token leaves out, (E - K) / E."""
    return (num_experts - experts_per_token) / num_experts


ABNAR = Published(
    Sparse(
        a=16612.50, alpha=0.5962, b=5455.67, beta=0.3954, c=0.4598, lambda_=-0.1666,
        d=17.26, delta=0.1603, gamma=0.1595, e=0.94,
    ),
    "Abnar et al. 2025 (arXiv:2501.12370), table 3; R^2 99 % on what was fitted, 68 % on S = 0.98",
    Ranges({"sparsity": (0, 0.95)}),
)  # fmt: skip
