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
from gpt4moe.plan import decode_price, expert_tradeoff
from gpt4moe.plan.decode_price import Cluster
from gpt4moe.plan.step_breakdown import Division, break_down
from gpt4moe.plan.tornado import tornado
from gpt4moe.plan.waterfall import CAUSES, waterfall

GPT4, A100 = shape_named("gpt4_1p8t"), chip_named("a100_40")
REFERENCE = Division(25_000, tensor=8, stages=15)
CLUSTER = Cluster(A100, 8, 16, dollars_per_chip_hour=1.0)
RUN = ["--shape=gpt4_1p8t", "--chip=a100_40", "--num_chips=25000", "--tokens=13e12", "--price=1"]


def step(division=REFERENCE, chip=A100, shape=GPT4, remat="full", imbalance=1.1):
    return break_down(shape, chip, division, 60e6, 8192, remat, imbalance)


def test_a_waterfall_by_hand():
    bars = waterfall(4.0, {"bubble": 1.0, "tensor": 3.0, "cosmic rays": 2.0}, goodput=0.5)
    assert [bar.cause for bar in bars] == ["peak", "tensor", "bubble", "cosmic rays", "failures"]
    assert [bar.seconds for bar in bars] == [4, 3, 1, 2, 10]
    assert [bar.utilization for bar in bars] == pytest.approx([1, 4 / 7, 1 / 2, 4 / 10, 4 / 20])
    assert sum(bar.share for bar in bars) == pytest.approx(1)


@pytest.mark.parametrize(("seconds", "goodput", "said"), [(-1, 1, "tensor=-1 must be"), (1, 0, "goodput=0 must lie")])
def test_a_waterfall_refuses_what_cannot_be(seconds, goodput, said):
    with pytest.raises(CallerError, match=said):
        waterfall(1.0, {"tensor": seconds}, goodput)


def test_the_step_of_the_reference():
    """Its bubble is 28.6 % of what microbatches take, 14 / (35 + 14); its MFU without failures is 30 %."""
    found = step()
    assert set(found.lost_seconds) <= set(CAUSES)
    before = found.ideal_seconds + sum(
        seconds for cause, seconds in found.lost_seconds.items() if cause not in ("bubble", "data", "optimizer")
    )
    assert found.lost_seconds["bubble"] / before == pytest.approx(14 / 35, abs=1e-6)
    assert found.ideal_seconds == pytest.approx(60e6 * flops.train_flops_per_token(GPT4) / (25_000 * 312e12))
    assert found.lost_seconds["data"] == pytest.approx(0.25 * 61.1e9 / (25e9 * 0.55), rel=0.01)
    assert 0.28 < found.utilization < 0.36


def test_each_setting_costs_what_it_stands_for():
    base = step()
    faster = dataclasses.replace(A100, network=dataclasses.replace(A100.network, domain_bytes_per_second=1e15))
    assert step(chip=faster).lost_seconds["tensor"] < 1e-2 < base.lost_seconds["tensor"]
    assert step(remat="none").lost_seconds["recomputation"] == 0
    assert step(imbalance=1.0).lost_seconds["imbalance"] == 0
    virtual = step(dataclasses.replace(REFERENCE, virtual_stages=4)).lost_seconds["bubble"]
    assert virtual == pytest.approx(base.lost_seconds["bubble"] / 4)
    spread = step(dataclasses.replace(REFERENCE, expert=16)).lost_seconds
    assert spread["expert"] > 1 and spread["data"] < base.lost_seconds["data"]


@pytest.mark.parametrize("field", ["peak_flops", "bandwidth_bytes_per_second"])
def test_a_faster_chip_is_never_slower(field):
    times = [step(chip=dataclasses.replace(A100, **{field: getattr(A100, field) * by})).seconds for by in (1, 2, 4)]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_a_tornado_by_hand():
    swings = tornado(lambda given: {"area": given["a"] * given["b"] ** 2}, {"a": 3.0, "b": 2.0}, 0.1)
    assert [swing.assumption for swing in swings] == ["b", "a"]
    assert swings[0].less["area"] == pytest.approx(-0.19) and swings[0].more["area"] == pytest.approx(0.21)
    assert swings[1].less["area"] == pytest.approx(-0.1) and swings[1].value == 3.0


def test_the_price_of_the_reference_within_what_communication_costs():
    """$0.00444 at $1 and 8,001 tokens/s with 0.9 of 32 ms for collectives, which this leaves out."""
    assert decode_price.stage_seconds(GPT4, CLUSTER, 256) == pytest.approx(31.1e-3, rel=0.015)
    assert decode_price.dollars_per_1k_tokens(GPT4, CLUSTER, 4096) == pytest.approx(0.00444, rel=0.05)
    assert decode_price.tokens_per_second(GPT4, CLUSTER, 4096) == pytest.approx(8001, rel=0.05)


def test_more_experts_train_cheaper_and_serve_dearer():
    counts = (2, 4, 8, 16, 32, 64, 128)
    found = expert_tradeoff.options(GPT4, counts, CLUSTER, 4096, 60e6, saving=0.1)
    trained, served = (
        [getattr(one, name) for one in found] for name in ("train_dollars", "serve_dollars_per_1k_tokens")
    )
    assert trained == sorted(trained, reverse=True) and served == sorted(served)
    assert all(one.on_frontier for one in found) and found[3].train_dollars == 60e6 and found[3].serving_chips == 128
    best = [expert_tradeoff.cheapest(found, tokens).num_experts for tokens in (0, 1e12, 1e14)]
    assert best[0] == 128 and best[1] == 16 and best == sorted(best, reverse=True)
    tokens = expert_tradeoff.break_even_tokens(found[3], found[5])
    total = [one.train_dollars + tokens / 1000 * one.serve_dollars_per_1k_tokens for one in (found[3], found[5])]
    assert total[0] == pytest.approx(total[1])


def test_experts_that_save_nothing_are_never_worth_it():
    found = expert_tradeoff.options(GPT4, (2, 16, 64), CLUSTER, 4096, 60e6, saving=0.0)
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
        capsys, "explain", *RUN, "--tensor=8", "--stages=15", "--batch_tokens=60e6", f"--plot={tmp_path / 'fall.png'}"
    )
    assert (tmp_path / "fall.png").stat().st_size > 10_000
    assert explained["bars"][-1]["utilization"] == pytest.approx(explained["delivered_utilization"])
    again = document(capsys, "cost", *RUN, f"--step_seconds={explained['step_seconds']}", "--batch_tokens=60e6")
    assert again["days"] == pytest.approx(explained["days"])


def test_a_ramp_costs_days(capsys):
    layout = ["--tensor=8", "--stages=15", "--mfu=0.34"]
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
        (["cost", *RUN, "--mfu=0.3", "--gin_file=x.gin"], "--shape='gpt4_1p8t' must be given, or a --gin_file"),
        (["cost", *RUN], "--mfu=None must be given"),
        (["cost", *RUN, "--step_seconds=30"], "--batch_tokens=None must be given"),
        (["cost", *RUN[:-1], "--price=-1", "--mfu=0.3"], "--price=-1.0 must be a number of at least 0"),
        (["cost", *RUN, "--mfu=0.3", "--ramp=5:1e6"], "--ramp=[(5.0, 1000000.0)] must start at 0 tokens"),
        (["cost", *RUN, "--mfu=0.3", "--ramp=x"], "'x' must have the form FROM:BATCH"),
        (["cost", *RUN[:1], "--chip=h1000", "--num_chips=8", "--tokens=1e9", "--mfu=0.3"], "chip='h1000' is not in"),
        (["explain", *RUN, "--batch_tokens=1e4"], "--batch_tokens=10000.0 must hold a microbatch for each"),
        (["explain", *RUN, "--batch_tokens=6e7", "--tensor=8", "--expert=7"], "--expert=7 must divide the 3125"),
        (["explain", *RUN, "--batch_tokens=6e8", "--plot=a.pdf"], "file='a.pdf' must end in .png"),
        (["simulate", "--num_chips=8", "--days=-1"], "--days=-1.0 must be a number above 0"),
        (["what-if", *RUN, "--mfu=0.3", "--experts=1"], "num_experts=1 must be an integer of at least 2"),
        (["what-if", *RUN, "--mfu=0.3", "--change=2"], "change=2.0 must lie between 0 and 1"),
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
