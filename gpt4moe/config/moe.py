"""What a mixture-of-experts layer is: experts, router, capacity, auxiliary losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from gpt4moe.config.check import require, require_count, require_flag, require_not_negative, require_positive

# Implementations of `gpt4moe.model.grouped_matmul.block_matmul`, the product of dropless tokens with their experts.
GROUPED_PRODUCTS = ("plain", "loop", "ragged", "triton", "mosaic")


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Experts, router and dispatch of one mixture-of-experts layer.

    `gated` experts are SwiGLU (three matrices), others plain GELU (two). `capacity_factor` None is dropless;
    a number c gives every expert room for ceil(T * K / E * c) tokens of each row, evaluation and decoding are
    always dropless. `load_balance_weight` multiplies E * sum_e f_e P_e, which is 1 at uniform routing;
    `router_z_weight` multiplies the mean squared log-partition of the router logits (ST-MoE, eq. 5).
    `router` is a function of the user's own behind the contract of `gpt4moe.model.router`; None is top-k softmax.
    `grouped_product` names the implementation that multiplies dropless tokens; None is the fastest for backend and
    shapes.
    """

    num_experts: int
    experts_per_token: int
    hidden_dim: int
    gated: bool = True
    shared_hidden_dim: int = 0
    capacity_factor: float | None = None
    normalize_gates: bool = True
    load_balance_weight: float = 0.01
    router_z_weight: float = 0.001
    router: Callable | None = None
    grouped_product: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_experts", "experts_per_token", "hidden_dim"):
            require_count(name, getattr(self, name))
        for name in ("gated", "normalize_gates"):
            require_flag(name, getattr(self, name))
        require(
            self.experts_per_token <= self.num_experts,
            "experts_per_token",
            self.experts_per_token,
            f"must be at most num_experts ({self.num_experts})",
            "lower EXPERTS_PER_TOKEN or raise NUM_EXPERTS",
        )
        require(
            not (self.normalize_gates and self.experts_per_token == 1 and self.num_experts > 1),
            "normalize_gates",
            self.normalize_gates,
            "gives the router no gradient when experts_per_token is 1 (the gate is always 1)",
            "set normalize_gates=False",
        )
        require_count("shared_hidden_dim", self.shared_hidden_dim, least=0)
        if self.capacity_factor is not None:
            require_positive("capacity_factor", self.capacity_factor)
        for name in ("load_balance_weight", "router_z_weight"):
            require_not_negative(name, getattr(self, name))
        require(self.router is None or callable(self.router), "router", self.router, "must be a function or None")
        names = f"must be one of {list(GROUPED_PRODUCTS)} or None"
        require(self.grouped_product in (None, *GROUPED_PRODUCTS), "grouped_product", self.grouped_product, names)
