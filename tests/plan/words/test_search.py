"""`gpt4moe plan search` as typed: its document, its table, the file it writes, and mistakes in one line."""

import html
import json
import re

import pytest

from gpt4moe.configure import build_run
from gpt4moe.launch import main

SHAPE = ("--shape=mixtral_8x7b", "--chip=h100", "--num_chips=32", "--batch_tokens=262144", "--sequence_length=4096")
TINY = ("--gin_file=gin_configs/run/tiny.gin", "--gin.BATCH_TOKENS=2048", "--gin.NUM_LAYERS=4")


def document_of(capsys, *words) -> dict:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def mistake_of(capsys, *words) -> str:
    assert main(["plan", "search", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpt4moe plan: ") and said.count("\n") == 1
    return said.removeprefix("gpt4moe plan: ").rstrip()


def test_a_published_shape(capsys):
    """`search` is the word that is meant where none is given."""
    document = document_of(capsys, *SHAPE, "--top=5")
    assert document["space"] == "megatron" and document["num_chips"] == 32 and len(document["best"]) == 5
    costs = [row["step_seconds"] / row["batch_tokens"] for row in document["best"]]
    assert costs == sorted(costs) and document["best"][0]["why"] == "best"
    assert document["examined"] >= document["fitting"] > 5
    for row in document["best"]:
        assert row["fits"] and sum(row["parts"].values()) == pytest.approx(row["step_seconds"])
        assert sum(row["memory"].values()) == pytest.approx(row["memory_bytes"]) and row["chips"] == 32
    lost = [row for row in document["families"] if row["layout"] and not row["fits"]]
    assert lost and all("does not fit by" in row["why"] for row in lost)
    assert document["checkpoint"]["checkpoint_every"] >= 1


def test_the_reference_on_its_own_chips(capsys):
    """Tensor 8, stage 15 and ZeRO-1 on 25,000 A100 of 40 GB: 24,960 of them, and by how much it does not fit."""
    words = (
        "--shape=gpt4_1p8t",
        "--chip=a100_40",
        "--num_chips=24960",
        "--batch_tokens=60e6",
        "--sequence_length=8192",
    )
    asked = ("--layout=tensor=8,stage=15,zero=1", "--numerics=mixed_adam_16")
    narrow = ("--batch_tolerance=0.0065",)  # 208 replicas: 7,280 for 7,324 sequences
    row = document_of(capsys, "search", *words, *asked, *narrow)["asked"]
    assert row["layout"]["data"] == 208 and row["layout"]["expert_tensor"] == 8 and not row["fits"]
    rows = 7 / 8 * 8192 * 2 * 2 * 2 * 10_752  # there and back, whole on each chip that holds a part of an expert
    assert row["missing_bytes"] == pytest.approx(64.6e9 + rows + 3.6e9 - 40e9, rel=0.06)
    assert row["why"].startswith(f"does not fit by {row['missing_bytes'] / 1e9:.1f} GB on stage 0: weight 30.8")


def test_one_chip_per_sequence_is_missing(capsys):
    document = document_of(capsys, "search", *SHAPE[:2], "--num_chips=128", *SHAPE[3:])
    why = {row["family"]: row["why"] for row in document["families"]}
    assert why["FSDP alone"] == "needs 128 sequences in a batch, one for each chip; there are 64"


def test_a_run_file_is_searched_in_our_space_and_written(capsys, tmp_path):
    path = tmp_path / "planned.gin"
    long = ("--gin.CHECKPOINT_EVERY=10000000", "--gin.TRAIN_STEPS=10000000", "--save_seconds=0.001")
    document = document_of(capsys, *TINY, *long, "--chip=h100", "--num_chips=8", f"--export={path}")
    best = document["best"][0]
    assert document["space"] == "ours" and best["layout"]["schedule"] == "circular"
    run, _ = build_run([str(path)])
    assert run.train.batch_tokens == 2048 and run.model.num_layers == 4
    assert run.mesh.sizes(8)["expert"] == best["layout"]["expert"]
    assert run.train.checkpoint_every == document["checkpoint"]["checkpoint_every"] > 1
    saves = document["checkpoint"]
    assert saves["checkpoint_every"] == round(saves["interval_seconds"] / best["step_seconds"])


def test_a_ramp_is_costed_and_written(capsys, tmp_path):
    path = tmp_path / "ramp.gin"
    words = (*TINY, "--chip=h100", "--num_chips=8", "--ramp=0:1024,1e6:4096", f"--export={path}")
    document = document_of(capsys, *words)
    assert [stage["batch_tokens"] for stage in document["ramp"]] == [1024, 4096]
    assert document["ramp"][0]["step_seconds"] < document["ramp"][1]["step_seconds"]
    assert build_run([str(path)])[0].train.ramp == ((0, 1024), (1_000_000, 4096))


def test_the_mesh_of_a_run_file_tells_its_chips_and_is_asked_about(capsys):
    mesh = ('--gin.MESH={"fsdp": 2, "tensor": 2}', "--gin.MICROBATCH_ROWS=16")
    document = document_of(capsys, *TINY, *mesh, "--chip=h100")
    assert document["num_chips"] == 4
    assert (document["asked"]["layout"]["tensor"], document["asked"]["layout"]["zero_group"]) == (2, 2)


def test_the_table_says_what_the_document_does(capsys):
    assert main(["plan", *SHAPE, "--top=2", "--layout=tensor=2,zero=3"]) == 0
    text = capsys.readouterr().out
    for words in ("32 x h100 of 80 GB", "best by time", "best of each family", "asked", "why not first", "save  "):
        assert words in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--shape=None must be given, or a --gin_file instead; e.g. --shape=gpt4_1p8t"),
        (("--chip=h10", *SHAPE[:1]), "chip='h10' is not in the table; near: h100"),
        (("--num_chips=10007",), "--num_chips=10007 divides into no layout of mixtral_8x7b"),
        (("--num_chips=0",), "--num_chips=0 must be an integer of at least 1"),
        (("--batch_tokens=100",), "--batch_tokens=100.0 must be at least one sequence (4096 tokens)"),
        (("--batch_tokens=-4",), "--batch_tokens=-4.0 must be a number above 0"),
        (("--price=-1",), "--price=-1.0 must be a number of at least 0"),
        (("--memory_gb=0",), "--memory_gb=0.0 must be a number above 0"),
        (("--numerics=fp4",), "--numerics='fp4' must be in mixed_adam, "),
        (("--stack=jax",), "--stack='jax' must be in bloom, deepseek"),
        (("--layout=tensors=8",), "--layout='tensors=8' has unknown 'tensors'; known are tensor, "),
        (("--layout=tensor=x",), "--layout='tensor=x' needs a whole number for tensor, not 'x'"),
        (("--layout=tensor=64",), "--layout='tensor=64' needs 64 chips, there are 32"),
        (("--layout=tensor=3",), "num_heads=32 must be divisible by the tensor degree (3)"),
        (("--export=x.gin",), "--export='x.gin' needs a run file and what our trainer can run; give --gin_file"),
        (("--top=0",), "--top=0 must be an integer of at least 1"),
        (("--ramp=0:100",), "--ramp=100.0 must be at least one sequence (4096 tokens)"),
        (("--batch_tolerance=-1",), "--batch_tolerance=-1.0 must be a number of at least 0"),
        (("--calibration=none.json",), "none.json"),
    ],
)
def test_mistakes_of_a_shape(capsys, words, said):
    given = SHAPE if words else ("--chip=h100",)
    assert said in mistake_of(capsys, *(word for word in given if not _again(word, words)), *words)


def _again(word: str, words: tuple[str, ...]) -> bool:
    return any(other.partition("=")[0] == word.partition("=")[0] for other in words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--num_chips=8", "--batch_tokens=2050"),
            "--batch_tokens=2050.0 must be a multiple of the sequence length (64)",
        ),
        ((), "--num_chips=None must be given: no run file's MESH tells it"),
        (("--num_chips=8", "--shape=gpt4_1p8t"), "--shape='gpt4_1p8t' goes without --gin_file; give one of them"),
        (("--num_chips=8", "--save_seconds=0"), "--save_seconds=0.0 must be a number above 0"),
        (("--num_chips=8", "--verify=0"), "--verify=0 must be an integer of at least 1"),
        (("--num_chips=8", "--verify=-1"), "--verify=-1 must be an integer of at least 1"),
        (("--num_chips=8", "--sequence_length=0"), "--sequence_length=0 must be an integer of at least 1"),
        (("--num_chips=8", "--layout=tensor=2,tensor=4"), "has tensor twice; give it once"),
        (("--num_chips=8", "--export=gin_configs/run/tiny.gin"), "is the run file itself; give another name"),
        (("--num_chips=8", "--export=/nowhere/x.gin"), "must lie in a folder that is there"),
        (("--num_chips=8", "--most_idle=1"), "--most_idle=1.0 must be at least 0 and below 1"),
        (("--num_chips=8", "--layout=tensor=0"), "--layout='tensor=0': tensor=0 must be an integer of at least 1"),
        (("--num_chips=99000000",), "--num_chips=99000000 must be at most 10,000,000"),
        (("--num_chips=64", "--batch_tokens=64"), "--num_chips=64 divides into no layout of tiny"),
        (("--num_chips=8", "--export=x.gin", "--space=megatron"), "--export='x.gin' needs a run file and what our"),
        (("--num_chips=8", "--export=x.gin", "--memory_gb=3"), "has nothing to write: no layout fits; take more chips"),
    ],
)
def test_mistakes_of_a_run_file(capsys, words, said):
    assert said in mistake_of(capsys, *TINY, "--chip=h100", *words)


def test_a_model_file_has_no_batch(capsys):
    said = mistake_of(capsys, "--gin_file=gin_configs/model/tiny.gin", "--chip=h100", "--num_chips=8")
    assert said == "--gin_file='gin_configs/model/tiny.gin' has no RunConfig; give a run file"


def test_idle_chips_are_told(capsys):
    words = ("--shape=llama3_8b", "--chip=h100", "--num_chips=8", "--batch_tokens=1e6", "--sequence_length=8192")
    row = document_of(capsys, "search", *words, "--layout=stage=5")["asked"]
    assert row["idle_chips"] == 3 and row["why"].endswith(", 3 chips idle")
    many = (
        "--shape=mixtral_8x7b",
        "--chip=h100",
        "--num_chips=1000",
        "--batch_tokens=3932160",
        "--sequence_length=4096",
    )
    assert main(["plan", "search", *many, "--most_idle=0.05", "--top=1"]) == 0
    assert "idle        40 chips: 960 divide better; the best layout of all takes " in capsys.readouterr().out
    assert document_of(capsys, "search", *many, "--most_idle=0")["idle"] is None


def test_a_ramp_of_a_run_file(capsys):
    """From 4 sequences to 32 on 4 chips: nothing is left out for it, and what does not divide is said so."""
    words = (*TINY, "--chip=h100", "--num_chips=4", "--ramp=0:256,1e6:2048")
    document = document_of(capsys, "search", *words, "--layout=data=4")
    assert document["asked"]["layout"]["data"] == 4
    families = {row["family"]: row for row in document["families"]}
    assert any(row["fits"] and row["layout"]["stage"] == 1 for row in families.values())
    assert not any("does not divide over 4" in row["why"] for row in families.values())
    assert main(["plan", "search", *TINY, "--chip=h100", "--num_chips=1", "--top=1"]) == 0
    assert "alone" not in capsys.readouterr().out


def test_an_exported_run_saves_before_its_end(capsys, tmp_path):
    """A tiny model's interval is millions of steps; the run has 100."""
    words = (*TINY, "--gin.TRAIN_STEPS=100", "--gin.CHECKPOINT_EVERY=40", "--chip=h100", "--num_chips=8")
    document = document_of(capsys, *words, f"--export={tmp_path / 'planned.gin'}")
    assert document["checkpoint"]["checkpoint_every"] == 40
    assert build_run([str(tmp_path / "planned.gin")])[0].train.checkpoint_every == 40


def test_the_page_of_a_search_is_whole_and_alone(capsys, tmp_path):
    page = tmp_path / "search.html"
    document = document_of(capsys, "search", *SHAPE, "--top=4", "--layout=tensor=8", f"--report={page}")
    text = page.read_text()
    assert text.count("<svg") == text.count("</svg>") == 3
    assert text.count("<tr>") == 3 + 4 + len(document["families"]) + 1
    assert all(html.escape(row["why"]) in text for row in (*document["best"], *document["families"], document["asked"]))
    assert not re.search(r'(src|href)="(?!#)', text.replace('xlink:href="#', ""))
    said = mistake_of(capsys, *SHAPE, f"--report={tmp_path / 'search.txt'}")
    assert "must end in .html" in said


def test_the_page_of_a_search_that_found_nothing(capsys, tmp_path):
    page = tmp_path / "search.html"
    document = document_of(capsys, "search", *SHAPE, "--memory_gb=5", f"--report={page}")
    assert not document["best"] and page.read_text().count("<svg") == 1


def test_an_export_is_found_from_any_folder(capsys, tmp_path, monkeypatch):
    """A run file beside the user's own work, exported there, built from elsewhere."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/own.gin").write_text('include "gin_configs/run/tiny.gin"\nNUM_LAYERS = 4\nBATCH_TOKENS = 2048\n')
    monkeypatch.chdir(tmp_path / "mine")
    words = ("--gin_file=own.gin", "--chip=h100", "--num_chips=8", "--export=planned.gin")
    document_of(capsys, "search", *words)
    monkeypatch.chdir(tmp_path)
    assert build_run(["mine/planned.gin"])[0].model.num_layers == 4
