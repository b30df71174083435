"""FLOPs that one chip executes in a training step, waste included: what the compiled program is held against.

Model FLOPs (`accounting.flops`) say what the mathematics needs. Executed ones add recomputation, places of experts that
stay empty, masked scores inside a block, ticks of a pipeline without work, and what several chips compute alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from gpt4moe.accounting import pipeline, vision
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.run import RunConfig

# Products of the backward pass for each of the forward: one for the input's gradient, one for the matrix'.
BACKWARD = 2
# The cross-entropy computes its logits again in the backward pass.
HEAD_PRODUCTS = 1 + 1 + BACKWARD
CORE_PRODUCTS = 2  # scores and weighted values
CORE_AGAIN = 1 / 2  # of these, what cross-attention makes again in its own backward pass: the scores


@dataclasses.dataclass(frozen=True)
class CoreKernel:
    """How attention is computed: keys end where each `block` of queries does; products of its backward pass."""

    block: int
    backward_products: int


@dataclasses.dataclass(frozen=True)
class Executed:
    """FLOPs of one step on one chip by component; a multiply-add is two. vision: images, and tokens that read them."""

    attention: float
    attention_core: float
    experts: float
    shared_expert: float
    dense: float
    router: float
    head: float
    vision: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(dataclasses.astuple(self))


def train_step(run: RunConfig, sizes: Mapping[str, int], kernel: CoreKernel) -> Executed:
    """Returns what a chip executes in the step of the largest batch, on a mesh of these axis sizes.

    Dropless experts are counted at the choices there are, without the padding of blocks.
    """
    model, length = run.model, run.data.sequence_length
    rows = run.train.ramp[-1][1] / length / _degree(sizes, *run.rules.batch_axes)
    tokens = rows * length / sizes["context"]
    layers = executed_layers(run, sizes)
    all_layers = _all_layers(model, layers)
    saved, again = _passes(model.remat, saved=True), _passes(model.remat, saved=False)
    heads, hidden = (_degree(sizes, *run.rules.axes_of(dim)) for dim in ("heads", "mlp"))
    parted = sizes["tensor"] if run.mesh.sequence_parallel else 1
    attention = _attention(run, sizes, heads, parted)
    core = (
        2 * _pairs(length, sizes["context"], kernel.block) * rows * model.head_dim * model.attention.num_heads / heads
    )
    core_products = CORE_PRODUCTS * (again - BACKWARD) + kernel.backward_products
    matrices = 3 if model.moe.gated else 2
    places = _places(run, sizes, rows)
    dense = 2 * model.model_dim * (model.dense_hidden_dim or 0) * matrices / hidden
    shared = 2 * model.model_dim * model.moe.shared_hidden_dim * matrices / hidden
    experts = 2 * model.model_dim * model.moe.hidden_dim * matrices / hidden
    expert_passes = saved if model.moe.num_experts == 1 and model.moe.capacity_factor is None else again
    router = 2 * model.model_dim * model.moe.num_experts / parted
    head = 2 * model.model_dim * model.vocab_size / _degree(sizes, *run.rules.axes_of("vocab"))
    return Executed(
        attention=all_layers * tokens * attention * saved,
        attention_core=all_layers * core * core_products,
        experts=layers * places * experts * expert_passes,
        shared_expert=layers * tokens * shared * saved,
        dense=(all_layers - layers) * tokens * dense * saved,
        router=layers * tokens * router * again,
        head=tokens * head * HEAD_PRODUCTS,
        vision=_vision(run, sizes, rows, tokens),
    )


def decode_step(run: RunConfig, sizes: Mapping[str, int], num_rows: int, num_slots: int, expert_rows: int) -> Executed:
    """Returns what a chip executes to decode one token of each row, its query against all slots of the row's cache.

    expert_rows: rows that the experts on a chip multiply, with what fills up their blocks.
    """
    model = run.model
    rows = num_rows / _degree(sizes, *run.rules.batch_axes)
    layers = executed_layers(run, sizes)
    all_layers = _all_layers(model, layers)
    heads, hidden = (_degree(sizes, *run.rules.axes_of(dim)) for dim in ("heads", "mlp"))
    matrices = 3 if model.moe.gated else 2
    matrix = 2 * model.model_dim * matrices / hidden
    vocabulary = _degree(sizes, *run.rules.axes_of("vocab"))
    core = 2 * CORE_PRODUCTS * model.attention.num_heads / heads * model.head_dim * num_slots
    return Executed(
        attention=all_layers * rows * _attention(run, sizes, heads, 1),
        attention_core=all_layers * rows * core,
        experts=layers * expert_rows * matrix * model.moe.hidden_dim,
        shared_expert=layers * rows * matrix * model.moe.shared_hidden_dim,
        dense=(all_layers - layers) * rows * matrix * (model.dense_hidden_dim or 0),
        router=layers * rows * 2 * model.model_dim * model.moe.num_experts,
        head=rows * 2 * model.model_dim * model.vocab_size / vocabulary,
    )


def executed_layers(run: RunConfig, sizes: Mapping[str, int]) -> float:
    """Superblocks that a chip runs its whole share of a batch through: all of them without a pipeline.

    With one, at every tick each stage runs the slots of its longest chunk over a microbatch, work or not.
    """
    stages = sizes["stage"]
    if stages == 1:
        return run.model.num_moe_layers
    longest = max(run.mesh.chunk_sizes(run.model.num_moe_layers, stages))
    microbatches = run.stage_microbatches(sizes)
    ticks = pipeline.num_ticks(stages, microbatches, run.mesh.virtual_stages)
    return ticks * longest / microbatches


def _vision(run: RunConfig, sizes: Mapping[str, int], rows: float, tokens: float) -> float:
    """FLOPs of a chip's rows with as many images as they have room for; context and stages make the images alike."""
    model, images = run.model, run.data.images
    if model.vision is None or images is None:
        return 0.0
    cross = model.vision.cross_attention
    saved, again = _passes(model.remat, saved=True), _passes(model.remat, saved=False)
    features = images.per_row * model.vision.features_per_image(images.frames)
    core = 2 * CORE_PRODUCTS * model.num_cross_attention_layers * features * cross.num_heads * cross.head_dim
    of_token = saved * vision.cross_attention_flops_per_token(model) + (again + CORE_AGAIN) * core
    of_image = saved * vision.flops_per_image(model, images.frames)
    return (tokens * of_token + rows * images.per_row * of_image) / _degree(sizes, *run.rules.axes_of("heads"))


def _all_layers(model: ModelConfig, superblocks: float) -> float:
    """Layers of so many executed superblocks and, once, those before them: every stage runs these for all its rows."""
    return superblocks * model.moe_every + model.leading_dense_layers


def _attention(run: RunConfig, sizes: Mapping[str, int], heads: int, parted: int) -> float:
    """FLOPs of one token's projections on one chip; keys and values that all heads share are made by every chip.

    Where the residual stream's T is divided, each makes those of its own tokens.
    """
    attention, head_dim = run.model.attention, run.model.head_dim
    kv_heads = attention.num_kv_heads / _degree(sizes, *run.rules.axes_of("kv_heads")) / parted
    return 2 * run.model.model_dim * head_dim * (2 * attention.num_heads / heads + 2 * kv_heads)


def _pairs(length: int, context: int, block: int) -> float:
    """Pairs of query and key in a row that one chip scores: all keys up to the end of each block of queries.

    A chip with part of a row's queries (`context`) goes over all keys.
    """
    if context > 1:
        return length / context * length
    ends = [min(start + block, length) for start in range(0, length, block)]
    return sum((end - start) * end for start, end in zip(range(0, length, block), ends, strict=True))


def _places(run: RunConfig, sizes: Mapping[str, int], rows: float) -> float:
    """Rows that one chip's experts multiply in a step, empty places included."""
    moe, length = run.model.moe, run.data.sequence_length
    sharing = [axis for axis in ("context", "tensor") if axis not in run.rules.axes_of("mlp")]
    if moe.capacity_factor is None:
        return rows * length * moe.experts_per_token / _degree(sizes, *sharing)
    return rows * moe.num_experts * moe.expert_capacity(length) / _degree(sizes, *sharing)


def _passes(remat: str, *, saved: bool) -> int:
    """Products for each of the forward pass, itself included; `saved`: those that the policy `dots` keeps."""
    recomputed = remat == "full" or (remat == "dots" and not saved)
    return 1 + recomputed + BACKWARD


def _degree(sizes: Mapping[str, int], *axes: str) -> int:
    return math.prod(sizes[axis] for axis in axes)
