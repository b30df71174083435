"""The search: every layout divides, what fits is ranked, and a better machine never makes the answer worse."""

import dataclasses
from collections import Counter

import pytest

from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.config.check import CallerError
from gpt4moe.plan.money import goodput
from gpt4moe.plan.money.goodput import Reliability
from gpt4moe.plan.published.conventions import measured_seconds
from gpt4moe.plan.published.measurements import PUBLISHED_RUNS, read_rows
from gpt4moe.plan.published.setups import setup_of
from gpt4moe.plan.published.validate import examine
from gpt4moe.plan.search.layouts import SPACES, Job, rounder_chips
from gpt4moe.plan.search.ranking import FEWER_CHIPS, cost_all, cost_one, search
from gpt4moe.plan.training import memory
from gpt4moe.plan.training.stacks import Stack

CASES = (("mixtral_8x7b", "h100", 32, 64), ("llama3_8b", "a100_40", 8, 32), ("qwen3_30b_a3b", "tpu_v5p", 16, 32))


def a_job(shape="mixtral_8x7b", chip="h100", num_chips=32, batch_rows=64, space="megatron", **changes) -> Job:
    numerics = memory.NUMERICS[SPACES[space].numerics]
    usual = {"sequence_length": 4096, "stack": Stack(), "numerics": numerics, "dollars_per_hour": 2.0}
    return Job(shape_named(shape), chip_named(chip), num_chips, batch_rows, **(usual | changes))


def without_remat(item):
    return dataclasses.replace(item.layout, remat="full", passes=1)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_every_layout_spans_the_chips_and_divides(space, case):
    job = a_job(*case, space=space)
    found = list(SPACES[space].layouts(job, Counter()))
    assert len(found) > 40
    assert len({candidate.layout for candidate in found}) == len(found)
    for candidate in found:
        assert candidate.layout.chips == job.num_chips
        candidate.layout.check(job.shape)
        assert candidate.layout.microbatches(candidate.batch_rows) == candidate.microbatches


def test_the_tolerance_of_a_batch_is_kept():
    found = list(SPACES["megatron"].layouts(a_job(num_chips=48, batch_rows=250, tolerance=0.05), Counter()))
    exact = list(SPACES["megatron"].layouts(a_job(num_chips=48, batch_rows=250), Counter()))
    assert {candidate.batch_rows for candidate in exact} == {250}
    assert len({candidate.batch_rows for candidate in found}) > 3 and len(found) > len(exact)
    assert all(abs(candidate.batch_rows - 250) <= 12.5 for candidate in found)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_more_memory_never_removes_a_layout_that_fits(space, case):
    job = a_job(*case, space=space)
    feasible = []
    for factor in (1.0, 1.3, 2.0):
        chip = dataclasses.replace(job.chip, memory_bytes=job.chip.memory_bytes * factor)
        found = search(dataclasses.replace(job, chip=chip), SPACES[space])
        feasible.append(({without_remat(item) for item in found.ranked}, found.ranked[0].seconds_per_token))
    assert feasible[0][0] <= feasible[1][0] <= feasible[2][0] and feasible[0][0] < feasible[2][0]
    assert feasible[0][1] >= feasible[1][1] >= feasible[2][1]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("field", ["domain_bytes_per_second", "outside_bytes_per_second", "bandwidth_bytes_per_second"])
def test_the_best_is_not_slower_with_more_bandwidth(space, field):
    job = a_job(space=space)
    chip = job.chip
    if field in {item.name for item in dataclasses.fields(chip)}:
        faster = dataclasses.replace(chip, **{field: 2 * getattr(chip, field)})
    else:
        network = dataclasses.replace(chip.network, **{field: 2 * getattr(chip.network, field)})
        faster = dataclasses.replace(chip, network=network)
    slow, fast = (search(dataclasses.replace(job, chip=each), SPACES[space]).ranked[0] for each in (chip, faster))
    assert fast.seconds_per_token <= slow.seconds_per_token * (1 + 1e-12)


def test_layouts_costed_together_are_costed_as_alone():
    """What layouts have in common is reckoned once; it is the same for all that share it."""
    job = a_job()
    together = cost_all(job, SPACES["megatron"].layouts(job, Counter()))
    for item in together[:: max(len(together) // 40, 1)]:
        alone = cost_one(job, item.layout, item.batch_rows)
        assert (alone.memory, alone.step) == (item.memory, item.step)


def test_what_fits_with_less_recomputed_is_not_recomputed():
    job = a_job()
    for item in search(job).ranked:
        if item.layout.remat == "full":
            less = cost_one(job, dataclasses.replace(item.layout, remat="selective"), item.batch_rows)
            assert not less.memory.fits


def test_our_pipeline_is_filled_no_more_often_than_memory_asks():
    job = a_job("mixtral_8x7b", "h100", 32, 256, space="ours")
    several = [item for item in search(job, SPACES["ours"]).ranked if item.layout.passes > 1]
    assert several
    for item in several[:20]:
        assert item.step.microbatches % item.layout.passes == 0
        least = [passes for passes in range(1, item.layout.passes) if item.step.microbatches % passes == 0]
        fewer = dataclasses.replace(item.layout, passes=least[-1])
        assert not cost_one(job, fewer, item.batch_rows).memory.fits
        assert cost_one(job, fewer, item.batch_rows).step.seconds < item.step.seconds


def test_a_ramp_divides_too():
    job = a_job(ramp_rows=(16, 32), space="ours")
    found = search(job, SPACES["ours"]).ranked
    assert found and len(found) < len(search(a_job(space="ours"), SPACES["ours"]).ranked)
    for item in found:
        rows = item.batch_rows // item.layout.passes if item.layout.stage > 1 else item.layout.data
        assert 16 % rows == 0


def test_dollars_take_fewer_chips_where_time_takes_all():
    job = a_job()
    fast, cheap = (search(job, objective=objective) for objective in ("time", "dollars"))
    assert fast.ranked[0].layout.chips == 32 > cheap.ranked[0].layout.chips
    assert {item.layout.chips for item in cheap.ranked} <= {32 // smaller for smaller in FEWER_CHIPS}
    assert cheap.ranked[0].dollars_per_token < fast.ranked[0].dollars_per_token
    by_hand = 2.0 * 32 * fast.ranked[0].step.seconds / 3600 / (64 * 4096)
    assert fast.ranked[0].dollars_per_token == pytest.approx(by_hand)


def test_the_fit_of_the_nearest_miss_is_in_its_family():
    found = search(a_job("mixtral_8x22b", "a100_40", 32, 64))
    assert len(found.families) > 6
    assert all(item.memory.fits for item in found.ranked) and len(found.ranked) < found.examined
    for name, item in found.families.items():
        same = [other for other in found.ranked if other.family == name]
        assert item.family == name and (item is same[0] if same else not item.memory.fits)


def test_regret_over_published_layouts_of_one_model():
    """Of layouts that somebody measured, the search takes one within 5 % of the best"""
    groups = [group for group in examine(PUBLISHED_RUNS)["regret_groups"] if len(group["rows"]) > 1]
    rows = {row.name: row for row in read_rows(PUBLISHED_RUNS)}
    assert len(groups) >= 5
    for group in groups:
        costed, measured = {}, {}
        for name in group["rows"]:
            setup = setup_of(rows[name])
            batch_rows = setup.batch_tokens // setup.sequence_length
            numerics = dataclasses.replace(memory.MIXED_ADAM, flash=setup.source.stack.flash)
            given = (setup.shape, setup.chip, setup.chips, batch_rows, setup.sequence_length, setup.source.stack)
            costed[name] = cost_one(Job(*given, numerics), setup.layout, batch_rows)
            measured[name] = measured_seconds(setup) / setup.batch_tokens
        picked = min(costed, key=lambda name: costed[name].seconds_per_token)
        assert measured[picked] / min(measured.values()) - 1 < 0.05


def test_no_layout_divides():
    with pytest.raises(CallerError, match=r"^--num_chips=10007 divides into no layout of mixtral_8x7b .*; change "):
        search(a_job(num_chips=10_007))


def test_objective_without_a_price():
    with pytest.raises(CallerError, match="--objective='dollars' needs a price, a800 has none; give --price"):
        search(a_job(chip="a800", dollars_per_hour=None), objective="dollars")


@pytest.mark.parametrize("space", SPACES)
def test_a_ramp_leaves_layouts_without_stages(space):
    """A ramp to 64 sequences from 16: data parallelism alone divides both."""
    found = search(a_job("llama3_8b", "h100", 8, 64, space=space, ramp_rows=(16,)), SPACES[space])
    alone = {item.layout.data for item in found.ranked if item.layout.stage * item.layout.tensor == 1}
    assert 8 in alone


def test_tensor_divides_what_fast_links_join():
    found = SPACES["megatron"].layouts(a_job("gpt4_1p8t", "a100_40", 48, 96), left_out := Counter())
    assert {candidate.layout.tensor for candidate in found} == {1, 2, 4, 8}
    assert any("does not divide the 8 chips that fast links join" in reason for reason in left_out)


def test_a_number_that_divides_badly_leaves_chips_idle():
    """Of 1,000 chips whole servers may be left out: 960 = 2^6 3 5 divide a batch of 960 in more ways than 2^3 5^3."""
    job = a_job(num_chips=1000, batch_rows=960, most_idle=0.05)
    assert rounder_chips(job) == 960
    found, whole = search(job), search(dataclasses.replace(job, most_idle=0.0), SPACES["megatron"])
    best = found.ranked[0]
    assert best.idle_chips == 40 and not any(item.idle_chips for item in whole.ranked)
    assert best.seconds_per_token < whole.ranked[0].seconds_per_token
    assert best.model_flops_utilization == pytest.approx(0.96 * best.step.model_flops_utilization)
    assert best.dollars_per_token == pytest.approx(2.0 * 1000 * best.seconds_per_token / 3600)
    assert rounder_chips(dataclasses.replace(job, num_chips=960)) is None
    assert rounder_chips(dataclasses.replace(job, most_idle=0.01)) != 960


def test_dollars_count_the_hours_that_failures_cost():
    reliability = Reliability(1e7, 60, 600)
    sure = cost_one(job := a_job(), next(iter(SPACES["megatron"].layouts(job, Counter()))).layout, 64)
    failing = dataclasses.replace(sure, job=dataclasses.replace(job, reliability=reliability))
    share = goodput.goodput(dataclasses.replace(reliability, job_mtbf_seconds=1e7 / 32))
    assert 0.9 < share < 0.99 and failing.goodput == share
    assert failing.dollars_per_token == pytest.approx(sure.dollars_per_token / share)


def test_every_rule_of_the_space_is_there():
    job = a_job("mixtral_8x7b", "h100", 16, 64, sequence_length=2048)
    left_out = Counter()
    layouts = {candidate.layout: candidate for candidate in SPACES["megatron"].layouts(job, left_out)}
    assert {layout.context for layout in layouts} == {1, 2}
    assert left_out["rows cut below 1,024 tokens a chip"] > 0
    assert left_out["several rows on chips that share each of them"] > 0
    assert all(layout.microbatch_rows == 1 for layout in layouts if layout.context > 1)
    assert left_out["fewer microbatches than interleaved stages"] > 0
    several = [candidate for layout, candidate in layouts.items() if layout.virtual_stages > 1]
    assert several and all(candidate.microbatches >= candidate.layout.stage for candidate in several)
    assert {(layout.zero, layout.zero_group) for layout in layouts if layout.tensor == 1} >= {(3, 0), (3, 8), (2, 0)}
    assert {layout.expert_tensor for layout in layouts if layout.tensor == 4} == {1, 4}
    two = [layout for layout in layouts if layout.zero == 2]
    assert two and all(layout.stage == 1 or layouts[layout].microbatches == 1 for layout in two)
    assert left_out["ZeRO-2 in a pipeline, which sums the gradients of every microbatch"] > 0


def test_fsdp_divides_the_width_of_the_model():
    job = a_job("mixtral_8x7b", "h100", 48, 96, space="ours")
    found = list(SPACES["ours"].layouts(job, left_out := Counter()))
    assert left_out["fsdp does not divide model_dim"] > 0
    assert all(4096 % candidate.layout.zero_group == 0 for candidate in found if candidate.layout.zero == 3)


def test_chunks_of_one_layer_where_layers_do_not_divide():
    """Llama 3's 126 layers over 16 stages: 7 chunks, whose first and last stage hold one layer less."""
    job = a_job("llama3_405b", "h100", 1024, 512, tolerance=0.05)
    found = SPACES["megatron"].layouts(job, Counter())
    chunks = {candidate.layout.virtual_stages for candidate in found if candidate.layout.stage == 16}
    assert chunks == {1, 7}
