"""Layouts: what divides, which stage is fullest, schedules by hand."""

import dataclasses

import pytest

from gpt4moe.accounting.published import shape_named
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import CallerError
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.schedules import SCHEDULES


def test_a_reference_layout_by_hand():
    """TP8 x PP15 x DP208 of the article: chips, and experts over the 8 x 208 chips of a stage."""
    layout = Layout(tensor=8, stage=15, data=208, expert=16, expert_tensor=8)
    assert layout.chips == 24_960
    assert layout.expert_data == 13
    assert layout.microbatches(208 * 35) == 35


def test_the_last_stage_and_then_the_first_hold_one_layer_less():
    assert Layout(stage=16).stage_layers(126) == (7, *(8,) * 14, 7)
    assert Layout(stage=4).stage_layers(7) == (2, 2, 2, 1)
    assert Layout(stage=4).stage_layers(8) == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tensor": 7}, r"num_heads=64 must be divisible by the tensor degree \(7\)"),
        ({"stage": 81}, r"num_layers=80 must be at least stage \* virtual_stages \(81 \* 1\)"),
        ({"data": 2, "expert": 2}, "Layout.expert=2 must be 1 for a model without experts"),
    ],
)
def test_what_does_not_divide_the_model(changes, says):
    with pytest.raises(CallerError, match=says):
        Layout(**changes).check(shape_named("llama3_70b"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"zero": 4}, "Layout.zero=4 must be 0, 1, 2 or 3"),
        ({"remat": "some"}, "Layout.remat='some' must be in"),
        ({"schedule": "fifo"}, "Layout.schedule='fifo' must be in"),
        ({"virtual_stages": 2}, "Layout.virtual_stages=2 must be 1 under 1f1b; take schedule interleaved"),
        ({"expert": 3, "data": 8}, r"Layout.expert=3 .* must divide the chips of a stage \(8\)"),
        ({"zero_group": 3, "data": 8}, r"Layout.zero_group=3 must divide data \(8\)"),
        ({"data": 0}, "Layout.data=0 must be an integer of at least 1"),
    ],
)
def test_what_no_layout_is(changes, says):
    with pytest.raises(CallerError, match=says):
        Layout(**changes)


def test_experts_that_do_not_divide():
    with pytest.raises(CallerError, match=r"num_experts=8 must be divisible by the expert degree \(16\)"):
        Layout(data=16, expert=16).check(shape_named("mixtral_8x7b"))


def test_a_batch_that_is_no_whole_number_of_microbatches():
    with pytest.raises(CallerError, match=r"batch_rows=30 must be a multiple of data \* microbatch_rows \(8 \* 2\)"):
        Layout(data=8, microbatch_rows=2).microbatches(30)


@pytest.mark.parametrize(("virtual", "of_step"), [(1, 0.286), (2, 0.167), (4, 0.091), (8, 0.048)])
def test_the_bubble_of_the_reference_article(virtual, of_step):
    """p = 15, m = 35, as a share of the step."""
    ratio = SCHEDULES["interleaved"].bubble_ratio(15, 35, virtual)
    assert ratio / (1 + ratio) == pytest.approx(of_step, abs=5e-4)


def test_schedules_beside_each_other():
    """Zero bubble is a third of 1F1B's (Qi et al., table 2), and what is in flight on the first of 8 stages."""
    ratio = {name: schedule.bubble_ratio(8, 32, 1) for name, schedule in SCHEDULES.items()}
    assert ratio["gpipe"] == ratio["1f1b"] == pytest.approx(7 / 32)
    assert ratio["zb_h1"] == pytest.approx(ratio["1f1b"] / 3)
    assert ratio["dualpipe"] == pytest.approx((8 / 2 - 1) * 2 / 3 / 32)
    held = {name: schedule.in_flight(8, 32, 1, 0) for name, schedule in SCHEDULES.items()}
    of_all = {"gpipe": 32, "circular": 32}  # backward begins when every microbatch is through
    assert held == of_all | {"1f1b": 8, "interleaved": 8, "zb_h1": 8, "zb_h2": 15, "zb_v": 8, "dualpipe": 9}
    assert SCHEDULES["1f1b"].in_flight(8, 32, 1, 7) == 1


def test_layouts_are_values():
    assert len({Layout(data=2), Layout(data=2), dataclasses.replace(Layout(), data=2)}) == 1


def test_microbatches_of_interleaved_chunks():
    """8 stages of 4 chunks: the last goes back after 24 passes of a chunk and one, the first after 38 and one."""
    held = [SCHEDULES["interleaved"].in_flight(8, 32, 4, stage) for stage in (0, 1, 7)]
    assert held == [39 / 4, 37 / 4, 25 / 4]
    assert SCHEDULES["interleaved"].in_flight(8, 8, 4, 0) == 8


def test_what_schedules_hold_and_send():
    assert {name: schedule.weight_copies for name, schedule in SCHEDULES.items()} == dict.fromkeys(SCHEDULES, 1) | {
        "dualpipe": 2
    }
    assert {name for name, schedule in SCHEDULES.items() if schedule.messages == 2} == {"zb_v", "dualpipe"}
    assert SCHEDULES["circular"].in_flight(1, 8, 1, 0) == 1 and SCHEDULES["circular"].in_flight(2, 8, 1, 0) == 8


def test_copies_of_experts():
    assert Layout(tensor=2, context=4, data=8, expert=8).expert_data == 8
    assert Layout(tensor=2, data=8, expert=4, zero_group=4).expert_zero_degree == 2
    assert Layout(tensor=2, data=8, expert=4, zero_group=4, expert_zero_group=1).expert_zero_degree == 1
    assert Layout(data=8, expert=8, zero_group=2).expert_zero_degree == 1


@pytest.mark.parametrize(
    ("shape", "layout", "said"),
    [
        (Shape("x", 4, 512, 48, 8, 64, 1000, 1536), Layout(tensor=6), "num_kv_heads=8 must divide the tensor degree"),
        (Shape("x", 4, 512, 8, 8, 64, 1000, 1001), Layout(tensor=2), "hidden_dim=1001 must be divisible by the tensor"),
        (
            Shape("x", 4, 500, 10, 10, 50, 1000, 0, num_moe_layers=4, num_experts=4, expert_hidden_dim=1408),
            Layout(tensor=5, expert_tensor=5),
            "expert_hidden_dim=1408 must be divisible by the expert_tensor degree",
        ),
    ],
)
def test_widths_that_do_not_divide(shape, layout, said):
    with pytest.raises(CallerError, match=said):
        layout.check(shape)


def test_a_flag_is_a_flag():
    with pytest.raises(CallerError, match="sequence_parallel=1"):
        Layout(sequence_parallel=1)
