"""The shape of a published run: one of the shapes we know, or one worked out from the widths and counts of its row.

In: a `Row`. Out: a `Shape` whose parameters are those of the row as near as its widths allow.
"""

from __future__ import annotations

import re

from gpt4moe.accounting import parameters
from gpt4moe.accounting.published import SHAPES, gpt
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import CallerError
from gpt4moe.plan.published.measurements import NotTold, Row

# A published shape is the row's where widths agree and parameters are this near.
NEAR = 0.04
# Beyond, parameters and widths are of two models. The widest feed-forward is T5's of 11B, 64 times its d_model.
MOST_OFF, MOST_HIDDEN = 1.5, 64
# Models that are no GPT have SwiGLU here, Llama 2's vocabulary and, with experts, eight key heads.
USUAL_VOCAB_SIZE, USUAL_KV_HEADS = 32_000, 8
EXPERTS_IN_NAME = re.compile(r"(\d+)e(\d+)(?!\d)")
CAPACITY_IN_NAME = re.compile(r"cf(\d+(?:\.\d+)?)")


def shape_of_row(row: Row, vocab_size: int = 51_200, *, is_gpt: bool = False) -> Shape:
    """Returns the shape; raises `CallerError` with the row's place where nothing fits its counts.

    vocab_size: of a GPT model, which published counts often leave out. is_gpt: the row is one, whatever it looks like.
    """
    shape = _shape_of_row(row, vocab_size, is_gpt)
    found, widest = parameters.count(shape).total, max(shape.hidden_dim or 0, shape.expert_hidden_dim or 0)
    wide = widest > MOST_HIDDEN * row.d_model
    if wide or not 1 / MOST_OFF < found / row.params_total < MOST_OFF:
        said = f"a feed-forward of {widest:,}" if wide else f"layers and d_model, which give {found:.4g}"
        raise CallerError(f"{row.where}, column params_total: {row.params_total:g} does not go with {said}; check them")
    return shape


def _shape_of_row(row: Row, vocab_size: int, is_gpt: bool) -> Shape:
    widths = (row.layers, row.d_model, row.n_heads)
    alike = [shape for shape in SHAPES if (shape.num_layers, shape.model_dim, shape.num_heads) == widths]
    nearest = min(alike, key=lambda shape: _off(shape, row), default=None)
    if nearest and _off(nearest, row) < NEAR and _active_is_near(nearest, row) and not is_gpt:
        return nearest
    if row.params_active < 0.95 * row.params_total:
        return _with_experts(row)
    plain = gpt(row.name, *widths, vocab_size, learned_positions=row.seq or 2048)
    in_layers = parameters.count(plain).total - vocab_size * row.d_model
    is_near = _off(plain, row) < NEAR or abs(in_layers / row.params_total - 1) < NEAR
    return plain if is_near or is_gpt else _gated(row)


def _active_is_near(shape: Shape, row: Row) -> bool:
    """Papers round active parameters to a digit or two, with embeddings or without."""
    return abs(parameters.count_active(shape) / row.params_active - 1) < 3 * NEAR


def _off(shape: Shape, row: Row) -> float:
    return abs(parameters.count(shape).total / row.params_total - 1)


def _gated(row: Row) -> Shape:
    """Heads of the row without sharing, 128 to 256 wide, the feed-forward as wide as the parameters left for it."""
    dim, layers = row.d_model, row.layers
    head_dim = min(max(dim // row.n_heads, 128), 256)
    attention = 4 * dim * row.n_heads * head_dim
    left = row.params_total - layers * attention - 2 * USUAL_VOCAB_SIZE * dim
    hidden = round(left / (3 * layers * dim))
    if hidden < 1:
        least = layers * attention + 2 * USUAL_VOCAB_SIZE * dim
        raise CallerError(
            f"{row.where}, column params_total: {row.params_total:g} must be above what attention and vocabulary of "
            f"these widths take ({least:.4g})"
        )
    return Shape(row.name, layers, dim, row.n_heads, row.n_heads, head_dim, USUAL_VOCAB_SIZE, _even(hidden))


def _with_experts(row: Row) -> Shape:
    """Experts in every layer; their width from total minus active, the head's from what is left of active."""
    found = EXPERTS_IN_NAME.search(row.name)
    if not found:
        said = "is no model we know, and does not say its experts, as in moe-16e2"
        raise NotTold(f"{row.where}, column name: {row.name!r} {said}")
    experts, taken = int(found[1]), int(found[2])
    if not 0 < taken < experts:
        raise CallerError(f"{row.where}, column name: {found[0]!r} must have more experts than a token takes")
    dim, layers = row.d_model, row.layers
    one = (row.params_total - row.params_active) / (layers * (experts - taken))
    capacity = CAPACITY_IN_NAME.search(row.name)
    left = (row.params_active - 2 * USUAL_VOCAB_SIZE * dim) / layers - taken * one
    heads = min(USUAL_KV_HEADS, row.n_heads)
    widths = {size: abs(dim * size * 2 * (row.n_heads + heads) - left) for size in (64, 128, 256)}
    return Shape(
        row.name, layers, dim, row.n_heads, heads, min(widths, key=widths.get), USUAL_VOCAB_SIZE,
        num_moe_layers=layers, num_experts=experts, experts_per_token=taken,
        expert_hidden_dim=_even(max(round(one / (3 * dim)), 1)),
        capacity_factor=float(capacity[1]) if capacity else None,
    )  # fmt: skip


def _even(width: int) -> int:
    """The multiple of 256 nearest to a width worked out: rounded parameter counts give no better."""
    return max(round(width / 256), 1) * 256
