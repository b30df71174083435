"""Bytes on the fullest chip: weights, gradients, optimizer under ZeRO, activations by remat and schedule.

In: shape, layout, chip, sequence length, numerics. Out: `MemoryEstimate`, per part and with the stage named. Sources:
Korthikanti et al. 2022 (2205.05198), equations 1 to 5; Rajbhandari et al. 2020 (1910.02054).
"""

from __future__ import annotations

import dataclasses
import functools

from gpt4moe.accounting import memory as exact
from gpt4moe.accounting import parameters
from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.shape import Shape, shape_of
from gpt4moe.config.check import require_count
from gpt4moe.config.model import ModelConfig
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.schedules import SCHEDULES

# CUDA's context, NCCL's buffers, fragments: BLOOM's measured bytes exceed the formulas by 3.6 GB. A TPU's runtime takes
# less, and its compiler lays out all buffers before the program runs.
RESERVED_BYTES, TPU_RESERVED_BYTES = 3.6e9, 0.5e9


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Bytes that training holds for one parameter, and for one activation.

    master: a copy in float32 beside 16-bit weights. moments: the optimizer's state. logit: of one logit, loss and its
    gradient among it. dropout: masks of a byte are kept. flash: scores are not kept.
    """

    name: str
    weight_bytes: float
    gradient_bytes: float
    master_bytes: float
    moment_bytes: float
    activation_bytes: float = 2
    logit_bytes: float = 10
    dropout: bool = False
    flash: bool = True

    @property
    def optimizer_bytes(self) -> float:
        """What ZeRO-1 shards."""
        return self.master_bytes + self.moment_bytes


_OURS = exact.FLOAT32_BYTES
NUMERICS = {
    item.name: item
    for item in (
        Numerics("mixed_adam", 2, 4, 4, 8),  # bf16 with float32 gradients, as Megatron: 18
        Numerics("mixed_adam_16", 2, 2, 4, 8),  # gradients in 16 bits: 16
        Numerics("float32_adam", _OURS, _OURS, 0, exact.TRAIN_BYTES_BESIDE_PARAMETER - _OURS),  # our trainer: 16
        Numerics("fp8_adam", 1, 4, 4, 4),  # DeepSeek-V3: 8-bit weights, moments in bf16
        Numerics("bfloat16", 2, 2, 0, 4),  # weights and moments all in 16 bits
        Numerics("adafactor", 4, 4, 0, 0.01),  # factored second moments
        Numerics("korthikanti", 2, 4, 4, 8, dropout=True, flash=False),
    )
}
MIXED_ADAM = NUMERICS["mixed_adam"]


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one chip of `most_loaded_stage`, counted from 0. fits and spare_bytes: against the chip's memory.

    gathered: two layers whole, under ZeRO-3. working: the layer that is being computed again.
    """

    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    activation_bytes: float
    logit_bytes: float
    gathered_bytes: float
    working_bytes: float
    reserved_bytes: float
    most_loaded_stage: int
    chip_bytes: float
    stage_bytes: tuple[float, ...] = ()

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by what they are for."""
        names = ("weight", "gradient", "optimizer", "activation", "logit", "gathered", "working", "reserved")
        return {name: getattr(self, f"{name}_bytes") for name in names}

    @functools.cached_property
    def total_bytes(self) -> float:
        """Everything that is there at once."""
        return sum(self.parts.values())

    @property
    def state_bytes(self) -> float:
        """What no smaller batch makes smaller: weights, gradients, optimizer, gathered layers, what is reserved."""
        return self.total_bytes - self.activation_bytes - self.logit_bytes - self.working_bytes

    @property
    def spare_bytes(self) -> float:
        """What stays free; negative where it does not fit."""
        return self.chip_bytes - self.total_bytes

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.spare_bytes >= 0


def estimate(
    shape: Shape | ModelConfig, layout: Layout, chip: Chip, *, sequence_length: int, microbatches: int | None = None,
    numerics: Numerics = MIXED_ADAM, reserved_bytes: float | None = None,
) -> MemoryEstimate:  # fmt: skip
    """Returns the bytes of training on a chip of the fullest stage.

    microbatches: of one replica in a step, None for more than are ever in flight. reserved_bytes: what runtime and
    libraries take, None for the usual of the chip's kind.
    """
    shape = shape_of(shape)
    layout.check(shape)
    require_count("sequence_length", sequence_length)
    if reserved_bytes is None:
        reserved_bytes = reserved_bytes_of(chip)
    most = microbatches or 4 * layout.stage * layout.virtual_stages
    found = _stages(shape, layout, numerics, sequence_length, most)
    totals = {stage: sum(parts.values()) + reserved_bytes for stage, parts in found.items()}
    fullest = max(totals, key=totals.get)
    return MemoryEstimate(
        **found[fullest], reserved_bytes=reserved_bytes, most_loaded_stage=fullest,
        chip_bytes=chip.memory_bytes, stage_bytes=tuple(totals.values()),
    )  # fmt: skip


def reserved_bytes_of(chip: Chip) -> float:
    """Returns what runtime and libraries usually take of a chip."""
    return TPU_RESERVED_BYTES if chip.name.startswith("tpu") else RESERVED_BYTES


@functools.lru_cache(maxsize=4096)
def _stages_to_look_at(num_layers: int, num_dense: int, stages: int) -> tuple[int, ...]:
    """The first, the second, the last, and the first with experts; those between hold less than one of these."""
    chosen = {0, min(1, stages - 1), stages - 1}
    with_experts = (index for index, (_, moe) in enumerate(_layers_of_stages(num_layers, num_dense, stages)) if moe)
    first = next(with_experts, None)
    return tuple(sorted(chosen | ({first, min(first + 1, stages - 1)} if first is not None else set())))


def _stages(
    shape: Shape, layout: Layout, numerics: Numerics, sequence_length: int, microbatches: int
) -> dict[int, dict[str, float]]:
    """Bytes by part of the stages that may be the fullest."""
    schedule = SCHEDULES[layout.schedule]
    dense_over, expert_over = (
        [over if layout.zero >= level else 1 for level in (3, 2, 1)]
        for over in (layout.state_degree, layout.expert_zero_degree)
    )
    tokens = layout.microbatch_rows * sequence_length / layout.context
    kept_dense, kept_moe = (
        activation_bytes_per_token(shape, layout, numerics, sequence_length, experts=experts) if there else 0.0
        for experts, there in ((False, shape.num_dense_layers), (True, shape.num_moe_layers))
    )
    again = [0.0, 0.0]
    if layout.remat in ("dots", "full"):  # the layer that is computed again, once
        again = [_whole_layer(shape, layout, numerics, 0, experts=experts) * tokens for experts in (False, True)]
    logit_bytes = tokens * shape.vocab_size / layout.tensor * numerics.logit_bytes
    found = {}
    for stage in _stages_to_look_at(shape.num_layers, shape.num_dense_layers, layout.stage):
        dense_layers, moe_layers = layers_of_stages(shape, layout.stage)[stage]
        dense, routed, layer = stage_parameters(shape, layout, stage)
        weights, gradients, optimizer = (
            dense / one + routed / other for one, other in zip(dense_over, expert_over, strict=True)
        )
        in_flight = schedule.in_flight(layout.stage, microbatches, layout.virtual_stages, stage)
        gathered = 2 * layer * numerics.weight_bytes if layout.zero == 3 and layout.state_degree > 1 else 0.0
        found[stage] = {
            "weight_bytes": weights * numerics.weight_bytes * schedule.weight_copies,
            "gradient_bytes": gradients * numerics.gradient_bytes,
            "optimizer_bytes": optimizer * numerics.optimizer_bytes,
            "activation_bytes": in_flight * tokens * (dense_layers * kept_dense + moe_layers * kept_moe),
            "logit_bytes": logit_bytes if stage == layout.stage - 1 else 0.0,
            "gathered_bytes": gathered,
            "working_bytes": again[moe_layers > 0],
        }
    return found


def layers_of_stages(shape: Shape, stages: int) -> tuple[tuple[int, int], ...]:
    """Returns the layers of every stage, without experts and with them; those without come first in the model."""
    return _layers_of_stages(shape.num_layers, shape.num_dense_layers, stages)


@functools.lru_cache(maxsize=4096)
def _layers_of_stages(num_layers: int, num_dense: int, stages: int) -> tuple[tuple[int, int], ...]:
    found, before = [], 0
    for count in Layout(stage=stages).stage_layers(num_layers):
        dense = min(max(num_dense - before, 0), count)
        found.append((dense, count - dense))
        before += count
    return tuple(found)


def stage_parameters(shape: Shape, layout: Layout, stage: int) -> tuple[float, float, float]:
    """Returns parameters of a stage on one chip: those of all but experts, those of experts, of the largest layer.

    A table that head and embedding share is on the first stage and on the last.
    """
    plain, beside, embedding, experts = _parameters_of_a_layer(shape)
    dense_layers, moe_layers = layers_of_stages(shape, layout.stage)[stage]
    first, last = stage == 0, stage == layout.stage - 1
    table = shape.vocab_size * shape.model_dim
    ends = embedding * first + table * (last and (layout.stage > 1 or not shape.tied))
    dense = (dense_layers * plain + moe_layers * beside + ends) / layout.tensor
    routed = experts / (layout.expert * layout.expert_tensor)
    widest = max(plain / layout.tensor, beside / layout.tensor + routed if moe_layers else 0.0)
    return dense, moe_layers * routed, widest


@functools.lru_cache(maxsize=256)
def _parameters_of_a_layer(shape: Shape) -> tuple[float, float, int, float]:
    """Of a layer without experts, of one with them but for the experts, of the embedding, of a layer's experts."""
    counted = parameters.count(shape)
    attention = (counted.attention + counted.norms) / shape.num_layers
    plain = attention + counted.dense / max(shape.num_dense_layers, 1)
    beside = attention + (counted.shared_experts + counted.router) / max(shape.num_moe_layers, 1)
    return plain, beside, counted.embedding, counted.experts / max(shape.num_moe_layers, 1)


def activation_bytes_per_token(
    shape: Shape, layout: Layout, numerics: Numerics, sequence_length: int, *, experts: bool = False
) -> float:
    """Returns what one layer keeps of one token of the microbatch for the backward pass, on one chip.

    A GPT layer without SwiGLU keeps s b h (34 + 5 a s / h) in 16 bits with dropout (Korthikanti et al., equation 1);
    over t chips 10 + 24 / t + 5 a s / (h t), with sequence parallelism all over t; selective drops the score term.
    """
    spread = layout.tensor if layout.sequence_parallel else 1
    if layout.remat == "full":
        return numerics.activation_bytes * shape.model_dim / spread
    if layout.remat == "dots":  # a layer's input and what its products with matrices give, but those of routed experts
        hidden = shape.shared_hidden_dim if experts else shape.hidden_dim
        inside = shape.core_width + kept_keys(shape) + (shape.matrices - 1) * hidden
        return numerics.activation_bytes * (3 * shape.model_dim / spread + inside / layout.tensor)
    scores = sequence_length if layout.remat == "none" and not numerics.flash else 0
    return _whole_layer(shape, layout, numerics, scores, experts=experts)


def _whole_layer(shape: Shape, layout: Layout, numerics: Numerics, scores: int, *, experts: bool) -> float:
    """Bytes a token of a layer of which nothing is computed again, but the scores with so many keys."""
    a, dim, tensor = numerics.activation_bytes, shape.model_dim, layout.tensor
    spread = tensor if layout.sequence_parallel else 1
    masks = 1 if numerics.dropout else 0
    whole = 4 * a * dim + 2 * masks * dim  # inputs of two norms, of query-key-value and of the feed-forward; two masks
    width = shape.core_width
    inside = a * width + a * width + a * kept_keys(shape)  # queries, input of the output projection, keys and values
    inside += (2 * a + masks) * shape.num_heads * scores
    if not experts:
        return whole / spread + (inside + _hidden(shape, shape.hidden_dim) * a) / tensor
    factor = shape.experts_per_token * (shape.capacity_factor or 1)
    # Rows lie whole on every chip that holds a part of an expert.
    routed = factor * (2 * a * dim * layout.expert_tensor + a * _hidden(shape, shape.expert_hidden_dim))
    shared = a * _hidden(shape, shape.shared_hidden_dim)
    return whole / spread + (inside + shared) / tensor + (routed + exact.FLOAT32_BYTES * shape.num_experts) / tensor


def kept_keys(shape: Shape) -> float:
    """Returns the values of keys and values of one token in one layer that training keeps."""
    if shape.latent:
        return shape.num_heads * (shape.latent.plain_dim + shape.latent.value_dim) + shape.cache_width
    return shape.cache_width


def _hidden(shape: Shape, hidden_dim: int) -> int:
    """Values kept of a feed-forward: input and output of its nonlinearity, the gate where there is one."""
    return shape.matrices * hidden_dim
