"""How a served model lies over chips, checked against its shape, and which share of a chip's peaks serving reaches.

In: a shape and a chip. Out: `ServeLayout`, `Efficiency`, and what one chip holds of weights and cache. A replica is
`stage` pipeline stages of `expert` x `tensor` chips. Rows of a batch are divided over the expert axis, as data are in
training: each of its groups holds the attention whole, in `tensor` slices, and its share of the experts.
"""

from __future__ import annotations

import dataclasses
import math

from gpt4moe.accounting import parameters
from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import require, require_count, require_fraction, require_not_negative, require_positive

ACTIVATION_BYTES = 2  # bfloat16, the cache too
WEIGHT_BYTES = {"bfloat16": 2, "int8": 1, "fp8": 1}
CACHES = ("heads", "batch")
FEED_FORWARDS = ("stationary_1d", "stationary_2d", "gathered")


@dataclasses.dataclass(frozen=True)
class ServeLayout:
    """Axes and formats of one replica of a served model.

    tensor: chips that share every layer's matrices; expert: groups of them, each with its own experts and its own rows;
    stage: pipeline stages. weights: bfloat16, int8 (weights only: products run at the 16-bit peak) or fp8 (products at
    the 8-bit peak). cache: how keys and values lie over the tensor axis: by `heads`, so that heads fewer than chips are
    stored once on each, or by `batch`, every chip whole rows (Pope et al. 2022, section 3.3). feed_forward: weights
    stay and activations move, in one or two dimensions, or weights are gathered (the same, section 3.2).
    """

    tensor: int = 1
    stage: int = 1
    expert: int = 1
    weights: str = "bfloat16"
    cache: str = "heads"
    feed_forward: str = "stationary_1d"

    def __post_init__(self) -> None:
        for name in ("tensor", "stage", "expert"):
            require_count(name, getattr(self, name))
        require(self.weights in WEIGHT_BYTES, "weights", self.weights, f"must be in {tuple(WEIGHT_BYTES)}")
        require(self.cache in CACHES, "cache", self.cache, f"must be in {CACHES}")
        require(self.feed_forward in FEED_FORWARDS, "feed_forward", self.feed_forward, f"must be in {FEED_FORWARDS}")

    @property
    def chips(self) -> int:
        """Chips of one replica."""
        return self.tensor * self.stage * self.expert

    @property
    def stage_chips(self) -> int:
        """Chips of one stage."""
        return self.tensor * self.expert

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight."""
        return WEIGHT_BYTES[self.weights]


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Which share of its peaks a chip reaches, and what each collective costs beside its bytes.

    matmul: of the peak FLOP/s; memory: of its bandwidth; link, outside_link: of the links inside a domain and of the
    network between domains, where a group exchanges; usable_memory: the rest holds activations and the runtime.
    collective_seconds: from start to end of one collective without bytes; hop_seconds: of one transfer to the next
    stage, `stage_bytes_per_second` its bandwidth (None: the chip's share of the network). expert_overlap: share of the
    computing time under which the exchange of the experts' rows hides. expert_nodes: domains to which a token is sent
    at most, None without a limit.
    """

    matmul: float = 0.6
    memory: float = 0.8
    link: float = 0.75
    outside_link: float = 0.55
    usable_memory: float = 0.92
    collective_seconds: float = 20e-6
    hop_seconds: float = 10e-6
    stage_bytes_per_second: float | None = None
    expert_overlap: float = 0.0
    expert_nodes: int | None = None

    def __post_init__(self) -> None:
        for name in ("matmul", "memory", "link", "outside_link", "usable_memory"):
            require_fraction(f"efficiency {name}", getattr(self, name))
            require_positive(f"efficiency {name}", getattr(self, name))
        for name in ("collective_seconds", "hop_seconds", "expert_overlap"):
            require_not_negative(name, getattr(self, name))
        if self.stage_bytes_per_second is not None:
            require_positive("stage_bytes_per_second", self.stage_bytes_per_second)


def check(shape: Shape, chip: Chip, layout: ServeLayout) -> None:
    """Raises `CallerError` where the layout does not divide the shape or asks of the chip what it has not."""
    for name in ("model_dim", "hidden_dim", "expert_hidden_dim"):
        width = getattr(shape, name)
        most = f"must divide {name} ({width})"
        require(width % layout.tensor == 0, "tensor", layout.tensor, most, "choose a divisor")
    most = f"must be at most num_layers ({shape.num_layers})"
    require(layout.stage <= shape.num_layers, "stage", layout.stage, most)
    has_experts = shape.num_experts if shape.num_moe_layers else 1
    most = f"must divide num_experts ({has_experts})"
    require(has_experts % layout.expert == 0, "expert", layout.expert, most, "choose a divisor")
    if layout.chips > 1:
        named = f"{chip.name}, whose network is not known, serves on one chip"
        require(chip.network is not None, "chips of a replica", layout.chips, named, "choose another chip")
    check_weights(chip, layout.weights)


def check_weights(chip: Chip, weights: str) -> None:
    """Raises `CallerError` where the chip does not compute in the format of the weights."""
    require(weights in WEIGHT_BYTES, "weights", weights, f"must be in {tuple(WEIGHT_BYTES)}")
    computes = chip.has_fp8 or weights != "fp8"
    require(computes, "weights", weights, f"is not what {chip.name} computes in", "choose int8 or another chip")


def total_weight_bytes(shape: Shape, layout: ServeLayout) -> float:
    """Returns the bytes of all weights stored once."""
    return parameters.count(shape).total * layout.weight_bytes


def weight_bytes_per_chip(shape: Shape, layout: ServeLayout) -> float:
    """Returns the bytes of weights on one chip, stages taken as equal: what is no expert is there in every group."""
    counted = parameters.count(shape)
    mine = (counted.total - counted.experts) / layout.tensor + counted.experts / layout.stage_chips
    return mine * layout.weight_bytes / layout.stage


def token_cache_bytes(shape: Shape) -> float:
    """Returns the bytes of keys and values of one token over all layers, stored once."""
    return shape.num_layers * shape.cache_width * ACTIVATION_BYTES


def cache_share(shape: Shape, layout: ServeLayout) -> float:
    """Returns which share of a row's cache one chip of the tensor axis holds.

    By heads: heads are whole, so that 48 over 64 chips take the room of 64, and one over 8 is there 8 times; latents
    have no heads and are there on every chip.
    """
    if layout.cache == "batch":
        return 1 / layout.tensor
    heads = 1 if shape.latent else shape.num_kv_heads
    return math.ceil(heads / layout.tensor) / heads


def cache_bytes_per_chip(shape: Shape, layout: ServeLayout, sequences: float, context: float) -> float:
    """Returns the bytes of cache on one chip of a replica that holds `sequences` rows of `context` tokens."""
    seen = min(context, shape.window) if shape.window else context
    whole = sequences * seen * token_cache_bytes(shape)
    return whole * cache_share(shape, layout) / (layout.expert * layout.stage)


def max_sequences(
    shape: Shape, chip: Chip, layout: ServeLayout, context: float, efficiency: Efficiency | None = None
) -> float:
    """Returns how many rows of `context` tokens the memory of a replica holds beside the weights, not rounded.

    Negative where the weights alone do not fit.
    """
    require_positive("context", context)
    usable = (efficiency or Efficiency()).usable_memory * chip.memory_bytes
    free = usable - weight_bytes_per_chip(shape, layout)
    return free / cache_bytes_per_chip(shape, layout, 1, context)


def max_context(shape: Shape, layout: ServeLayout, sequences: float, cache_bytes: float) -> float:
    """Returns how many tokens each of `sequences` rows may have where a chip gives `cache_bytes` to its cache."""
    require_positive("sequences", sequences)
    return cache_bytes / cache_bytes_per_chip(dataclasses.replace(shape, window=None), layout, sequences, 1)
