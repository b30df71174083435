"""The audit of the reference article: its numbers, what moves them, verdicts by rule, mistakes in one line."""

import csv
import dataclasses
import json
import pathlib
import runpy

import pytest

from gpt4moe.accounting.published import shape_named
from gpt4moe.accounting.shape import shape_of
from gpt4moe.config.check import CallerError
from gpt4moe.configure import build_model
from gpt4moe.launch import main
from gpt4moe.plan.article.audit import FORMULAS, audit
from gpt4moe.plan.article.claims import KINDS, Claim, read_claims
from gpt4moe.plan.article.facts import Answer
from gpt4moe.plan.article.premises import WIDTHS, Premises, article_premises, article_shape, move
from gpt4moe.plan.article.verdict import VERDICTS, judge

ROOT = pathlib.Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests/golden/article_computed.csv"
EXPECTED = {int(row["id"]): row for row in csv.DictReader(GOLDEN.read_text().splitlines())}
GPT4 = "gin_configs/model/gpt4_1p8t.gin"
COUNTED = {14, 21, 32, 35, 36, 44, 58, 60, 62, 63, 64, 70}  # rows that a number of experts decides
OF_ATTENTION = {1, 11, 14, 18, 19, 20, 21, 28, 35, 36, 37, 39, 40, 41, 42, 44, 46, 62, 63, 64, 67, 70, 72}
MOVES = {
    "num_experts=64": COUNTED | {11},
    "head_dim=64": OF_ATTENTION,
    "num_heads=84": OF_ATTENTION - {72},
    "dollars_per_gpu_hour=1.5": {43, 68},
    "dollars_per_h100_hour=1": {47, 69},
    "gpu_memory_gb=80": {36},
    "gpu=a100_80": {36, 70},
    "training_tokens=26e12": {1, 37, 39, 40, 41, 42, 46, 74},
    "batch_tokens=3e7": {32},
    "days_high=105": {41, 43},
    "inference_batch=65536": {60},
    "speculative_tokens=3": {73},
    "expert_hidden_dim=21504": OF_ATTENTION - {18, 72} | {16},
    "slow_words_per_minute=300": {5},
    "fast_words_per_minute=500": {6, 7, 9, 52},
    "tokens_per_word=1": {5, 6, 7, 9, 52},
    "dense_parameters=5e11": {7, 8},
    "dense_tokens_per_second=40": {8},
    "weight_bytes=1": {7, 9, 54, 55},
    "small_batch=128": {54},
    "large_batch=1024": {55},
    "cache_batch=256": {56, 57},
    "cache_context_tokens=4096": {56, 57},
    "cache_head_dim=64": {56, 57},
    "inference_stages=8": {61, 62, 63, 64, 65, 68, 69},
    "inference_tensor=4": {61, 63, 64, 68, 69, 70},
    "vision_bytes_per_patch=300": {75},
    "text_bytes_per_token=2": {75},
    "h100=h200": {9, 50},
    "gpus_per_node=4": {7, 8, 9, 44},
}


def moved(*settings):
    rows = audit(*move(article_premises(read_claims()), article_shape(), settings))
    return {row.id: row for row in rows if row.moved}


@pytest.mark.parametrize("row", audit(), ids=lambda row: str(row.id))
def test_every_computed_row_is_that_of_the_reference(row):
    expected = EXPECTED[row.id]
    assert row.verdict == expected["verdict"]
    assert row.moved is None and row.verdict in VERDICTS
    if expected["computed"]:
        assert row.computed == pytest.approx(float(expected["computed"]), rel=0.005)


def test_every_claim_has_a_formula_or_needs_none():
    claims = read_claims()
    assert list(claims) == list(range(1, 76)) == list(EXPECTED)
    assert {claim.kind for claim in claims.values()} == set(KINDS)
    needed = {number for number, claim in claims.items() if claim.kind not in ("input", "outside")}
    assert needed <= set(FORMULAS) and all(claims[number].formula for number in needed)


def test_the_model_of_the_article_is_the_one_we_train():
    own = dataclasses.replace(shape_of(build_model([GPT4])), name=article_shape().name)
    assert own == article_shape()
    claims = read_claims()
    stated = {12: "num_layers", 15: "num_experts", 17: "experts_per_token", 72: "num_kv_heads"}
    assert {number: claims[number].number for number in stated} == {
        number: getattr(own, width) for number, width in stated.items()
    }


@pytest.mark.parametrize("setting", MOVES)
def test_a_premise_moves_the_rows_that_rest_on_it_and_no_other(setting):
    assert set(moved(setting)) == MOVES[setting]


def test_every_premise_moves_a_row_or_a_note():
    base = audit()
    premises = article_premises(read_claims())
    for field in dataclasses.fields(Premises):
        value = {"gpu": "a100_80", "h100": "h200", "gpu_memory_gb": 80.0}.get(field.name)
        value = value or getattr(premises, field.name) * (2 if "percent" not in field.name else 0.5)
        rows = audit(dataclasses.replace(premises, **{field.name: value}))
        changed = [
            row.id for row, old in zip(rows, base, strict=True) if (row.computed, row.note) != (old.computed, old.note)
        ]
        assert changed, f"{field.name} decides nothing"


def test_every_computed_row_is_moved_by_some_setting():
    """But the two FLOPs of a parameter. A chip with twice the peak in 8 bits moves the H100's."""
    assert 51 in moved("h100=b200")
    computed = {row.id for row in audit() if row.computed is not None}
    known = set().union(*MOVES.values()) | set(moved("h100=b200")) | set(moved("experts_per_token=4"))
    assert computed - known == {53}


def test_more_memory_makes_the_layout_fit():
    row = moved("gpu_memory_gb=80")[36]
    assert row.moved["verdict"] == "INCONSISTENT" and row.verdict == "OK"
    assert row.moved["computed"] == row.computed


def test_twice_the_price_of_an_hour_needs_twice_the_tokens():
    row = moved("dollars_per_gpu_hour=2")[68]
    assert row.computed == 2 * row.moved["computed"]


def test_rounded_numbers_of_the_article_move_in_proportion():
    """Twice the tokens are twice the days, from its own 2.15e25 FLOPs and not from ours."""
    row = moved("training_tokens=26e12")[39]
    assert row.computed == pytest.approx(2 * 2.15e25 / (25_000 * 312e12 * 0.36) / 86_400)


def test_the_literal_price_is_ten_times_the_peak():
    notes = {row.id: row.note for row in audit()}
    assert "cents, as written, need 10.1x the peak" in notes[68] and "need 7.4x the peak" in notes[69]
    assert "0.79x at 1, 1.64x at 8" in notes[73] and "55.8% of the 16-bit peak" in notes[46]


def _claim(kind, value):
    return Claim(0, "", "", value, "", kind, "")


@pytest.mark.parametrize(
    ("kind", "value", "computed", "verdict"),
    [
        ("equal", "100", 102.9, "OK"),
        ("equal", "3", 2.81, "OK"),
        ("equal", "3.1", 2.81, "INCONSISTENT"),
        ("equal", "5.6e14", 5.54e11, "UNIT-ERROR"),
        ("equal", "5.6e14", 5e11, "INCONSISTENT"),
        ("about", "3e11", 4.02e11, "ROUNDED"),
        ("about", "3e11", 6e11, "INCONSISTENT"),
        ("above", "10", 10.3, "OK"),
        ("above", "10", 9.9, "INCONSISTENT"),
        ("below", "5", 4.9, "OK"),
        ("below", "5", 0.25, "LOOSE"),
        ("below", "40", 62, "INCONSISTENT"),
        ("equal", "1", 0, "INCONSISTENT"),
    ],
)
def test_verdicts_by_rule(kind, value, computed, verdict):
    assert judge(_claim(kind, value), Answer(computed)) == verdict


def test_other_claims_and_the_peak_decide_too():
    assert judge(_claim("equal", "500"), Answer(512, elsewhere=32)) == "INCONSISTENT"
    assert judge(_claim("price", "0.0049"), Answer(7256, beyond_peak=10.1)) == "UNIT-ERROR"
    assert judge(_claim("price", "0.0049"), Answer(7256, beyond_peak=0.9)) == "OK"


def test_the_command_prints_rows_with_ids_and_numbers(capsys):
    assert main(["plan", "article", "--json", "--set", "num_experts=64"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows] == list(EXPECTED)
    assert rows[10]["moved"]["computed"] < 2e12 < rows[10]["computed"]
    assert main(["plan", "article", "--set=gpu_memory_gb=80"]) == 0
    assert "INCONSISTENT -> OK" in capsys.readouterr().out


def test_a_gin_file_takes_the_place_of_the_models_shape(capsys):
    assert main(["plan", "article", "--json", f"--gin_file={GPT4}"]) == 0
    assert not any(row["moved"] for row in json.loads(capsys.readouterr().out))
    assert main(["plan", "article", "--json", f"--gin_file={GPT4}", "--gin.NUM_EXPERTS=64"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["id"] for row in rows if row["moved"]} == MOVES["num_experts=64"]


def test_a_model_without_experts_is_audited_too():
    rows = audit(shape=shape_named("llama3_70b"))
    assert {row.id: row.computed for row in rows}[16] == 0


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("gpu_memory=80", "--set gpu_memory=80 is no premise; near: gpu_memory_gb"),
        ("dollars_per_gpu_hour=-1", "dollars_per_gpu_hour=-1.0 must be a number above 0"),
        ("training_tokens=many", "--set training_tokens=many must be a number"),
        ("training_tokens=nan", "training_tokens=nan must be a number above 0"),
        ("num_experts=1.5", "num_experts=1.5 must be an integer of at least 1"),
        ("expert_hidden_dim=-4", "expert_hidden_dim=-4 must be an integer of at least 1"),
        ("gpus=2.5", "gpus=2.5 must be an integer"),
        ("mfu_low_percent=120", "mfu_low_percent=120.0 must lie below 100"),
        ("gpu=a100", "chip='a100' is not in the table; near: a100_40, a100_80"),
        ("h100=v100", "h100='v100' must be a chip with a peak at 8 bits"),
        ("num_experts", "--set='num_experts' must have the form NAME=VALUE"),
        ("num_experts=1", "Shape.experts_per_token=2 must be at most num_experts (1)"),
    ],
)
def test_a_premise_that_cannot_be_is_one_line(setting, said, capsys):
    assert main(["plan", "article", "--set", setting]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    with pytest.raises(CallerError):
        move(article_premises(read_claims()), article_shape(), [setting])


def test_the_claims_are_installed_with_the_package(monkeypatch):
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **settings: given.update(settings))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    tables = list((ROOT / "gpt4moe/plan").rglob("*.csv"))
    assert len(tables) == 2
    for table in tables:
        package = ".".join(table.relative_to(ROOT).parent.parts)
        assert any(table.match(pattern) for pattern in given["package_data"][package])


def test_widths_are_fields_of_a_shape():
    assert set(WIDTHS) <= {field.name for field in dataclasses.fields(type(article_shape()))}
