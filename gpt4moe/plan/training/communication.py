"""Seconds that collectives take: rings, trees of servers, tori, all-to-all.

In: bytes, the group (its size and the distance between its members), a chip's network. Out: seconds, without overlap.
All bytes are those of one chip. Sources: Austin et al., How to Scale Your Model (2025), chapter 3; NCCL's bus
bandwidth; DeepSeek-V3 (2412.19437), section 3.2.2, for node-limited routing.
"""

from __future__ import annotations

import dataclasses
import math

from gpt4moe.accounting.chips import Chip, Network
from gpt4moe.config.check import require
from gpt4moe.plan.training.stacks import MESSAGE_SECONDS, SCALE_OUT_EFFICIENCY, SCALE_UP_EFFICIENCY, Stack

ALONE = Network(1, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Group:
    """Chips that communicate: `size` of them, one in every `stride` of the job's `chips` in order."""

    size: int
    stride: int = 1
    chips: int = 0


@dataclasses.dataclass(frozen=True)
class Links:
    """Bandwidths of one chip in a group, bytes/s: among `inner` members in its domain, among `outer` domains."""

    inner: int
    outer: int
    inner_bytes_per_second: float
    outer_bytes_per_second: float
    axes: float = 0.0


def links(chip: Chip, group: Group, stack: Stack) -> Links:
    """Returns what a group's members can use. On a torus a group of q among n chips has log q / log n of the axes."""
    network = _network(chip)
    inner = max(min(network.domain_chips // group.stride, group.size), 1)
    if not network.torus_axes:  # groups lie one after the other, and where they do not divide a server over its border
        inner = math.gcd(max(network.domain_chips // group.stride, 1), group.size)
    while group.size % inner:
        inner -= 1
    fast, axes = network.domain_bytes_per_second * SCALE_UP_EFFICIENCY, 0.0
    if network.torus_axes and inner > 1:
        there = max(min(group.chips or group.size * group.stride, network.domain_chips), inner)
        axes = max(network.torus_axes * math.log(inner) / math.log(there), 1.0)
        fast *= axes / network.torus_axes
    slow = (stack.scale_out_bytes_per_second or network.outside_bytes_per_second) * SCALE_OUT_EFFICIENCY
    return Links(inner, group.size // inner, fast, slow, axes)


def _network(chip: Chip) -> Network:
    mend = "take one chip, or chips with a network"
    require(chip.network is not None, "--chip", chip.name, "has no network that its table tells", mend)
    return chip.network


def all_gather_seconds(total_bytes: float, chip: Chip, group: Group, stack: Stack) -> float:
    """Returns the time until every member has all `total_bytes`; a reduce-scatter takes the same.

    Over several servers each chip's NIC carries its share of what enters the server, while the fast links spread it:
    the slower of the two decides. Not hierarchical: every chip receives everything through its own NIC.
    """
    if group.size == 1 or not total_bytes:
        return 0.0
    found = links(chip, group, stack)
    latency = MESSAGE_SECONDS * (math.log2(group.size) + 1)
    inside = (found.inner - 1) / found.inner * total_bytes / found.inner_bytes_per_second if found.inner > 1 else 0.0
    if found.outer == 1:
        return inside + latency
    share = total_bytes / found.inner if stack.hierarchical else total_bytes
    return max(inside, (found.outer - 1) / found.outer * share / found.outer_bytes_per_second) + latency


def all_reduce_seconds(total_bytes: float, chip: Chip, group: Group, stack: Stack) -> float:
    """Returns the time of a sum of `total_bytes` over all members: reduce-scatter and all-gather."""
    return 2 * all_gather_seconds(total_bytes, chip, group, stack)


def all_to_all_seconds(
    local_bytes: float, chip: Chip, group: Group, stack: Stack, most_domains: float = math.inf
) -> float:
    """Returns the time in which each member sends `local_bytes`, evenly to all.

    most_domains: copies of one row's bytes that leave for other servers at most (node-limited routing, duplicates sent
    once and spread inside), as a share: bytes that cross are local_bytes * min(1, most_domains). On a torus a row
    travels a quarter of every axis's length on average.
    """
    if group.size == 1 or not local_bytes:
        return 0.0
    found = links(chip, group, stack)
    inside = 0.0
    if found.inner > 1:
        inside = (found.inner - 1) / group.size * local_bytes / found.inner_bytes_per_second
        if found.axes:
            side = found.inner ** (1 / found.axes)
            inside = local_bytes * max(side * found.axes / 4, 1.0) / found.inner_bytes_per_second
    crossing = local_bytes * (1 - 1 / found.outer) * min(1.0, most_domains)
    outside = crossing / found.outer_bytes_per_second if found.outer > 1 else 0.0
    return max(inside, outside) + MESSAGE_SECONDS * (math.log2(group.size) + 1)


def message_seconds(message_bytes: float, chip: Chip, stride: int, stack: Stack) -> float:
    """Returns the time of one message to the chip `stride` further, in another domain where it lies there."""
    if not message_bytes:
        return 0.0
    network = _network(chip)
    if stride < network.domain_chips:
        axes = network.torus_axes or 1
        links = 2 * axes if network.torus_axes else 1  # one of a torus leads to the neighbour
        return message_bytes / (network.domain_bytes_per_second / links * SCALE_UP_EFFICIENCY) + MESSAGE_SECONDS
    slow = stack.scale_out_bytes_per_second or network.outside_bytes_per_second
    return message_bytes / (slow * SCALE_OUT_EFFICIENCY) + MESSAGE_SECONDS
