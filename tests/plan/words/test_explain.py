"""Waterfall, tornado, experts: identities that hold for any numbers, and the reference's own."""

import dataclasses
import json
import re

import pytest

from gpt4moe.accounting import flops
from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.config.check import CallerError
from gpt4moe.launch import main
from gpt4moe.plan.money import expert_tradeoff
from gpt4moe.plan.money.tornado import tornado
from gpt4moe.plan.money.training_job import TrainingJob
from gpt4moe.plan.published.calibration import FORMAT
from gpt4moe.plan.serving.cost import Demand, serve_demand
from gpt4moe.plan.training import step_time
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.stacks import Stack
from gpt4moe.plan.training.step_losses import step_losses, whole_batch
from gpt4moe.plan.training.waterfall import CAUSES, waterfall
from gpt4moe.plan.words import what_if

GPT4, A100 = shape_named("gpt4_1p8t"), chip_named("a100_40")
REFERENCE = Layout(tensor=8, stage=15, data=208, expert_tensor=8, remat="full")
SERVER = what_if.server_of(GPT4, A100, 8, 16)
DEMAND = Demand(4096, 2048, dollars_per_chip_hour=1.0)
TRAIN_FLOPS = flops.train_flops_per_token(GPT4)
RUN = ["--shape=gpt4_1p8t", "--chip=a100_40", "--num_chips=25000", "--tokens=13e12", "--price=1"]


def step(layout=REFERENCE, chip=A100, stack=None):
    batch = whole_batch(layout, 60e6, 8192)
    return step_losses(GPT4, layout, chip, batch, 8192, stack=stack, num_chips=25_000)


def test_a_waterfall_by_hand():
    bars = waterfall(4.0, {"bubble": 1.0, "tensor_communication": 3.0, "cosmic rays": 2.0}, goodput=0.5)
    assert [bar.cause for bar in bars] == ["peak", "tensor_communication", "bubble", "cosmic rays", "failures"]
    assert [bar.seconds for bar in bars] == [4, 3, 1, 2, 10]
    assert [bar.utilization for bar in bars] == pytest.approx([1, 4 / 7, 1 / 2, 4 / 10, 4 / 20])
    assert sum(bar.share for bar in bars) == pytest.approx(1)


@pytest.mark.parametrize(("seconds", "goodput", "said"), [(-1, 1, "tensor=-1 must be"), (1, 0, "goodput=0 must lie")])
def test_a_waterfall_refuses_what_cannot_be(seconds, goodput, said):
    with pytest.raises(CallerError, match=said):
        waterfall(1.0, {"tensor": seconds}, goodput)


def test_the_step_of_the_reference():
    """35 microbatches; the bubble is 14 / 35 of a mean stage, the last has the head too; 40 chips have no replica."""
    found = step()
    assert set(found.lost_seconds) <= set(CAUSES)
    assert found.ideal_seconds + sum(found.lost_seconds.values()) == pytest.approx(found.seconds)
    assert found.batch_tokens == 35 * 208 * 8192 and found.step.microbatches == 35
    assert found.ideal_seconds == pytest.approx(found.batch_tokens * TRAIN_FLOPS / (25_000 * 312e12))
    assert found.lost_seconds["idle_chips"] == pytest.approx(found.ideal_seconds * 40 / 24_960)
    after = ("bubble", "data_communication", "optimizer", "stage_communication", "idle_chips")
    busy = found.ideal_seconds + sum(value for cause, value in found.lost_seconds.items() if cause not in after)
    assert 0.95 * 14 / 35 < found.lost_seconds["bubble"] / busy < 14 / 35
    reduced = 2 * 7 / 8 * 8192 * 10_752 * 2  # bytes of an all-reduce over tensor of one row a token
    sums = 35 * 8 * 3 * (1 + 2) * reduced / (300e9 * 0.75)  # thrice a layer: one of attention, two of two experts
    assert found.lost_seconds["tensor_communication"] == pytest.approx(sums, rel=0.05)
    assert found.utilization == pytest.approx(found.step.model_flops_utilization * 24_960 / 25_000)


def test_causes_are_the_parts_of_a_step():
    parts = {part for kind in step_time.KINDS.values() for part in kind}
    assert parts - {"expert_matmul", "head"} == set(CAUSES) - {"idle_chips", "imbalance", "failures"}


def test_each_setting_costs_what_it_stands_for():
    base = step()
    faster = dataclasses.replace(A100, network=dataclasses.replace(A100.network, domain_bytes_per_second=1e15))
    assert step(chip=faster).lost_seconds["tensor_communication"] < 0.2 < base.lost_seconds["tensor_communication"]
    assert step(dataclasses.replace(REFERENCE, remat="none")).lost_seconds["recompute"] == 0
    virtual = dataclasses.replace(REFERENCE, virtual_stages=4, schedule="interleaved")
    assert step(virtual).lost_seconds["bubble"] == pytest.approx(base.lost_seconds["bubble"] / 4)
    spread = dataclasses.replace(REFERENCE, expert=16)
    uneven, even = (step(spread, stack=Stack(imbalance=imbalance)) for imbalance in (1.2, 1.0))
    assert even.lost_seconds["imbalance"] == 0 < uneven.lost_seconds["imbalance"] == uneven.seconds - even.seconds
    assert uneven.lost_seconds["expert_communication"] > 1
    assert uneven.lost_seconds["data_communication"] < base.lost_seconds["data_communication"]


def test_products_in_8_bits_beat_the_ideal():
    """At four fifths of the 8-bit peak they take less than the 16-bit peak allows; the sum is still the step."""
    h100, stack = chip_named("h100"), Stack(matmul_bits=8)
    sixteen, eight = step(chip=h100), step(chip=h100, stack=stack)
    assert eight.lost_seconds["matmul"] < 0 < sixteen.lost_seconds["matmul"]
    bars = waterfall(eight.ideal_seconds, eight.lost_seconds)
    assert sum(bar.seconds for bar in bars) == pytest.approx(eight.seconds)


@pytest.mark.parametrize("field", ["peak_flops", "bandwidth_bytes_per_second"])
def test_a_faster_chip_is_never_slower(field):
    times = [step(chip=dataclasses.replace(A100, **{field: getattr(A100, field) * by})).seconds for by in (1, 2, 4)]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_a_tornado_by_hand():
    swings = tornado(lambda given: {"area": given["a"] * given["b"] ** 2}, {"a": 3.0, "b": 2.0}, 0.1)
    assert [swing.assumption for swing in swings] == ["b", "a"]
    assert swings[0].less["area"] == pytest.approx(-0.19) and swings[0].more["area"] == pytest.approx(0.21)
    assert swings[1].less["area"] == pytest.approx(-0.1) and swings[1].value == 3.0


def test_the_price_of_the_reference():
    """$0.00444 at $1 and 8,001 tokens/s where each of 8 chips stores all keys, which then do not fit beside weights."""
    heads = dataclasses.replace(SERVER, layout=dataclasses.replace(SERVER.layout, cache="heads"))
    stored = serve_demand(heads, DEMAND)
    assert stored.dollars_per_1k_tokens == pytest.approx(0.00444, rel=0.01) and not stored.fits
    assert stored.tokens_per_second == pytest.approx(8001, rel=0.01)
    shared = serve_demand(SERVER, DEMAND)
    assert shared.fits and 0.0042 < shared.dollars_per_1k_tokens < stored.dollars_per_1k_tokens


def test_a_faster_chip_serves_8_bits_faster():
    h100 = chip_named("h100")
    server = what_if.server_of(GPT4, h100, 8, 16, "fp8")
    job = TrainingJob(GPT4, h100, 8192, 13e12, 0.4, 2.0, 50_700, 30, 600)
    given = what_if.assumptions_of(job, server, DEMAND)
    results = what_if.results_of(job, server)
    base, faster = results(given), results(given | {"peak_flops": 2 * h100.peak_flops})
    computing = serve_demand(server, DEMAND).stage_time
    saved = 1 - faster["dollars_per_1k_tokens"] / base["dollars_per_1k_tokens"]
    assert faster["days"] < base["days"] and saved == pytest.approx(computing.flops_seconds / computing.seconds / 2)


def test_more_experts_train_cheaper_and_serve_dearer():
    counts = (2, 4, 8, 16, 32, 64, 128)
    found = expert_tradeoff.options(SERVER, counts, DEMAND, 60e6, saving=0.1)
    trained, served = (
        [getattr(one, name) for one in found] for name in ("train_dollars", "serve_dollars_per_1k_tokens")
    )
    assert trained == sorted(trained, reverse=True) and served == sorted(served)
    assert all(one.on_frontier and one.fits for one in found)
    assert found[3].train_dollars == 60e6 and found[3].serving_chips == 128
    best = [expert_tradeoff.cheapest(found, tokens).num_experts for tokens in (0, 1e12, 1e14)]
    assert best[0] == 128 and best[1] == 16 and best == sorted(best, reverse=True)
    tokens = expert_tradeoff.break_even_tokens(found[3], found[5])
    total = [one.train_dollars + tokens / 1000 * one.serve_dollars_per_1k_tokens for one in (found[3], found[5])]
    assert total[0] == pytest.approx(total[1])


def test_experts_beyond_a_layer_a_stage_do_not_fit(capsys):
    """1,024 experts would want 900 stages of 120 layers."""
    (found,) = expert_tradeoff.options(SERVER, (1024,), DEMAND, 60e6, saving=0.1)
    assert found.serving_chips == 8 * 120 and not found.fits
    assert main(["plan", "what-if", *RUN, "--mfu=0.3", "--serve_stages=8"]) == 0
    text = capsys.readouterr().out
    assert "these chips do not hold the weights and the cache" in text and "(does not fit)" in text


def test_experts_that_save_nothing_are_never_worth_it():
    found = expert_tradeoff.options(SERVER, (2, 16, 64), DEMAND, 60e6, saving=0.0)
    assert [one.on_frontier for one in found] == [True, False, False]
    assert expert_tradeoff.break_even_tokens(found[1], found[2]) is None


def document(capsys, *words):
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_words_give_documents_that_agree(capsys, tmp_path):
    known = ["--mfu=0.34", "--save_seconds=60"]
    cost = document(capsys, "cost", *RUN, *known, "--chip_dollars=17500")
    assert cost["days_without_failures"] == pytest.approx(94.9, abs=0.1) and cost["goodput"] == pytest.approx(
        0.814, abs=1e-3
    )
    assert cost["rental_dollars"] == pytest.approx(cost["days"] * 24 * 25_000)
    base = document(capsys, "what-if", *RUN, *known, f"--plot={tmp_path / 'tornado.png'}")
    assert base["base"]["dollars"] == pytest.approx(cost["rental_dollars"])
    assert (tmp_path / "tornado.png").stat().st_size > 10_000 and base["cheapest"]["1e+12"] == 16
    explained = document(
        capsys, "explain", *RUN, "--tensor=8", "--stage=15", "--batch_tokens=60e6", f"--plot={tmp_path / 'fall.png'}"
    )
    assert (tmp_path / "fall.png").stat().st_size > 10_000
    layout = explained["layout"]
    assert (layout["expert_tensor"], layout["data"], layout["remat"]) == (8, 208, "full")
    assert explained["bars"][-1]["utilization"] == pytest.approx(explained["delivered_utilization"])
    measured = [f"--step_seconds={explained['step_seconds']}", f"--batch_tokens={explained['batch_tokens']}"]
    predicted = ["--tensor=8", "--stage=15", "--batch_tokens=60e6"]
    for given in (measured, predicted):
        again = document(capsys, "cost", *RUN, *given)
        assert again["days"] == pytest.approx(explained["days"])
        assert again["utilization_is_predicted"] == (given is predicted)


def test_explain_names_its_software_and_takes_a_calibration(capsys, tmp_path):
    file = tmp_path / "constants.json"
    file.write_text(json.dumps({"format": FORMAT, "stacks": {"megatron-2022/a100_40": {"seconds_scale": 2.0}}}))
    words = ["explain", *RUN, "--tensor=8", "--stage=15", "--batch_tokens=60e6"]
    plain = document(capsys, *words, "--stack=megatron-2022")
    twice = document(capsys, *words, "--stack=megatron-2022", f"--calibration={file}")
    other = document(capsys, *words, f"--calibration={file}")
    assert twice["step_seconds"] == pytest.approx(2 * plain["step_seconds"])
    assert [found["is_calibrated"] for found in (plain, twice, other)] == [False, True, False]
    assert not plain["stack"]["flash"] and plain["stack"]["matmul_efficiency"] == 0.72
    assert main(["plan", *words, "--stack=megatron-2022", f"--calibration={file}"]) == 0
    text = capsys.readouterr().out
    assert "software: megatron-2022, products in 16 bits, scores through memory" in text
    assert "calibrated: seconds_scale 2.000" in text and "does not fit by" in text


def test_a_ramp_costs_days(capsys):
    layout = ["--tensor=8", "--stage=15", "--mfu=0.34"]
    plain, ramped = (document(capsys, "cost", *RUN, *layout, *more) for more in ([], ["--ramp=0:15e6,1e12:60e6"]))
    parts = ramped["ramp"]
    assert [part["tokens"] for part in parts] == [1e12, 12e12]
    assert sum(part["days"] for part in parts) == pytest.approx(ramped["days"]) and ramped["days"] > plain["days"]
    assert parts[1]["days"] == pytest.approx(plain["days"] * 12 / 13)
    assert parts[0]["days"] == pytest.approx(plain["days"] / 13 * parts[1]["busy_share"] / parts[0]["busy_share"])


def test_a_simulation_beside_its_formula(capsys):
    found = document(capsys, "simulate", "--num_chips=16384", "--days=30", "--runs=8", "--seed=3")
    assert found["goodput"] == pytest.approx(found["goodput_exact"], abs=5 * found["goodput_standard_error"])
    assert sum(found["shares"].values()) == pytest.approx(1) and len(found["each_run"]) == 8
    assert found["young_interval_seconds"] == pytest.approx(817, abs=1)


@pytest.mark.parametrize(
    "word", [["cost", *RUN, "--mfu=0.3"], ["what-if", *RUN, "--mfu=0.3"], ["simulate", "--num_chips=8", "--days=9"]]
)
def test_the_words_have_a_text_to_read(word, capsys):
    assert main(["plan", *word]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 5


def test_the_page_of_the_audit_is_whole_and_alone(tmp_path, capsys):
    page = tmp_path / "audit.html"
    assert main(["plan", "article", f"--report={page}", "--set=gpu_memory_gb=80"]) == 0
    text = page.read_text()
    assert text.count("<svg") == text.count("</svg>") == 4 and text.count("<tr>") == 76
    assert "moved from 61.97, INCONSISTENT" in text
    assert not re.search(r'(src|href)="(?!#)', text.replace('xlink:href="#', ""))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cost", *RUN, "--mfu=0.3", "--gin_file=x.gin"], "--shape='gpt4_1p8t' must be named once, not 2 times"),
        (["cost", *RUN], "--batch_tokens=None must be given, with a layout or --step_seconds; or give --mfu"),
        (["cost", *RUN, "--mfu=0.3", "--step_seconds=30"], "--mfu=0.3 must be given, or --step_seconds with"),
        (["cost", *RUN, "--step_seconds=30"], "--batch_tokens=None must be given"),
        (["cost", *RUN, "--step_seconds=9", "--batch_tokens=6e7"], "--step_seconds=9.0 must be at least 12.87"),
        (["cost", *RUN[:-1], "--price=-1", "--mfu=0.3"], "--price=-1.0 must be a number of at least 0"),
        (["cost", *RUN, "--mfu=0.3", "--ramp=5:1e6"], "--ramp=[(5.0, 1000000.0)] must start at 0 tokens"),
        (["cost", *RUN, "--mfu=0.3", "--ramp=0:-1e6,1e11:4e6"], "must hold at least one sequence (8,192 tokens) in"),
        (["cost", *RUN, "--mfu=0.3", "--save_seconds=0"], "--save_seconds=0.0 must be a number above 0"),
        (["cost", *RUN, "--mfu=0.3", "--tokens=1e300"], "--tokens=1e+300 must be at most 1e+18"),
        (["cost", *RUN, "--mfu=0.3", "--num_chips=10000000000000"], "must be at most 10,000,000"),
        (["cost", *RUN, "--chip=t4", "--num_chips=64", "--batch_tokens=6e7"], "--chip='t4' has no network"),
        (["simulate", "--num_chips=10000000", "--days=1e3"], "leaves no time to get ahead"),
        (["simulate", "--num_chips=100", "--days=1e9"], "saves and failures to draw, at most are 1e+07"),
        (["what-if", *RUN, "--mfu=0.3", "--price=0"], "--price=0.0 must be a number above 0"),
        (["what-if", *RUN, "--mfu=0.3", "--serve_tensor=0"], "--serve_tensor=0 must be an integer of at least 1"),
        (["what-if", *RUN, "--mfu=0.3", "--serve_stages=500"], "--serve_stages=500 must be at most the model's layers"),
        (["cost", *RUN, "--mfu=0.3", "--ramp=x"], "'x' must have the form FROM:BATCH"),
        (["cost", *RUN[:1], "--chip=h1000", "--num_chips=8", "--tokens=1e9", "--mfu=0.3"], "chip='h1000' is not in"),
        (["explain", *RUN, "--batch_tokens=1e4"], "--batch_tokens=10000.0 must hold a microbatch for each"),
        (["explain", *RUN, "--batch_tokens=6e7", "--tensor=8", "--expert=7"], "Layout.expert=7 times expert_tensor"),
        (["explain", *RUN, "--batch_tokens=6e7", "--tensor=5"], "num_heads=168 must be divisible by the tensor"),
        (["explain", *RUN, "--batch_tokens=6e7", "--tensor=0"], "--tensor=0 must be an integer of at least 1"),
        (["explain", *RUN, "--batch_tokens=6e7", "--stage=30000"], "--num_chips=25000 must be at least tensor"),
        (["explain", *RUN, "--batch_tokens=6e7", "--stack=megatorn"], "--stack='megatorn' must be in bloom, deepseek"),
        (["explain", *RUN, "--batch_tokens=6e7", "--imbalance=0.5"], "--imbalance=0.5 must be at least 1"),
        (["explain", *RUN, "--batch_tokens=6e7", "--numerics=x"], "--numerics='x' must be in mixed_adam"),
        (["explain", *RUN, "--batch_tokens=nan"], "--batch_tokens=nan must be a number above 0"),
        (["explain", *RUN], "--batch_tokens=None must be given"),
        (["explain", *RUN, "--batch_tokens=6e8", "--plot=a.pdf"], "file='a.pdf' must end in .png"),
        (["simulate", "--num_chips=8", "--days=-1"], "--days=-1.0 must be a number above 0"),
        (["what-if", *RUN, "--mfu=0.3", "--experts=1"], "num_experts=1 must be an integer of at least 2"),
        (["what-if", *RUN, "--mfu=0.3", "--change=2"], "change=2.0 must lie between 0 and 1"),
        (["what-if", *RUN, "--mfu=0.3", "--weights=fp8"], "weights='fp8' is not what a100_40 computes in"),
        (["what-if", *RUN, "--mfu=0.3", "--sequences=0"], "--sequences=0 must be an integer of at least 1"),
        (["what-if", *RUN, "--mfu=0.3", "--serve_tensor=5"], "tensor=5 must divide model_dim (10752)"),
        (["article", "--report=/nowhere/a.html"], "file='/nowhere/a.html' must lie in a folder"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words, said, capsys):
    try:
        code = main(["plan", *words])
    except SystemExit as left:  # argparse
        code = left.code
    captured = capsys.readouterr()
    assert code == 2 and said in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_energy_and_owned_dollars_of_a_run(capsys):
    """700 W a chip, 1.82 for its server, three quarters drawn, 1.1 for the building; 28 % of the value a year."""
    words = ["plan", "cost", "--shape=llama3_8b", "--chip=h100", "--num_chips=64", "--tokens=1e12", "--json"]
    rest = ["--mfu=0.4", "--chip_dollars=30000", "--kwh_price=0.1"]
    assert main([*words, *rest]) == 0
    found = json.loads(capsys.readouterr().out)
    energy = found["chip_hours"] * 700 * 1.82 * 0.75 * 1.1 / 1000
    assert found["energy_kwh"] == pytest.approx(energy) and found["energy_dollars"] == pytest.approx(0.1 * energy)
    assert found["amortized_dollars"] == pytest.approx(found["chip_hours"] / 8760 * 30_000 * 0.14 * 2.302585)
    assert main([*words, *rest, "--stage=8", "--ramp=0:1e6,5e11:8e6"]) == 0
    ramped = json.loads(capsys.readouterr().out)
    assert ramped["energy_kwh"] / energy == pytest.approx(ramped["days"] / found["days"])
    assert ramped["days"] > 1.01 * found["days"]
