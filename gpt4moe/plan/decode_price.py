"""What a generated token costs on a cluster of tensor x stages chips: the plain decode roofline of the reference.

In: a shape, a cluster, sequences in flight. Out: seconds, tokens and dollars. Weights, cache and products add up; what
chips say to each other is left out.
"""

from __future__ import annotations

import dataclasses

from gpt4moe.accounting import flops, parameters
from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import require_count, require_not_negative, require_positive
from gpt4moe.plan.article_serving import distinct_experts


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Chips that serve one copy of a model: `tensor` of them share a layer, `stages` such groups follow one another.

    weight_bytes: of one weight; the cache has 2 bytes a value. bandwidth_share, peak_share: what a chip reaches of its
    data sheet.
    """

    chip: Chip
    tensor: int
    stages: int
    dollars_per_chip_hour: float
    weight_bytes: float = 2.0
    context_tokens: float = 2048.0
    bandwidth_share: float = 0.8
    peak_share: float = 0.6

    def __post_init__(self) -> None:
        require_count("tensor", self.tensor)
        require_count("stages", self.stages)
        require_not_negative("dollars_per_chip_hour", self.dollars_per_chip_hour)
        for name in ("weight_bytes", "context_tokens", "bandwidth_share", "peak_share"):
            require_positive(name, getattr(self, name))

    @property
    def num_chips(self) -> int:
        """All chips of it."""
        return self.tensor * self.stages


def stage_seconds(shape: Shape, cluster: Cluster, batch: float) -> float:
    """Returns the time in which a stage makes one token for each of `batch` sequences; keys lie on all its chips."""
    counted, chip, stages = parameters.count(shape), cluster.chip, cluster.stages
    experts = shape.num_moe_layers * distinct_experts(shape, batch) * parameters.one_expert(shape)
    weights = (counted.total - counted.experts - counted.embedding + experts) * cluster.weight_bytes / cluster.num_chips
    copies = max(cluster.tensor / shape.num_kv_heads, 1)
    cache = 2 * shape.num_layers * shape.cache_width * batch * cluster.context_tokens * copies / cluster.num_chips
    context = int(cluster.context_tokens)
    core = flops.attention_core_flops_per_token(shape, context, causal=False)
    products = (flops.forward_flops_per_token(shape) + core) * batch / stages / cluster.tensor
    read = (weights + cache) / (chip.bandwidth_bytes_per_second * cluster.bandwidth_share)
    return read + products / (chip.peak_flops * cluster.peak_share)


def tokens_per_second(shape: Shape, cluster: Cluster, sequences: float) -> float:
    """Returns the tokens of all sequences in flight together, an equal part of them in each stage."""
    batch = sequences / cluster.stages
    return batch / stage_seconds(shape, cluster, batch)


def dollars_per_1k_tokens(shape: Shape, cluster: Cluster, sequences: float) -> float:
    """Returns the price of 1,000 generated tokens on a cluster that is always full."""
    per_second = cluster.num_chips * cluster.dollars_per_chip_hour / 3600
    return 1000 * per_second / tokens_per_second(shape, cluster, sequences)
