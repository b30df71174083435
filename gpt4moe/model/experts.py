"""Stacked feed-forward experts over rows grouped by expert."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Float

from gpt4moe.config.moe import MoeConfig
from gpt4moe.model.dispatch import Dispatched
from gpt4moe.model.grouped_matmul import block_matmul, expert_matmul
from gpt4moe.model.layers import activate, normal_parameter
from gpt4moe.types import Array


class Experts(nnx.Module):
    """E feed-forwards, SwiGLU where `gated` and plain GELU otherwise, no biases; an empty row stays zero.

    gate, up: [E, D, F]; down: [E, F, D], with a leading layers dim where stacked.
    """

    def __init__(self, layers: int, dim: int, config: MoeConfig, out_scale: float, rngs: nnx.Rngs):
        inward = (config.num_experts, dim, config.hidden_dim), ("experts", "embed", "mlp"), dim**-0.5
        outward = (config.num_experts, config.hidden_dim, dim), ("experts", "mlp", "embed")
        self.gate = normal_parameter(rngs, layers, *inward) if config.gated else None
        self.up = normal_parameter(rngs, layers, *inward)
        self.down = normal_parameter(rngs, layers, *outward, config.hidden_dim**-0.5 * out_scale)

    def __call__(self, dispatched: Dispatched) -> Float[Array, "X C D"]:
        """Returns y_XCD, the rows of every block after its expert."""

        def multiply(rows: Array, w: nnx.Param) -> Array:
            if dispatched.block_expert_X is None:
                return expert_matmul(rows, w[...])
            return block_matmul(rows, w[...], dispatched.block_expert_X, dispatched.num_blocks)

        rows_XCD = dispatched.rows_XCD
        gate_XCF = None if self.gate is None else multiply(rows_XCD, self.gate)
        return multiply(activate(multiply(rows_XCD, self.up), gate_XCF), self.down)
