"""Cells of a sweep: points, seeds, names, and what is held fixed; nothing is trained."""

import math

import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.config.sweep import SweepConfig, spaced
from gpt4moe.configure import build_sweep
from gpt4moe.sweep.cells import address, make_cells
from gpt4moe.sweep.engine import _grouped, plan
from gpt4moe.sweep.hold import quantity

TINY = ["gin_configs/run/tiny.gin"]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """What `gpt4moe sweep` gives for the tiny run."""
    file = tmp_path_factory.mktemp("gin") / "sweep.gin"
    file.write_text(
        "from __gin__ import dynamic_registration\nfrom gpt4moe.config import sweep\n"
        f'include "{TINY[0]}"\nsweep.SweepConfig.axes = {{"NUM_EXPERTS": [2, 4]}}\n'
    )
    return build_sweep([str(file)])[1]


def test_story_of_a_grid_with_paired_seeds(build):
    cells = make_cells(SweepConfig({"NUM_EXPERTS": [2, 4], "LEARNING_RATE": [1e-3, 1e-2]}, seeds=2), build)
    seen = [(cell.point["NUM_EXPERTS"], cell.point["LEARNING_RATE"], cell.seed) for cell in cells]
    assert seen == [(e, rate, seed) for e in (2, 4) for rate in (1e-3, 1e-2) for seed in (0, 1)]
    assert len({cell.id for cell in cells}) == 8
    run, _ = build(cells[-1].overrides)
    assert (run.model.moe.num_experts, run.optimizer.learning_rate, run.train.seed) == (4, 1e-2, 1)


def test_names_joined_by_commas_change_together(build):
    cells = make_cells(SweepConfig({"NUM_EXPERTS, EXPERTS_PER_TOKEN": [(2, 2), (4, 3)]}), build)
    moes = [build(cell.overrides)[0].model.moe for cell in cells]
    assert [(moe.num_experts, moe.experts_per_token) for moe in moes] == [(2, 2), (4, 3)]


def test_spaced_axes():
    assert spaced("axis", "log", [1, 100, 3]) == pytest.approx((1, 10, 100))
    assert spaced("axis", "linear", [0, 1, 5]) == pytest.approx((0, 0.25, 0.5, 0.75, 1))


def test_random_draws_are_the_same_at_every_point_and_lie_in_their_range(build):
    config = SweepConfig(
        {"NUM_EXPERTS": [2, 4]}, random={"LEARNING_RATE": {"log_uniform": [1e-4, 1e-1]}}, num_samples=5
    )
    cells = make_cells(config, build)
    rates = [[cell.point["LEARNING_RATE"] for cell in cells if cell.point["NUM_EXPERTS"] == e] for e in (2, 4)]
    assert rates[0] == rates[1] and len(set(rates[0])) == 5
    assert all(1e-4 <= rate <= 1e-1 for rate in rates[0])


@pytest.mark.parametrize(
    ("axes", "held", "binding"),
    [
        ({"EXPERTS_PER_TOKEN": [2, 3, 4]}, "active_flops", "moe.MoeConfig.hidden_dim"),
        ({"NUM_EXPERTS": [2, 4, 8]}, "total_parameters", "moe.MoeConfig.hidden_dim"),
        ({"NUM_LAYERS": [1, 2, 4]}, "train_flops", "TRAIN_STEPS"),
        ({"BATCH_TOKENS": [64, 128, 512]}, "tokens", "TRAIN_STEPS"),
    ],
)
def test_a_held_quantity_stays_and_no_neighbour_is_nearer(build, axes, held, binding):
    cells = make_cells(SweepConfig(axes, hold={held: binding}), build)
    target = quantity(held, build(())[0])
    for cell in cells:
        value = cell.derived[binding]
        off = abs(quantity(held, build(cell.overrides)[0]) - target)
        assert math.isclose(abs(cell.deviations[held]), off / target, rel_tol=1e-9, abs_tol=1e-12)
        for other in {max(value - 1, 1), value + 1} - {value}:
            changed = [word for word in cell.overrides if not word.startswith(binding)] + [f"{binding}={other}"]
            assert abs(quantity(held, build(changed)[0]) - target) >= off


def test_derived_values_are_multiples_and_targets_may_be_given(build):
    hold = {"total_parameters": ["moe.MoeConfig.hidden_dim", 60_000]}
    config = SweepConfig({"NUM_EXPERTS": [2, 4]}, hold=hold, multiples={"moe.MoeConfig.hidden_dim": 8})
    for cell in make_cells(config, build):
        assert cell.derived["moe.MoeConfig.hidden_dim"] % 8 == 0
        assert abs(quantity("total_parameters", build(cell.overrides)[0]) / 60_000 - 1) < 0.05


def test_a_cell_is_named_by_what_decides_its_result(build):
    run = build(())[0]
    again = build(("data.DataConfig.store='elsewhere'", "train.TrainConfig.log_every=7"))[0]
    other = build(("SEED=1",))[0]
    assert address(run) == address(again) != address(other)


def test_a_point_that_cannot_be_built_is_a_cell_with_its_reason(build):
    cells = make_cells(SweepConfig({"EXPERTS_PER_TOKEN": [2, 9]}), build)
    assert [cell.refused is None for cell in cells] == [True, False]
    assert "experts_per_token=9" in cells[1].refused


def test_two_ways_to_one_cell_are_one_cell(build):
    assert len(make_cells(SweepConfig({"NUM_EXPERTS": [4, 4]}), build)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axes": {"A": []}}, "not empty"),
        ({"axes": {"A,B": [1, 2]}}, "lists of 2 values"),
        ({"axes": {"A": {"log": [0, 1, 3]}}}, r"SweepConfig.axes\['A'\]\['log'\]=.*above 0 if log"),
        ({}, "SweepConfig.axes={} and one seed leave nothing to compare; give axes, random or several seeds"),
        ({"axes": {"A": {"cubic": [0, 1, 3]}}}, "must have one key of"),
        ({"axes": {"SEED": [1, 2]}}, "two of axes"),
        ({"axes": {"A": [1]}, "hold": {"mass": "B"}}, "must be one of"),
        ({"axes": {"A": [1]}, "hold": {"tokens": "A"}}, "two of axes"),
        ({"random": {"A": {"uniform": [2, 1]}}}, r"\[low, high\]"),
        ({"seeds": [1, 1]}, "distinct"),
        ({"axes": {"B": [1, 2]}, "multiples": {"A": 8}}, "derived by hold"),
        ({"seeds": 2, "retries": -1}, "at least 0"),
    ],
)
def test_mistakes_are_refused(settings, message):
    with pytest.raises(CallerError, match=message):
        SweepConfig(**settings)


def test_what_cannot_be_held_says_so(build):
    config = SweepConfig({"NUM_LAYERS": [1, 64]}, hold={"train_flops": "TRAIN_STEPS"})
    cells = make_cells(config, build)
    assert cells[0].refused is None and "cannot be held by TRAIN_STEPS" in cells[1].refused


def test_two_quantities_are_held_together_or_refused(build):
    """What holds the parameters also changes the FLOPs, whose steps were derived before it."""
    hold = {"train_flops": ["TRAIN_STEPS", 10**10], "active_parameters": ["moe.MoeConfig.hidden_dim", 60_000]}
    for cell in make_cells(SweepConfig({"NUM_EXPERTS": [2, 4]}, hold=hold), build):
        assert cell.refused is None and all(abs(off) < 0.1 for off in cell.deviations.values())
        assert quantity("train_flops", build(cell.overrides)[0]) == pytest.approx(1e10, rel=0.1)
    against = {"active_parameters": ["moe.MoeConfig.hidden_dim", 60_000], "active_flops": ["NUM_LAYERS", 10**9]}
    cells = make_cells(SweepConfig({"NUM_EXPERTS": [2, 4]}, hold=against), build)
    assert all("cannot be held" in cell.refused for cell in cells)


def test_what_a_binding_does_not_move_is_refused_in_a_line(build):
    cells = make_cells(SweepConfig({"NUM_EXPERTS": [2, 4]}, hold={"tokens": ["NUM_LAYERS", 10**12]}), build)
    assert all(
        "does not follow from NUM_LAYERS" in cell.refused and "that changes it" in cell.refused for cell in cells
    )


def test_the_nearest_that_can_be_built_is_taken(build):
    """Widths are even multiples of four heads: of those around the target, seven of eight are refused."""
    hold = {"active_parameters": ["model.ModelConfig.model_dim", 60_000]}
    (cell,) = make_cells(SweepConfig({"NUM_EXPERTS": [4]}, hold=hold, seeds=[0]), build)[:1]
    chosen = cell.derived["model.ModelConfig.model_dim"]
    found = {}
    for width in range(max(chosen - 12, 1), chosen + 13):
        changed = ("NUM_EXPERTS=4", f"model.ModelConfig.model_dim={width}")
        try:
            found[width] = abs(quantity("active_parameters", build(changed)[0]) - 60_000)
        except CallerError:
            continue
    assert 2 < len(found) < 6 and min(found, key=found.get) == chosen


def test_quantities_are_those_counted_by_hand(build):
    """Two layers of width D: attention of H heads with one key head, K of E gated experts of width F, head of V."""
    run = build(())[0]
    model, moe, attention = run.model, run.model.moe, run.model.attention
    width, size = model.model_dim, model.model_dim // attention.num_heads
    one = 3 * width * moe.hidden_dim
    of_attention = 2 * width * width + 2 * width * size * attention.num_kv_heads
    of_norms = 2 * width + 2 * size * attention.qk_norm
    layer = of_attention + of_norms + width * moe.num_experts
    rest = width + model.vocab_size * width
    total = model.num_layers * (layer + moe.num_experts * one) + rest
    assert quantity("total_parameters", run) == total
    active = total - model.num_layers * (moe.num_experts - moe.experts_per_token) * one
    assert quantity("active_parameters", run) == active
    tokens = run.train.steps * run.train.batch_tokens
    assert quantity("tokens", run) == tokens
    assert quantity("train_flops", run) == pytest.approx(3 * quantity("active_flops", run) * tokens)


def test_all_seed_names_are_bound_and_draws_follow_their_distribution(build):
    config = SweepConfig({"NUM_EXPERTS": [2, 4]}, seeds=[3], seed_names=["SEED", "data.DataConfig.seed"])
    run = build(make_cells(config, build)[0].overrides)[0]
    assert (run.train.seed, run.data.seed) == (3, 3)
    drawn = SweepConfig(random={"LEARNING_RATE": {"log_uniform": [1e-4, 1e-2]}}, num_samples=60)
    rates = sorted(cell.point["LEARNING_RATE"] for cell in make_cells(drawn, build))
    assert 6e-4 < rates[30] < 1.7e-3  # the geometric mean, not the mean of 5e-3


def test_cells_keep_the_order_of_the_axes_and_whole_numbers_stay_whole(build):
    cells = make_cells(SweepConfig({"NUM_EXPERTS": [2, 4, 2]}), build)
    assert [cell.point["NUM_EXPERTS"] for cell in cells] == [2, 4]
    cells = make_cells(SweepConfig({"NUM_EXPERTS": {"log": [2, 8, 3]}}), build)
    assert [cell.point["NUM_EXPERTS"] for cell in cells] == [2, 4, 8] and not any(cell.refused for cell in cells)


def test_a_held_quantity_may_itself_be_an_axis(build):
    axes = {"train_flops": [3e9, 3e10], "NUM_LAYERS": [1, 2]}
    cells = make_cells(SweepConfig(axes, hold={"train_flops": "TRAIN_STEPS"}), build)
    assert [(cell.point["train_flops"], cell.point["NUM_LAYERS"]) for cell in cells] == [
        (3e9, 1), (3e9, 2), (3e10, 1), (3e10, 2),
    ]  # fmt: skip
    for cell in cells:
        spent = quantity("train_flops", build(cell.overrides)[0])
        assert spent == pytest.approx(cell.point["train_flops"], rel=0.05)
        assert cell.deviations["train_flops"] == pytest.approx(spent / cell.point["train_flops"] - 1)
    with pytest.raises(CallerError, match=r"train_flops.* are quantities, which follow from other settings; name in"):
        SweepConfig(axes)


def test_processes_get_fewer_runs_towards_the_end_and_each_run_once():
    assert [len(group) for group in _grouped(list(range(21)), 8, 1)] == [8, 8, 5]
    waiting, sizes = list(range(21)), []
    while waiting:  # two at a time, as long as they last
        for group in _grouped(waiting, 8, 2)[:1]:
            sizes.append(len(group))
            waiting = waiting[len(group) :]
    assert sizes == [6, 4, 3, 2, 2, 1, 1, 1, 1] and sum(sizes) == 21
    assert len(_grouped(list(range(100)), 8, 2)[0]) == 8


def test_a_sweep_in_a_store_is_refused(build):
    with pytest.raises(CallerError, match=r"--workdir=.gs://bucket/sweep.? must be a local folder"):
        plan(SweepConfig(axes={"NUM_EXPERTS": [2, 4]}), build, "gs://bucket/sweep", print)
