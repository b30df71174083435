"""Seconds of one layer for one microbatch on one chip, by cause: products, attention core, elementwise, networks.

In: shape, layout, chip, sequence length, stack. Out: `Pass`, forward and backward. The additive model: nothing overlaps
unless the stack says so. Sources: Korthikanti et al. 2022 (2205.05198), sections 4 and 5; Dao 2023 (2307.08691).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import CallerError
from gpt4moe.plan.training.communication import Group, all_gather_seconds, all_reduce_seconds, all_to_all_seconds
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.stacks import MEMORY_EFFICIENCY, SMALL_DIMENSION, Stack, matmul_efficiency

ACTIVATION_BYTES = 2
# Bytes that a score passes through memory forward when attention is not fused: written by the product, read and written
# by the masked softmax, read and written by dropout (its mask too), read by the second product.
SCORE_BYTES = 11
FLASH_BACKWARD = 2.5  # five products for two: the scores are computed again
BACKWARD = 2.0


class Pass(NamedTuple):
    """Seconds of one pass through one layer. expert_products: the part of `products` that routed experts take."""

    products: float = 0.0
    expert_products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    overhead: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self)

    def plus(self, other: Pass, times: float = 1.0) -> Pass:
        """Returns this and `times` the other."""
        return Pass(*(mine + times * theirs for mine, theirs in zip(self, other, strict=True)))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer runs: everything that its time depends on but its kind."""

    shape: Shape
    layout: Layout
    chip: Chip
    stack: Stack
    sequence_length: int

    @property
    def tokens(self) -> float:
        """Tokens of one microbatch that one tensor group holds."""
        return self.layout.microbatch_rows * self.sequence_length / self.layout.context

    @property
    def sharded(self) -> int:
        """Chips over which norms and residuals are spread."""
        return self.layout.tensor if self.layout.sequence_parallel else 1

    def group(self, size: int, stride: int) -> Group:
        """A group of the stage's chips."""
        return Group(size, stride, self.layout.chips // self.layout.stage)


def forward(place: Place, *, experts: bool) -> Pass:
    """Returns the forward pass of a layer, with a feed-forward or with experts."""
    inside = _attention(place)
    return inside.plus(_experts(place) if experts else _feed_forward(place))


def backward(place: Place, done: Pass) -> Pass:
    """Returns the backward pass of a layer whose forward pass took `done`, recomputation not counted."""
    core = FLASH_BACKWARD if place.stack.flash else BACKWARD
    return Pass(
        products=BACKWARD * done.products,
        expert_products=BACKWARD * done.expert_products,
        attention=core * done.attention,
        elementwise=BACKWARD * done.elementwise,
        overhead=done.overhead,
        tensor=done.tensor,
        context=2 * done.context,
        expert=done.expert,
    )


def recomputed(place: Place, done: Pass) -> Pass:
    """Returns what is computed again: the forward pass, all of it but products with matrices, the core, or nothing.

    A fused core computes its scores again anyway; `backward` counts that.
    """
    if place.layout.remat == "full":
        return done
    if place.layout.remat == "dots":
        return done._replace(products=0.0, tensor=0.0)
    if place.layout.remat == "selective" and not place.stack.flash:
        return Pass(attention=done.attention)
    return Pass()


def product_seconds(chip: Chip, stack: Stack, rows: float, inner: float, columns: float, count: float = 1) -> float:
    """Returns the time of `count` products [rows, inner] x [inner, columns] in the precision of the stack."""
    if not rows * inner * columns * count:
        return 0.0
    smallest = min(rows, inner, columns)
    efficiency = matmul_efficiency(chip.name) * smallest / (smallest + SMALL_DIMENSION)
    efficiency *= 1 - stack.network_share
    return 2 * rows * inner * columns * count / (peak_ops(chip, stack) * efficiency)


def peak_ops(chip: Chip, stack: Stack) -> float:
    """Returns the chip's peak in the precision of the stack's products; raises where it has no such units."""
    if stack.matmul_bits == 16:
        return chip.peak_flops
    if chip.peak_8bit_ops is None or not chip.has_fp8:
        raise CallerError(f"matmul_bits={stack.matmul_bits} needs fp8 products, which {chip.name} lacks; take 16")
    return chip.peak_8bit_ops


def _traffic(place: Place, touched_bytes: float) -> float:
    return touched_bytes / (place.chip.bandwidth_bytes_per_second * MEMORY_EFFICIENCY)


def _attention(place: Place) -> Pass:
    """Norm, projections, core, residual."""
    shape, layout, tokens = place.shape, place.layout, place.tokens
    degree, width = layout.tensor, shape.num_heads * shape.head_dim
    heads = max(shape.num_kv_heads / degree, 1)  # fewer key heads than chips are there several times
    if shape.latent:
        products, projected = _latent_products(place)
    else:
        projected = width / degree + 2 * heads * shape.head_dim
        products = product_seconds(place.chip, place.stack, tokens, shape.model_dim, projected)
        products += product_seconds(place.chip, place.stack, tokens, width / degree, shape.model_dim)
    core, core_bytes = _core(place)
    touched = tokens * ACTIVATION_BYTES * (5 * shape.model_dim / place.sharded + 2 * projected) + core_bytes
    return Pass(
        products=products,
        attention=core + _traffic(place, core_bytes),
        elementwise=_traffic(place, touched - core_bytes),
        overhead=place.stack.layer_pass_seconds,
        tensor=_exposed_tensor(place, tokens),
        context=_context(place),
    )


def _latent_products(place: Place) -> tuple[float, float]:
    """Seconds of multi-head latent attention's projections, and the width of what they make on one chip."""
    shape, latent, tokens = place.shape, place.shape.latent, place.tokens
    heads = shape.num_heads / place.layout.tensor
    query, value = heads * (latent.plain_dim + latent.rotary_dim), heads * latent.value_dim
    up = heads * (latent.plain_dim + latent.value_dim)
    down = latent.key_value_rank + latent.rotary_dim
    steps = [
        (shape.model_dim, latent.query_rank or query),
        (latent.query_rank, query),
        (shape.model_dim, down),
        (latent.key_value_rank, up),
        (value, shape.model_dim),
    ]
    seconds = sum(product_seconds(place.chip, place.stack, tokens, *step) for step in steps)
    return seconds, query + up + down + latent.query_rank


def _core(place: Place) -> tuple[float, float]:
    """Seconds of scores and weighted values, and the bytes that unfused scores pass through memory."""
    shape, length = place.shape, place.sequence_length
    keys = length / 2 if place.stack.flash else length
    keys = min(keys, shape.window) if shape.window else keys
    width = shape.core_width / place.layout.tensor
    sixteen = dataclasses.replace(place.stack, matmul_bits=16)
    head = shape.core_width / shape.num_heads
    seconds = 2 * product_seconds(place.chip, sixteen, place.tokens, head, keys, width / head)
    if place.stack.flash:
        return seconds, 0.0
    return seconds, SCORE_BYTES * place.tokens * length * shape.num_heads / place.layout.tensor


def _feed_forward(place: Place) -> Pass:
    shape, hidden = place.shape, place.shape.hidden_dim / place.layout.tensor
    touched = place.tokens * ACTIVATION_BYTES * (5 * shape.model_dim / place.sharded + shape.matrices * hidden)
    return Pass(
        products=_two_products(place, place.tokens, hidden, 1),
        elementwise=_traffic(place, touched),
        tensor=_exposed_tensor(place, place.tokens),
    )


def _two_products(place: Place, rows: float, hidden: float, count: float) -> float:
    """Into the hidden dimension (twice that wide where gated) and out of it."""
    dim, wide = place.shape.model_dim, (place.shape.matrices - 1) * hidden
    into = product_seconds(place.chip, place.stack, rows, dim, wide, count)
    return into + product_seconds(place.chip, place.stack, rows, hidden, dim, count)


def expert_rows(place: Place) -> float:
    """Returns the rows that one chip's part of one expert multiplies: executed, with the room of a capacity factor."""
    shape, layout = place.shape, place.layout
    own = place.tokens / layout.tensor
    together = own * layout.expert * layout.expert_tensor
    return together * shape.experts_per_token * (shape.capacity_factor or 1) / shape.num_experts


def _experts(place: Place) -> Pass:
    """Router, dispatch, routed and shared experts, combine, residual."""
    shape, layout, stack = place.shape, place.layout, place.stack
    rows, here = expert_rows(place), shape.num_experts / layout.expert
    busiest = 1.0 if shape.capacity_factor else 1 + (stack.imbalance - 1) * (1 - 1 / layout.expert)
    hidden = shape.expert_hidden_dim / layout.expert_tensor
    own = place.tokens / layout.tensor
    routed = own * shape.experts_per_token * (shape.capacity_factor or 1)
    shared = shape.shared_hidden_dim / layout.tensor
    moved = 4 * shape.model_dim * routed + busiest * rows * here * (2 * shape.model_dim + shape.matrices * hidden)
    residual = place.tokens * (5 * shape.model_dim / place.sharded + shape.matrices * shared)
    products = _two_products(place, place.tokens, shared, 1)
    products += product_seconds(place.chip, stack, own, shape.model_dim, shape.num_experts)
    expert_group = place.group(layout.expert, layout.expert_tensor)
    payload = routed * shape.model_dim
    limit = stack.domain_limit / shape.experts_per_token if stack.domain_limit else 1.0
    there = all_to_all_seconds(payload * stack.matmul_bits / 8, place.chip, expert_group, stack, limit)
    back = all_to_all_seconds(payload * ACTIVATION_BYTES, place.chip, expert_group, stack, limit)
    return Pass(
        products=products,
        expert_products=busiest * _two_products(place, rows, hidden, here),
        elementwise=_traffic(place, ACTIVATION_BYTES * (moved + residual)),
        overhead=stack.layer_pass_seconds,
        tensor=_tensor_of_experts(place, rows * here),
        expert=there + back,
    )


def _tensor_of_experts(place: Place, rows: float) -> float:
    """Sums over the chips that share an expert, and over those that share the shared experts."""
    layout = place.layout
    group = place.group(layout.expert_tensor, 1)
    seconds = all_reduce_seconds(rows * place.shape.model_dim * ACTIVATION_BYTES, place.chip, group, place.stack)
    seconds *= 1 - place.stack.tensor_overlap
    return seconds + (_exposed_tensor(place, place.tokens) if place.shape.shared_hidden_dim else 0.0)


def _exposed_tensor(place: Place, tokens: float) -> float:
    """One sum of activations over the tensor group, or the all-gather and reduce-scatter of the same bytes."""
    group = place.group(place.layout.tensor, 1)
    activation_bytes = tokens * place.shape.model_dim * ACTIVATION_BYTES
    seconds = all_reduce_seconds(activation_bytes, place.chip, group, place.stack)
    return (1 - place.stack.tensor_overlap) * seconds


def _context(place: Place) -> float:
    """Keys and values of the whole row gathered over the context group (a ring sends as many bytes)."""
    layout, shape = place.layout, place.shape
    if layout.context == 1:
        return 0.0
    heads = max(shape.cache_width / layout.tensor, min(shape.cache_width, 2 * shape.head_dim))
    whole = layout.microbatch_rows * place.sequence_length * heads * ACTIVATION_BYTES
    group = place.group(layout.context, layout.tensor)
    return (1 - place.stack.context_overlap) * all_gather_seconds(whole, place.chip, group, place.stack)
