"""What the chips of one stage exchange for one layer of a served model: bytes, collectives, seconds.

In: shape, chip, layout, tokens of the step. Out: `Exchange`, of which a stage has as many as layers. Formulas of Pope
et al. 2022, sections 3.2 and 3.3, for attention and feed-forward; DeepSeek-V3's (2412.19437, section 3.4) for experts.
"""

from __future__ import annotations

import dataclasses
import math

from gpt4moe.accounting import parameters
from gpt4moe.accounting.chips import Chip, Network
from gpt4moe.accounting.shape import Shape
from gpt4moe.plan.serving.layout import ACTIVATION_BYTES, Efficiency, ServeLayout

CLOSED_RING = {2: 16, 3: 4}  # chips along each axis of the smallest torus, by number of axes


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One layer's exchanges: seconds at the full rate of the links inside a domain and of the network outside.

    collectives: how many pay a latency.
    """

    domain_seconds: float = 0.0
    outside_seconds: float = 0.0
    collectives: int = 0

    def __add__(self, other: Exchange) -> Exchange:
        domain_seconds = self.domain_seconds + other.domain_seconds
        outside_seconds = self.outside_seconds + other.outside_seconds
        return Exchange(domain_seconds, outside_seconds, self.collectives + other.collectives)

    def seconds(self, efficiency: Efficiency) -> float:
        """Returns the seconds with the efficiency of the links and each collective's latency."""
        moving = self.domain_seconds / efficiency.link + self.outside_seconds / efficiency.outside_link
        return moving + self.collectives * efficiency.collective_seconds


def tensor_exchange(shape: Shape, chip: Chip, layout: ServeLayout, tokens: float) -> Exchange:
    """Returns what the chips of a tensor group exchange for one layer; `tokens` are of the whole stage."""
    if layout.tensor == 1:
        return Exchange()
    mine = tokens / layout.expert
    attention = _batch_sharded(shape, chip, layout, mine) if layout.cache == "batch" else Exchange()
    if layout.feed_forward == "gathered":
        return _gathered(shape, chip, layout, mine)
    if layout.feed_forward == "stationary_2d":
        return attention + _stationary_2d(shape, chip, layout, mine)
    return attention + _stationary_1d(shape, chip, layout, mine)


def expert_exchange(
    shape: Shape, chip: Chip, layout: ServeLayout, tokens: float, nodes_per_token: int | None = None
) -> Exchange:
    """Returns what the expert groups exchange for one layer with experts: rows to their experts and back.

    Rows go out in the weights' format where that is fp8, and come back in 16 bits. Each chip of a tensor group sends
    its slice. A token goes once to each domain that has one of its experts, to `nodes_per_token` of them at most, and
    from there over the domain's links.
    """
    if layout.expert == 1:
        return Exchange()
    row_bytes = shape.model_dim * ((1 if layout.weights == "fp8" else 2) + ACTIVATION_BYTES) / layout.tensor
    mine = tokens / layout.expert
    leaving = (layout.expert - 1) / layout.expert
    within = mine * shape.experts_per_token * leaving * row_bytes / chip.network.domain_bytes_per_second
    if layout.stage_chips <= chip.network.domain_chips:
        return Exchange(within, 0.0, 2)
    domains = layout.stage_chips / chip.network.domain_chips
    copies = domains * (1 - (1 - 1 / domains) ** shape.experts_per_token)
    copies = min(copies, nodes_per_token or copies) * (1 - 1 / domains)
    return Exchange(within, mine * copies * row_bytes / chip.network.outside_bytes_per_second, 2)


def domain_bandwidth(network: Network, group: int) -> float:
    """Returns the bytes a second of one chip, in one direction, in a group of `group` chips of one domain.

    A torus closes its rings from 4 x 4 x 4 chips on, of two axes from 16 x 16; smaller slices are lines, of half the
    bandwidth.
    """
    is_line = network.torus_axes and group < CLOSED_RING[network.torus_axes] ** network.torus_axes
    return network.domain_bytes_per_second / (2 if is_line else 1)


def _exchange(network: Network, group: int, volume_bytes: float, collectives: int) -> Exchange:
    """Of a group inside a domain, or, where it is larger, over the network outside at every step of the ring."""
    if group > network.domain_chips:
        return Exchange(0.0, volume_bytes / network.outside_bytes_per_second, collectives)
    return Exchange(volume_bytes / domain_bandwidth(network, group), 0.0, collectives)


def _passes(shape: Shape) -> int:
    """How often activations are combined in a layer: once where attention and feed-forward stand side by side."""
    return 1 if shape.norms_per_layer == 1 else 2


def _stationary_1d(shape: Shape, chip: Chip, layout: ServeLayout, tokens: float) -> Exchange:
    """An all-reduce of the activations after attention and after the feed-forward."""
    share = 2 * (layout.tensor - 1) / layout.tensor
    volume = _passes(shape) * share * tokens * shape.model_dim * ACTIVATION_BYTES
    return _exchange(chip.network, layout.tensor, volume, _passes(shape))


def _stationary_2d(shape: Shape, chip: Chip, layout: ServeLayout, tokens: float) -> Exchange:
    """Weights cut along both dims, x by y: activations over y, hidden values over x, gathered and scattered both.

    x is the largest divisor up to sqrt(n D / F), at which both volumes are equal (Pope et al., section 3.2.2).
    """
    best = math.sqrt(layout.tensor * shape.model_dim / _hidden_of_a_token(shape))
    x = max(x for x in range(1, layout.tensor + 1) if layout.tensor % x == 0 and x <= max(best, 1))
    return _two_dims(shape, chip, layout.tensor, tokens, x)


def _two_dims(shape: Shape, chip: Chip, group: int, tokens: float, x: int) -> Exchange:
    y, axes = group // x, chip.network.torus_axes
    # The axes of a torus are divided between the two dims: volumes as if over all its links.
    share_x, share_y = (1 / axes, 1 - 1 / axes) if axes and x > 1 and y > 1 else (1, 1)
    halves = 2 * _passes(shape)  # a gather and a scatter; two of them are an all-reduce
    outer = halves * tokens * ACTIVATION_BYTES * shape.model_dim / x * (y - 1) / y
    inner = shape.matrices * tokens * ACTIVATION_BYTES * _hidden_of_a_token(shape) / y * (x - 1) / x
    return _exchange(chip.network, group, outer / share_y + inner / share_x, _passes(shape) + 1)


def _hidden_of_a_token(shape: Shape) -> float:
    """Hidden values of one token in one layer, the mean over layers with experts and without."""
    routed = shape.experts_per_token * shape.expert_hidden_dim + shape.shared_hidden_dim
    return (shape.num_moe_layers * routed + shape.num_dense_layers * shape.hidden_dim) / shape.num_layers


def _gathered(shape: Shape, chip: Chip, layout: ServeLayout, tokens: float) -> Exchange:
    """Every layer's weights are gathered over n chips of the group, activations move over the rest: the best n."""
    counted = parameters.count(shape)
    layer_weights = (counted.total - counted.embedding - counted.head) / shape.num_layers * layout.weight_bytes
    group, choices = layout.tensor, []
    for gathered in (n for n in range(1, group + 1) if group % n == 0):
        rest = group // gathered
        weights = layer_weights / layout.expert / rest * (gathered - 1) / gathered
        activations = 2 * _passes(shape) * tokens / gathered * shape.model_dim * ACTIVATION_BYTES * (rest - 1) / rest
        collectives = (gathered > 1) + _passes(shape) * (rest > 1)
        choices.append(_exchange(chip.network, group, weights + activations, collectives))
    return min(choices, key=lambda item: item.domain_seconds + item.outside_seconds)


def _batch_sharded(shape: Shape, chip: Chip, layout: ServeLayout, tokens: float) -> Exchange:
    """Queries are exchanged from slices by heads to slices by rows, attended values back."""
    group = layout.tensor
    volume = 2 * tokens * shape.core_width * ACTIVATION_BYTES / group * (group - 1) / group
    return _exchange(chip.network, group, volume, 2)
