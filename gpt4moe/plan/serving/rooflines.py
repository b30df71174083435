"""Seconds that one pipeline stage needs for a decode step or a prompt: weights, cache, FLOPs and exchanges, added.

In: shape, chip, layout, efficiency, rows of the step and their context. Out: `StageTime`. Terms are added, as on real
machines they overlap little (on Pope et al.'s measurements the largest of them alone is 40 % too fast).
"""

from __future__ import annotations

import dataclasses
import functools

from gpt4moe.accounting import flops, parameters
from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import require_not_negative, require_positive
from gpt4moe.plan.serving import expert_load
from gpt4moe.plan.serving.collectives import expert_exchange, tensor_exchange
from gpt4moe.plan.serving.layout import (
    ACTIVATION_BYTES,
    WEIGHT_BYTES,
    Efficiency,
    ServeLayout,
    cache_bytes_per_chip,
    check,
    check_weights,
)


@dataclasses.dataclass(frozen=True)
class StageTime:
    """Seconds of one stage for one step, by cause; of equal stages, so that a step takes `stage` times as long.

    weights, cache: to read them; flops: to compute; exchange: collectives inside the stage; hop: to the next stage.
    """

    weights_seconds: float
    cache_seconds: float
    flops_seconds: float
    exchange_seconds: float
    hop_seconds: float

    @property
    def seconds(self) -> float:
        """All of them, one after the other."""
        reading = self.weights_seconds + self.cache_seconds
        return reading + self.flops_seconds + self.exchange_seconds + self.hop_seconds


@dataclasses.dataclass(frozen=True)
class Server:
    """What serves: a shape on a chip in a layout that divides it, at an efficiency."""

    shape: Shape
    chip: Chip
    layout: ServeLayout = dataclasses.field(default_factory=ServeLayout)
    efficiency: Efficiency = dataclasses.field(default_factory=Efficiency)

    def __post_init__(self) -> None:
        check(self.shape, self.chip, self.layout)

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Parameters and FLOPs of the shape, counted once."""
        return sizes_of(self.shape)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Parameters and FLOPs from which times follow.

    read: parameters that every step reads, which are all but the experts' and an input table that is not the head.
    flops: a token's forward matmul FLOPs, of which `expert_flops` are the experts'; expert: parameters of one expert of
    one layer.
    """

    read: int
    expert: int
    flops: int
    expert_flops: int


def sizes_of(shape: Shape) -> Sizes:
    """Returns the parameters and FLOPs of a shape from which its times follow."""
    counted = parameters.count(shape)
    read = counted.total - counted.experts - (0 if shape.tied else counted.embedding)
    expert_flops = 2 * parameters.experts_active(shape)
    return Sizes(read, parameters.one_expert(shape), flops.forward_flops_per_token(shape), expert_flops)


def decode_step(
    server: Server,
    rows: float,
    context: float,
    *,
    tokens_per_row: int = 1,
    distinct: float | None = None,
    imbalance: float | None = None,
) -> StageTime:
    """Returns the time of one stage for a step in which each of `rows` rows gains a token, or verifies several.

    Args:
      server: shape, chip, layout, efficiency.
      rows: of one pipeline microbatch, over all expert groups; a stage works on one such microbatch at a time.
      context: tokens that a row attends to, the mean over rows.
      tokens_per_row: tokens computed of each row; its cache is read once for all of them.
      distinct: experts of a layer that the step reads (None: expected of independent uniform routing).
      imbalance: load of the fullest expert group over the mean (None: expected).
    """
    require_positive("rows", rows)
    require_not_negative("context", context)
    shape, layout, efficiency = server.shape, server.layout, server.efficiency
    tokens = rows * tokens_per_row
    weights = _weights_seconds(server, tokens, distinct)
    cache_bytes = cache_bytes_per_chip(shape, layout, rows, context)
    seen = min(context, shape.window) if shape.window else context
    core = tokens * core_flops_per_key(shape) * seen / (layout.chips * server.chip.peak_flops * efficiency.matmul)
    computing = _matmul_seconds(server, tokens, imbalance) + core
    return StageTime(
        weights,
        cache_bytes / (server.chip.bandwidth_bytes_per_second * efficiency.memory),
        computing,
        _exchange_seconds(server, tokens, weights + computing),
        _hop_seconds(server, tokens),
    )


def prefill_step(server: Server, prompts: float, prompt_tokens: float, cached_tokens: float = 0.0) -> StageTime:
    """Returns the time of one stage for `prompts` prompts of `prompt_tokens` tokens each, with causal attention.

    cached_tokens: tokens before each of them that are in the cache already, as of a prompt read in chunks.
    """
    require_positive("prompts", prompts)
    require_positive("prompt_tokens", prompt_tokens)
    require_not_negative("cached_tokens", cached_tokens)
    shape, layout, efficiency, chip = server.shape, server.layout, server.efficiency, server.chip
    tokens, keys = prompts * prompt_tokens, cached_tokens + prompt_tokens / 2
    keys = min(keys, shape.window) if shape.window else keys
    core = 4 * shape.num_layers * shape.core_width * keys * tokens
    core_seconds = core / (layout.chips * chip.peak_flops * efficiency.matmul)
    weights = _weights_seconds(server, tokens, None)
    computing = _matmul_seconds(server, tokens, None) + core_seconds
    cache_bytes = cache_bytes_per_chip(shape, layout, prompts, cached_tokens)
    return StageTime(
        weights,
        cache_bytes / (chip.bandwidth_bytes_per_second * efficiency.memory),
        computing,
        _exchange_seconds(server, tokens, weights + computing),
        _hop_seconds(server, tokens),
    )


def core_flops_per_key(shape: Shape) -> float:
    """Returns a decoded token's FLOPs for one key over all layers: 4 L N H.

    Latent attention scores and weights the latents themselves, which are wider than its heads (DeepSeek-V2, section
    2.1.2: the up-projections are absorbed): 2 L N (2 rank + rotary).
    """
    if shape.latent is None:
        return 4 * shape.num_layers * shape.core_width
    return 2 * shape.num_layers * shape.num_heads * (2 * shape.latent.key_value_rank + shape.latent.rotary_dim)


def matmul_peak(server: Server) -> float:
    """Returns the peak FLOP/s at which products with weights run in the layout's format."""
    return server.chip.peak_8bit_ops if server.layout.weights == "fp8" else server.chip.peak_flops


def critical_rows(chip: Chip, weights: str = "bfloat16", shape: Shape | None = None) -> float:
    """Returns the tokens of a step at which reading all weights and computing take equally long, at the peaks.

    (C / M) w / 2 where every token uses every weight it reads; E / K times as many for the experts of a shape, whose
    weights are read for all tokens and used for K of E. Products run at the peak that `weights` allow.
    """
    check_weights(chip, weights)
    peak = chip.peak_8bit_ops if weights == "fp8" else chip.peak_flops
    dense = peak / chip.bandwidth_bytes_per_second * WEIGHT_BYTES[weights] / 2
    if shape is None or not shape.num_moe_layers:
        return dense
    return dense * shape.num_experts / shape.experts_per_token


def _weights_seconds(server: Server, tokens: float, distinct: float | None) -> float:
    shape, layout, sizes = server.shape, server.layout, server.sizes
    if distinct is None:
        distinct = expert_load.distinct_experts(shape.num_experts, shape.experts_per_token, tokens)
    mine = expert_load.group_distinct(distinct, shape.num_experts, layout.expert)
    read = sizes.read + shape.num_moe_layers * mine * sizes.expert
    read_bytes = read / (layout.tensor * layout.stage) * layout.weight_bytes
    return read_bytes / (server.chip.bandwidth_bytes_per_second * server.efficiency.memory)


def _matmul_seconds(server: Server, tokens: float, imbalance: float | None) -> float:
    shape, layout, sizes = server.shape, server.layout, server.sizes
    if imbalance is None:
        groups = layout.expert
        imbalance = expert_load.group_imbalance(shape.num_experts, shape.experts_per_token, tokens, groups)
    executed = tokens * (sizes.flops + (imbalance - 1) * sizes.expert_flops)
    return executed / (layout.chips * matmul_peak(server) * server.efficiency.matmul)


def _exchange_seconds(server: Server, tokens: float, computing_seconds: float) -> float:
    """Exchanges of the tensor groups, and those of the experts as far as they do not hide under computing."""
    shape, chip, layout, efficiency = server.shape, server.chip, server.layout, server.efficiency
    tensor = tensor_exchange(shape, chip, layout, tokens).seconds(efficiency) * shape.num_layers
    expert = expert_exchange(shape, chip, layout, tokens, efficiency.expert_nodes).seconds(efficiency)
    expert *= shape.num_moe_layers
    hidden = min(expert, efficiency.expert_overlap * computing_seconds * layout.stage)
    return (tensor + expert - hidden) / layout.stage


def _hop_seconds(server: Server, tokens: float) -> float:
    """A stage's activations to the next: every chip sends its rows whole, so that no gather is needed after."""
    layout, efficiency = server.layout, server.efficiency
    if layout.stage == 1:
        return 0.0
    network = server.chip.network
    inside = layout.chips <= network.domain_chips
    bandwidth = network.domain_bytes_per_second if inside else network.outside_bytes_per_second
    sent = tokens / layout.expert * server.shape.model_dim * ACTIVATION_BYTES
    return efficiency.hop_seconds + sent / (efficiency.stage_bytes_per_second or bandwidth)
