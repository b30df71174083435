"""Seconds of one training step, by cause: an additive model of one chip of the slowest pipeline stage.

In: shape, layout, chip, batch, stack. Out: `StepTime`. What overlaps is what the stack says can (`stacks`); the bubble
is that of the schedule (`schedules`, and for ours `accounting.pipeline`).
"""

from __future__ import annotations

import dataclasses

from gpt4moe.accounting import flops
from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.shape import Shape, shape_of
from gpt4moe.config.check import require_count
from gpt4moe.config.model import ModelConfig
from gpt4moe.plan.training import layer_time
from gpt4moe.plan.training.communication import Group, all_gather_seconds, message_seconds
from gpt4moe.plan.training.layer_time import ACTIVATION_BYTES, Pass, Place
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.memory import layers_of_stages, stage_parameters
from gpt4moe.plan.training.schedules import SCHEDULES
from gpt4moe.plan.training.stacks import MEMORY_EFFICIENCY, Stack

# Read and written by Adam for one parameter: gradient, master copy, two moments; the 16-bit copy written.
OPTIMIZER_TRAFFIC_BYTES = 4 + 2 * 4 + 2 * 8 + 2


# Which of the stack's scales a part takes: what a chip computes, moves in memory, sends, and waits for.
KINDS = {
    "compute": ("matmul", "expert_matmul", "attention_core", "recompute", "head"),
    "memory": ("elementwise", "optimizer", "overhead"),
    "communication": (
        "tensor_communication", "context_communication", "expert_communication", "stage_communication",
        "data_communication",
    ),
    "idle": ("bubble",),
}  # fmt: skip
KIND_OF = {part: kind for kind, parts in KINDS.items() for part in parts}


@dataclasses.dataclass(frozen=True)
class StepTime:
    """One step. parts: seconds by cause, their sum is `seconds`. Utilisation is of the 16-bit peak, matmuls with head.

    bubble_fraction: of the step. tokens_per_second: of the whole job.
    """

    seconds: float
    parts: dict[str, float]
    tokens_per_second: float
    model_flops_utilization: float
    bubble_fraction: float
    microbatches: int


def estimate(
    shape: Shape | ModelConfig, layout: Layout, chip: Chip, batch_tokens: int, sequence_length: int,
    stack: Stack | None = None, known: dict | None = None,
) -> StepTime:  # fmt: skip
    """Returns the time of one step of `batch_tokens` tokens in rows of `sequence_length`.

    known: an empty dict, kept between calls for layouts of one shape, chip, stack and sequence length: layers that are
    alike in them are reckoned once. Raises `CallerError` where shape or batch do not divide over the layout.
    """
    shape, stack = shape_of(shape), stack or Stack()
    layout.check(shape)
    require_count("sequence_length", sequence_length)
    require_count("batch_tokens", batch_tokens, least=sequence_length)
    microbatches = layout.microbatches(batch_tokens // sequence_length)
    place = Place(shape, layout, chip, stack, sequence_length)
    parts = _parts(place, microbatches, {} if known is None else known)
    parts = {name: seconds * stack.seconds_scale * scale_of(name, stack) for name, seconds in parts.items()}
    total = sum(parts.values())
    rate = batch_tokens / total
    useful = flops.train_flops_per_token(shape) * rate / (layout.chips * chip.peak_flops)
    return StepTime(total, parts, rate, useful, parts["bubble"] / total, microbatches)


def scale_of(part: str, stack: Stack) -> float:
    """Returns the calibrated factor of one part's seconds."""
    return getattr(stack, f"{KIND_OF[part]}_scale")


def _parts(place: Place, microbatches: int, known: dict) -> dict[str, float]:
    layout = place.layout
    schedule, stages = SCHEDULES[layout.schedule], _stages(place, known)
    if schedule.is_folded:
        stages = [_half_and_half(*pair) for pair in zip(stages, reversed(stages), strict=True)]
    distinct = {id(stage): stage for stage in stages}
    seconds = {key: sum(stage.values()) for key, stage in distinct.items()}  # most stages are one and the same
    slowest = max(stages, key=lambda stage: seconds[id(stage)])
    busy = {name: microbatches * seconds for name, seconds in slowest.items()}
    busy_seconds = sum(busy.values())
    mean = microbatches * sum(seconds[id(stage)] for stage in stages) / len(stages)
    ratio = schedule.bubble_ratio(layout.stage, microbatches // layout.passes, layout.virtual_stages)
    compute = busy_seconds - busy["tensor_communication"] - busy["expert_communication"]
    return busy | {
        "bubble": ratio * mean,
        "stage_communication": _between_stages(place, microbatches),
        "data_communication": _data_communication(place, microbatches, compute),
        "optimizer": _optimizer(place),
    }


def _half_and_half(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """A chip with a stage and its mirror image passes half of the microbatches through each."""
    return {name: (seconds + other[name]) / 2 for name, seconds in one.items()}


def _stages(place: Place, layers: dict) -> list[dict[str, float]]:
    """Seconds of one microbatch, forward and backward, on every stage by cause."""
    shape, layout = place.shape, place.layout
    key = _key_of_layer(layout, on_torus=bool(place.chip.network and place.chip.network.torus_axes))
    if key not in layers:
        layers[key] = (*(_layer(place, experts=experts) for experts in (False, True)), _head(place))
    plain, routed, head = layers[key]
    known: dict[tuple[int, int, bool], dict[str, float]] = {}
    last = layout.stage - 1
    kinds = [(*layers, index == last) for index, layers in enumerate(layers_of_stages(shape, layout.stage))]
    for kind in set(kinds):
        known[kind] = _sum_of(plain, kind[0], routed, kind[1]) | {"head": head if kind[2] else 0.0}
        known[kind]["expert_communication"] = _exposed_expert(known[kind], place.stack)
    return [known[kind] for kind in kinds]


def _key_of_layer(layout: Layout, *, on_torus: bool) -> tuple:
    """What one layer's time depends on; on a torus the links of a group depend on the number of chips too."""
    rest = layout.chips // layout.stage if on_torus else 0
    degrees = (layout.tensor, layout.context, layout.expert, layout.expert_tensor, layout.microbatch_rows)
    return (*degrees, layout.remat, layout.sequence_parallel, rest)


def _exposed_expert(stage: dict[str, float], stack: Stack) -> float:
    """What of the all-to-all is not hidden: a share can be, and no more than there is to compute."""
    seconds = stage["expert_communication"]
    rest = sum(stage.values()) - seconds
    return seconds - min(stack.expert_overlap * seconds, rest)


def _layer(place: Place, *, experts: bool) -> tuple[Pass, Pass]:
    """Forward and backward of one layer, and what is computed again."""
    if not (place.shape.num_moe_layers if experts else place.shape.num_dense_layers):
        return Pass(), Pass()
    done = layer_time.forward(place, experts=experts)
    return done.plus(layer_time.backward(place, done)), layer_time.recomputed(place, done)


def _sum_of(dense: tuple[Pass, Pass], num_dense: int, moe: tuple[Pass, Pass], num_moe: int) -> dict[str, float]:
    work, again = (
        Pass().plus(plain, num_dense).plus(routed, num_moe) for plain, routed in zip(dense, moe, strict=True)
    )
    communicated = again.tensor + again.context + again.expert
    return {
        "matmul": work.products,
        "expert_matmul": work.expert_products,
        "attention_core": work.attention,
        "elementwise": work.elementwise,
        "overhead": work.overhead + again.overhead,
        "recompute": again.seconds - communicated - again.overhead,
        "tensor_communication": work.tensor + again.tensor,
        "context_communication": work.context + again.context,
        "expert_communication": work.expert + again.expert,
    }


def _head(place: Place) -> float:
    """The output head and its loss, forward and backward: three products, float32 logits through memory."""
    shape, columns = place.shape, place.shape.vocab_size / place.layout.tensor
    sixteen = dataclasses.replace(place.stack, matmul_bits=16)
    product = layer_time.product_seconds(place.chip, sixteen, place.tokens, shape.model_dim, columns)
    touched = place.tokens * columns * (2 + 4 + 4 + 4 + 2)
    return 3 * product + touched / (place.chip.bandwidth_bytes_per_second * MEMORY_EFFICIENCY)


def _between_stages(place: Place, microbatches: int) -> float:
    layout, stack = place.layout, place.stack
    if layout.stage == 1:
        return 0.0
    shards = layout.tensor if layout.sequence_parallel or stack.scatter_gather else 1
    message_bytes = place.tokens * place.shape.model_dim * ACTIVATION_BYTES / shards
    one = message_seconds(message_bytes, place.chip, layout.chips // layout.stage, stack)
    times = 2 * microbatches * layout.virtual_stages * SCHEDULES[layout.schedule].messages
    return (1 - stack.stage_overlap) * times * one + 2 * (layout.stage - 1) * one * stack.stage_overlap


def _data_communication(place: Place, microbatches: int, compute_seconds: float) -> float:
    """Gradients summed and, under ZeRO, weights gathered, what computation does not hide."""
    shape, layout, stack = place.shape, place.layout, place.stack
    dense, routed = _fullest(shape, layout)
    outer = Group(layout.data // layout.zero_degree, layout.tensor * layout.context * layout.zero_degree)
    sharding = place.group(layout.zero_degree * layout.context, layout.tensor)
    expert_sharding = place.group(layout.expert_zero_degree, layout.expert * layout.expert_tensor)
    together = layout.expert * layout.expert_tensor * layout.expert_zero_degree
    expert_outer = Group(layout.expert_data // layout.expert_zero_degree, together)
    total = 0.0
    for count, group, others in ((dense, sharding, outer), (routed, expert_sharding, expert_outer)):
        total += _sharded_seconds(place, count, group, microbatches)
        if others.size > 1:
            left = count / (group.size if layout.zero else 1)
            total += 2 * all_gather_seconds(left * stack.gradient_bytes, place.chip, others, stack)
    beside = compute_seconds if layout.zero >= 2 else compute_seconds / microbatches
    return total - min(stack.data_overlap * total, beside)


def _fullest(shape: Shape, layout: Layout) -> tuple[float, float]:
    """Parameters on a chip of the fullest of three stages, first, middle and last: of all but experts, of experts."""
    ends = {0, layout.stage - 1, layout.stage // 2}
    return max((stage_parameters(shape, layout, stage)[:2] for stage in ends), key=sum)


def _sharded_seconds(place: Place, count: float, group: Group, microbatches: int) -> float:
    """One reduce-scatter of gradients and one all-gather of weights.

    ZeRO-2 keeps only its shard of gradients and so reduces those of every microbatch; ZeRO-3 gathers twice too.
    """
    gradients = all_gather_seconds(count * place.stack.gradient_bytes, place.chip, group, place.stack)
    weights = all_gather_seconds(count * ACTIVATION_BYTES, place.chip, group, place.stack)
    if place.layout.zero == 3:
        return microbatches * (gradients + 2 * weights)
    if place.layout.zero == 2:
        return microbatches * gradients + weights
    return gradients + (weights if place.layout.zero else gradients)


def _optimizer(place: Place) -> float:
    shape, layout = place.shape, place.layout
    dense, routed = _fullest(shape, layout)
    if layout.zero:
        dense, routed = dense / layout.state_degree, routed / layout.expert_zero_degree
    return (dense + routed) * OPTIMIZER_TRAFFIC_BYTES / (place.chip.bandwidth_bytes_per_second * MEMORY_EFFICIENCY)
