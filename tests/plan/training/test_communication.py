"""Seconds of collectives: rings by hand, groups over servers, tori, all-to-all."""

import dataclasses

import pytest

from gpt4moe.accounting.chips import chip_named
from gpt4moe.config.check import CallerError
from gpt4moe.plan.training.communication import (
    Group,
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
    links,
    message_seconds,
)
from gpt4moe.plan.training.stacks import SCALE_OUT_EFFICIENCY, SCALE_UP_EFFICIENCY, Stack

A100, V5P = chip_named("a100_80"), chip_named("tpu_v5p")
STACK = Stack()
NVLINK, NIC = 300e9 * SCALE_UP_EFFICIENCY, 25e9 * SCALE_OUT_EFFICIENCY
LARGE = 1e12  # bytes that make starts of messages vanish


def test_a_ring_inside_a_server():
    """Each of 8 chips receives seven eighths of the whole."""
    assert all_gather_seconds(LARGE, A100, Group(8), STACK) == pytest.approx(LARGE * 7 / 8 / NVLINK, rel=1e-3)
    assert all_reduce_seconds(LARGE, A100, Group(8), STACK) == 2 * all_gather_seconds(LARGE, A100, Group(8), STACK)


def test_a_group_with_one_chip_a_server():
    """Replicas of a tensor group of 8: stride 8, every chip on its own NIC."""
    assert links(A100, Group(16, 8), STACK).outer == 16
    assert all_gather_seconds(LARGE, A100, Group(16, 8), STACK) == pytest.approx(LARGE * 15 / 16 / NIC, rel=1e-3)


def test_a_group_over_servers_uses_all_their_cards():
    """64 chips of 8 servers: an eighth of what enters a server comes through each NIC."""
    found = all_gather_seconds(LARGE, A100, Group(64), STACK)
    assert found == pytest.approx(LARGE / 8 * 7 / 8 / NIC, rel=1e-3)
    flat = dataclasses.replace(STACK, hierarchical=False)
    assert all_gather_seconds(LARGE, A100, Group(64), flat) == pytest.approx(8 * found, rel=1e-3)


def test_a_torus_group_has_its_share_of_the_axes():
    """4096 chips of a 3-D torus: 16 of them lie on one axis, 256 on two, all on three."""
    for size, axes in ((16, 1), (256, 2), (4096, 3)):
        found = links(V5P, Group(size, 1, 4096), STACK)
        assert found.axes == pytest.approx(axes)
        assert found.inner_bytes_per_second == pytest.approx(axes * 180e9 * SCALE_UP_EFFICIENCY)


def test_all_to_all_on_a_ring_is_a_quarter_of_the_gather():
    """Austin et al.: on a ring of one axis a chip's own q-th travels q / 4 hops."""
    gather = all_gather_seconds(LARGE, V5P, Group(16, 1, 4096), STACK)
    exchange = all_to_all_seconds(LARGE / 16, V5P, Group(16, 1, 4096), STACK)
    assert exchange == pytest.approx(gather / 4 * 16 / 15, rel=1e-3)


def test_all_to_all_over_servers_and_a_limit_of_servers():
    """Of 64 chips 56 are elsewhere; a token with eight experts on at most four servers sends half as much."""
    free = all_to_all_seconds(LARGE, A100, Group(64), STACK)
    assert free == pytest.approx(LARGE * 7 / 8 / NIC, rel=1e-3)
    assert all_to_all_seconds(LARGE, A100, Group(64), STACK, most_domains=4 / 8) == pytest.approx(free / 2, rel=1e-3)


def test_messages_inside_a_server_and_out_of_it():
    near, far = (message_seconds(1e9, A100, stride, STACK) for stride in (4, 8))
    assert near == pytest.approx(1e9 / NVLINK, rel=1e-2)
    assert far == pytest.approx(1e9 / NIC, rel=1e-2)


def test_a_stack_may_have_another_network():
    slow = dataclasses.replace(STACK, scale_out_bytes_per_second=6.25e9)
    ratio = all_gather_seconds(LARGE, A100, Group(16, 8), slow) / all_gather_seconds(LARGE, A100, Group(16, 8), STACK)
    assert ratio == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize("exchange", [all_gather_seconds, all_reduce_seconds, all_to_all_seconds])
def test_alone_there_is_nothing_to_send(exchange):
    assert exchange(LARGE, A100, Group(1), STACK) == 0
    assert exchange(0, A100, Group(8), STACK) == 0


@pytest.mark.parametrize(
    ("size", "stride", "inner"),
    [(6, 1, 2), (12, 1, 4), (8, 1, 8), (16, 1, 8), (4, 1, 4), (8, 4, 2), (4, 8, 1), (4, 32, 1)],
)
def test_groups_that_do_not_divide_a_server_lie_over_its_border(size, stride, inner):
    assert links(A100, Group(size, stride), STACK).inner == inner


def test_a_hop_on_a_torus_has_one_of_six_links():
    one = V5P.network.domain_bytes_per_second / 6
    assert message_seconds(LARGE, V5P, 1, STACK) == pytest.approx(LARGE / one / SCALE_UP_EFFICIENCY, rel=1e-3)


def test_chips_without_a_network_do_not_communicate():
    alone = chip_named("t4")
    assert all_gather_seconds(1e9, alone, Group(1), STACK) == 0
    for call in (
        lambda: all_gather_seconds(1e9, alone, Group(2), STACK),
        lambda: message_seconds(1e9, alone, 1, STACK),
    ):
        with pytest.raises(CallerError, match="--chip='t4' has no network that its table tells; take one chip"):
            call()


def test_what_stays_in_a_server_of_an_exchange_over_many():
    """64 chips: 7 of 64 parts go over fast links, 56 of 64 through the card."""
    fast = dataclasses.replace(A100.network, outside_bytes_per_second=1e15)
    chip = dataclasses.replace(A100, network=fast)
    assert all_to_all_seconds(LARGE, chip, Group(64), STACK) == pytest.approx(7 / 64 * LARGE / NVLINK, rel=1e-3)
