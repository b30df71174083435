"""What our compiled training step holds on a chip beside what every trainer does: bytes by cause.

In: shape, layout, microbatches of a step. Out: bytes, which `search` adds to those that the runtime reserves. Checked
against programs that the TPU compiler made (`plan.verify`, tests/plan/search/test_verify.py).
"""

from __future__ import annotations

from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.pipeline import num_ticks
from gpt4moe.accounting.shape import Shape
from gpt4moe.plan.training.layer_time import ACTIVATION_BYTES
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.memory import Numerics, reserved_bytes_of, stage_parameters

# Rows on their way to experts and back, once forward and, at the same moment, their gradients; the former are counted
# with the layer that is computed again, where one is.
EXCHANGE_COPIES, IN_WORKING_LAYER = 4, 2
# Beside the sum of gradients: those of the pass at hand, and the sum that becomes of the two.
GRADIENT_COPIES = 2
# Of a chip's memory, left free: what compiled programs hold beyond the prediction (the reference on v6e: 0.015).
UNEXPLAINED_SHARE = 0.03


def kept_free_bytes(chip: Chip) -> float:
    """Returns what no layout of ours may fill: the runtime's, and what the prediction may miss."""
    return reserved_bytes_of(chip) + UNEXPLAINED_SHARE * chip.memory_bytes


def beside_bytes(shape: Shape, layout: Layout, numerics: Numerics, sequence_length: int, microbatches: int) -> float:
    """Returns the bytes that our step holds beyond `memory.estimate` of the same layout."""
    tokens = layout.microbatch_rows * sequence_length / layout.context
    return (
        _gradients_of_a_pass(shape, layout, numerics, microbatches)
        + _exchange(shape, layout, tokens)
        + _ticks(shape, layout, tokens, microbatches)
    )


def _gradients_of_a_pass(shape: Shape, layout: Layout, numerics: Numerics, microbatches: int) -> float:
    """Where a step has several passes, the gradients of one beside the sum before it and after it (`train.step`)."""
    several = layout.passes > 1 if layout.stage > 1 else microbatches > 1
    if not several:
        return 0.0
    dense, routed, _ = stage_parameters(shape, layout, 0)
    if layout.zero >= 2:
        dense, routed = dense / layout.state_degree, routed / layout.expert_zero_degree
    return GRADIENT_COPIES * (dense + routed) * numerics.gradient_bytes


def _exchange(shape: Shape, layout: Layout, tokens: float) -> float:
    """Rows for experts lie whole on every chip of a tensor group, which holds a part of each expert."""
    if not shape.num_moe_layers:
        return 0.0
    routed = shape.experts_per_token * (shape.capacity_factor or 1)
    copies = EXCHANGE_COPIES - (IN_WORKING_LAYER if layout.remat in ("dots", "full") else 0)
    return copies * tokens * routed * shape.model_dim * ACTIVATION_BYTES


def _ticks(shape: Shape, layout: Layout, tokens: float, microbatches: int) -> float:
    """A pipeline keeps its layers' inputs for every tick of a pass, idle ones too, and what a tick begins with."""
    if layout.stage == 1:
        return 0.0
    of_a_pass = microbatches // layout.passes
    ticks = num_ticks(layout.stage, of_a_pass, layout.virtual_stages)
    layers = shape.num_layers / (layout.stage * layout.virtual_stages)
    kept = ticks * (layers + 1) - of_a_pass * layout.virtual_stages * layers
    spread = layout.tensor if layout.sequence_parallel else 1
    return kept * tokens * shape.model_dim * ACTIVATION_BYTES / spread
