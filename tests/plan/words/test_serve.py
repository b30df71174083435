"""`gpt4moe plan serve` and `speculate` as a user calls them: JSON, text, pictures, mistakes in one line."""

import json
import re

import pytest

from gpt4moe.launch import main
from gpt4moe.plan.words import serve_simulated

MIXTRAL = ("plan", "serve", "--shape=mixtral_8x7b", "--num_chips=8")
REFERENCE = ("plan", "serve", "--gin_file=gin_configs/model/gpt4_1p8t.gin", "--chip=a100_40", "--price=1")


def document(capsys, *words: str) -> dict:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_references_128_chips(capsys):
    """The audit's row of 4,096 rows, of which A100 of 40 GB hold a quarter by heads and all by batch."""
    fixed = ("--tensor=8", "--stage=16", "--expert=1", "--batch=256", "--cache=batch")
    found = document(capsys, *REFERENCE, *fixed)
    (row,) = found["frontier"]
    assert found["total_parameters"] == pytest.approx(1.8326e12, rel=1e-4)
    assert (row["chips"], row["sequences"]) == (128, 4096)
    assert row["dollars_per_1k_tokens"] == pytest.approx(0.0043, rel=0.01)
    assert row["user_tokens_per_second"] == pytest.approx(2.02, rel=0.01)
    assert [item["service"] for item in found["cheapest"]] == [None, None]  # too slow for any reader
    with pytest.raises(SystemExit):
        main([*REFERENCE, "--cache=both"])
    capsys.readouterr()
    assert main([*REFERENCE, *fixed[:4], "--cache=heads"]) == 2  # eight copies of the cache have no room
    assert "--batch=256 rows for each stage is more than any layout holds (1,038 sequences" in capsys.readouterr().err


def test_the_model_of_a_gin_file_is_the_one_that_is_costed(capsys):
    fixed = ("--tensor=8", "--stage=16", "--expert=1", "--batch=64")
    whole, half = (
        document(capsys, *REFERENCE, *fixed, f"--gin.NUM_EXPERTS={experts}")["frontier"][0] for experts in (16, 8)
    )
    assert half["stage_seconds"]["weights_seconds"] < 0.55 * whole["stage_seconds"]["weights_seconds"]
    assert half["dollars_per_1k_tokens"] < whole["dollars_per_1k_tokens"]


def test_the_table_says_what_the_document_holds(capsys, tmp_path):
    picture = tmp_path / "frontier.png"
    assert main([*MIXTRAL, "--weights=bfloat16,fp8", "--min_speed=50", f"--plot={picture}"]) == 0
    text = capsys.readouterr().out
    found = document(capsys, *MIXTRAL, "--weights=bfloat16,fp8", "--min_speed=50")
    cheapest = found["cheapest"][0]["service"]
    assert f"no other beats these {len(found['frontier'])}" in text
    assert f"cheapest at 50.00 tok/s a user: ${cheapest['dollars_per_1k_tokens']:.5f} per 1k tokens" in text
    assert cheapest["user_tokens_per_second"] >= 50
    # A replica's second costs the same, whether it reads prompts or writes answers.
    seconds = [
        cheapest[f"{kind}tokens_per_second"] * cheapest[f"{kind}dollars_per_1k_tokens"] for kind in ("", "prompt_")
    ]
    assert seconds[0] == pytest.approx(seconds[1])
    dollars = [row["dollars_per_1k_tokens"] for row in found["frontier"] if row["user_tokens_per_second"] >= 50]
    assert cheapest["dollars_per_1k_tokens"] == min(dollars)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_stages_that_do_not_divide_the_layers_are_named(capsys):
    assert main([*REFERENCE, "--tensor=8", "--stage=16", "--expert=1", "--batch=64"]) == 0
    assert "120 layers do not divide by 16 stages" in capsys.readouterr().out
    assert main([*REFERENCE, "--tensor=8", "--stage=15", "--expert=1", "--batch=16"]) == 0
    assert "do not divide" not in capsys.readouterr().out


def test_a_simulation_is_told_with_what_it_assumed(capsys):
    words = ("--tensor=2", "--stage=1", "--expert=1", "--batch=16", "--simulate", "--requests=40", "--new_tokens=32")
    found = document(capsys, *MIXTRAL, *words)["simulation"]
    assert (found["completed"], found["replicas"], found["replica_chips"], found["seed"]) == (40, 4, 2, 0)
    assert found == document(capsys, *MIXTRAL, *words)["simulation"]
    assert found != document(capsys, *MIXTRAL, *words, "--seed=1")["simulation"]
    readers = document(capsys, *MIXTRAL, *words, "--prefill_chips=2")["simulation"]
    assert (readers["replicas"], readers["prefill_replicas"], readers["prefill"]) == (3, 1, "elsewhere")
    assert main([*MIXTRAL, *words]) == 0
    assert "simulated: 40 requests" in capsys.readouterr().out


def test_a_long_simulation_tells_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(serve_simulated, "MOST_IN_SILENCE", 30)
    words = ("--tensor=2", "--stage=1", "--expert=1", "--batch=16", "--simulate", "--new_tokens=8", "--json")
    assert main([*MIXTRAL, *words, "--requests=40"]) == 0
    told = capsys.readouterr()
    assert told.err.splitlines() == [f"simulating 40 requests: {share}0% have come" for share in range(1, 11)]
    assert json.loads(told.out)["simulation"]["completed"] == 40
    assert main([*MIXTRAL, *words, "--requests=30"]) == 0
    assert not capsys.readouterr().err


def test_small_models_have_columns_and_prices_too(capsys):
    words = ("plan", "serve", "--gin_file=gin_configs/model/tiny.gin", "--num_chips=4")
    row = document(capsys, *words)["frontier"][0]
    assert main(list(words)) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(number for number, line in enumerate(lines) if "tok/s/user" in line)
    cells = re.split(r"  +", lines[head + 1].strip())
    assert len(cells) == len(re.split(r"  +", lines[head].strip())) == 16
    assert float(cells[1]) == pytest.approx(row["dollars_per_1k_tokens"], rel=0.01) != 0
    assert cells[11] == f"{row['tokens_per_second']:,.0f}"
    cheapest = next(line for line in lines if line.startswith("cheapest at"))
    assert "$0.00000" not in cheapest


def test_a_day_is_simulated_and_its_trough_lent(capsys):
    words = (
        "--tensor=2",
        "--stage=1",
        "--expert=1",
        "--batch=8",
        "--simulate",
        "--expected_routing",
        "--lengths=fixed",
    )
    short = ("--new_tokens=8", "--prompt_tokens=64", "--hour_seconds=5", "--requests_per_second=30", "--day=cosine")
    found = document(capsys, *MIXTRAL, *words, *short)["simulation"]
    assert found["completed"] == pytest.approx(30 * 24 * 5, rel=0.1)
    assert found["lent_fraction"] == pytest.approx(found["formula_lent_fraction"], abs=0.03) != 0
    assert len(found["needed_replicas"]) == 24


def test_speculation(capsys):
    words = ("plan", "speculate", "--gin_file=gin_configs/model/gpt4_1p8t.gin", "--batch=1,32")
    found = document(capsys, *words)
    assert [round(row["weight_bound_gain"], 2) for row in found["rows"]] == [0.79, 2.28]
    assert found["dense_gain"] == pytest.approx(2.31, abs=0.005)
    assert main(list(words)) == 0
    assert "0.79x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--shape=None must be named once, not 0 times; give --gin_file=FILE or --shape=NAME"),
        (("--shape=mixtral",), "shape='mixtral' is not among the published ones; near: mixtral_8x7b"),
        (("--shape=mixtral_8x7b", "--chip=h101"), "chip='h101' is not in the table; near: h100"),
        (("--shape=mixtral_8x7b", "--price=-1"), "--price=-1.0 must be a number of at least 0"),
        (("--shape=mixtral_8x7b", "--chip=gb200"), "--price=None of gb200 is not in the table; give --price=DOLLARS"),
        (("--shape=mixtral_8x7b", "--tensor=7"), "tensor=7 must divide model_dim (4096); choose a divisor"),
        (("--shape=mixtral_8x7b", "--expert=3"), "expert=3 must divide num_experts (8); choose a divisor"),
        (("--shape=mixtral_8x7b", "--weights=int4"), "weights='int4' must be in ('bfloat16', 'int8', 'fp8')"),
        (("--shape=mixtral_8x7b", "--context=0"), "context=0 must be a number above 0"),
        (("--shape=mixtral_8x7b", "--min_speed=0"), "min_speed=0.0 must be a number above 0"),
        (("--shape=mixtral_8x7b", "--utilization=2"), "utilization=2.0 must lie between 0 and 1"),
        (("--shape=mixtral_8x7b", "--plot=none/x.png"), "plot='none/x.png' is in a folder that is not there"),
        (("--shape=mixtral_8x7b", "--plot=x.txt"), "plot='x.txt' must end in .png, .svg or .pdf"),
        (("--shape=mixtral_8x7b", "--simulate", "--day=1,2"), "hourly=2 must be 24 rates"),
        (("--shape=mixtral_8x7b", "--simulate", "--day=cosine", "--requests=5"), "--requests=5 goes without --day"),
        (("--shape=mixtral_8x7b", "--simulate", "--day=sine"), "day='sine' must be 'cosine' or 24 numbers"),
        (("--shape=mixtral_8x7b", "--simulate", "--lengths=zipf"), "lengths='zipf' must be in"),
        (("--shape=mixtral_8x7b", "--simulate", "--seed=-1"), "seed=-1 must be an integer from 0"),
        (("--shape=mixtral_8x7b", "--simulate", "--prefill_chips=3"), "prefill_chips=3 must be a multiple of the"),
        (("--shape=mixtral_8x7b", "--simulate", "--min_speed=1e9"), "min_speed=1000000000.0 is more than any layout"),
    ],
)
def test_mistakes_are_one_line(capsys, words, says):
    fixed = ("--stage=1", "--num_chips=16")
    assert main(["plan", "serve", *fixed, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gpt4moe plan: {says}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("--batch=1,x", "batch='1,x' must be whole numbers with commas between"),
        ("--batch=0", "batch=0 must be an integer of at least 1"),
        ("--acceptance=1.5", "acceptance=1.5 must lie between 0 and 1"),
    ],
)
def test_mistakes_about_drafts_are_one_line(capsys, word, says):
    assert main(["plan", "speculate", "--shape=mixtral_8x7b", word]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gpt4moe plan: {says}") and error.count("\n") == 1


def test_the_first_token_passes_every_stage(capsys):
    one, four = (
        document(capsys, *MIXTRAL, f"--stage={stage}", "--tensor=2", "--expert=1", "--batch=1")["frontier"][0]
        for stage in (1, 4)
    )
    hops = 4 * four["stage_seconds"]["hop_seconds"]
    assert four["first_token_seconds"] == pytest.approx(one["first_token_seconds"], rel=0.05, abs=hops)


def test_what_batching_and_experts_do_to_a_batch(capsys):
    """The longest of 64 exponential answers is H(64) = 4.7 times their mean; fixed ones gain nothing."""
    words = (*MIXTRAL, "--tensor=2", "--stage=1", "--expert=1", "--batch=64")
    (row,) = document(capsys, *words)["frontier"]
    assert row["continuous_batching_gain"] == pytest.approx(sum(1 / n for n in range(1, 65)), rel=0.02)
    assert 16 < row["fullest_expert_rows"] < 32
    (row,) = document(capsys, *words, "--lengths=fixed")["frontier"]
    assert row["continuous_batching_gain"] == 1
