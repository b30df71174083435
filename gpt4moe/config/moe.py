"""What a mixture-of-experts layer is: experts, router, capacity, auxiliary losses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

from gpt4moe.config.check import require, require_count, require_flag, require_not_negative, require_positive

LOAD_BALANCE_SCOPES = ("row", "microbatch", "batch")
DROP_PRIORITIES = ("position", "gate")
# Implementations of `gpt4moe.model.grouped_matmul.block_matmul`, the product of dropless tokens with their experts.
GROUPED_PRODUCTS = ("plain", "loop", "ragged", "triton", "mosaic")


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Experts, router and dispatch of one mixture-of-experts layer.

    `gated` experts are SwiGLU (three matrices), others plain GELU (two). `capacity_factor` None is dropless;
    a number c gives every expert room for ceil(T * K / E * c) tokens of each row, evaluation and decoding are
    always dropless. What is dropped in training is not causal (but for K = 1 by `position`): a later token may take
    the place of an earlier one. `load_balance_weight` multiplies E * sum_e f_e P_e, which is 1 at uniform routing;
    `router_z_weight` multiplies the mean squared log-partition of the router logits (ST-MoE, eq. 5).
    `load_balance_scope` is what f and P are taken over: each `row`, each `microbatch`, or the whole `batch`.
    `router` is a function behind the contract of `gpt4moe.model.router`: one of `gpt4moe.model.routers` or of the
    user's own; None is top-k softmax. What some of them read: `gate_scale` multiplies the gates (the routed scaling
    factor of DeepSeek-V3); `router_noise` is the deviation of the noise on logits in units of 1/E; `num_groups` and
    `groups_per_token` limit a token to experts of so many groups. `bias_rate` > 0 balances loads without a loss: a
    bias on what experts are selected by moves by this much, once a step (Wang et al. 2024). `drop_priority` says who
    finds a place where capacity is short: the earlier token (`position`) or the one of the larger gate (`gate`).
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
    load_balance_scope: str = "row"
    router: Callable | None = None
    gate_scale: float = 1.0
    router_noise: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    bias_rate: float = 0.0
    drop_priority: str = "position"
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
            not (self.router is None and self.normalize_gates and self.experts_per_token == 1 and self.num_experts > 1),
            "normalize_gates",
            self.normalize_gates,
            "gives the router no gradient when experts_per_token is 1 (the gate is always 1)",
            "set moe.MoeConfig.normalize_gates=False",
        )
        require_count("shared_hidden_dim", self.shared_hidden_dim, least=0)
        if self.capacity_factor is not None:
            require_positive("capacity_factor", self.capacity_factor)
        for name in ("load_balance_weight", "router_z_weight", "router_noise", "bias_rate"):
            require_not_negative(name, getattr(self, name))
        require_positive("gate_scale", self.gate_scale)
        listed = {"load_balance_scope": LOAD_BALANCE_SCOPES, "drop_priority": DROP_PRIORITIES}
        for name, choices in (listed | {"grouped_product": (None, *GROUPED_PRODUCTS)}).items():
            value = getattr(self, name)
            require(value in choices, name, value, f"must be in {choices}")
        placed = self.drop_priority == "position" or self.capacity_factor is not None
        mend = "set CAPACITY_FACTOR, or leave drop_priority out"
        require(
            placed, "drop_priority", self.drop_priority, "is read where capacity is short; this layer drops none", mend
        )
        self._check_groups()
        mend = (
            f"set --gin.ROUTER=@routers.{self.router}" if isinstance(self.router, str) else "name one as @routers.top_k"
        )
        require(self.router is None or callable(self.router), "router", self.router, "must be a function or None", mend)

    def expert_capacity(self, tokens: int) -> int:
        """Places at one expert for a group of `tokens`: ceil(U * K / E * capacity_factor), at most U; None is 1."""
        # The factor is the decimal that was written: 1.1 of ten places are eleven, in binary fractions twelve.
        share = Fraction(tokens * self.experts_per_token, self.num_experts)
        return min(tokens, math.ceil(share * Fraction(str(self.capacity_factor or 1))))

    def _check_groups(self) -> None:
        for name in ("num_groups", "groups_per_token"):
            require_count(name, getattr(self, name))
        groups, chosen = self.num_groups, self.groups_per_token
        require(self.num_experts % groups == 0, "num_groups", groups, f"must divide num_experts ({self.num_experts})")
        require(chosen <= groups, "groups_per_token", chosen, f"must be at most num_groups ({groups})")
        reachable = chosen * self.num_experts // groups
        constraint = f"must be at most the experts of groups_per_token groups ({reachable})"
        mend = "raise groups_per_token or lower num_groups"
        require(self.experts_per_token <= reachable, "experts_per_token", self.experts_per_token, constraint, mend)
