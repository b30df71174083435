"""The gin edge: what people type, what they mistype, and what the command answers."""

import json
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.configure import build_model, build_run
from gpt4moe.launch import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUN_FILES = sorted(path for path in (ROOT / "gin_configs/run").glob("*.gin") if path.stem != "whole")
MODEL_FILES = sorted((ROOT / "gin_configs/model").glob("*.gin"))
REQUIRED_MACROS = """TRAIN_STEPS TOKEN_BUDGET BATCH_TOKENS SEQUENCE_LENGTH CHECKPOINT_EVERY LEARNING_RATE SEED
    NUM_LAYERS NUM_EXPERTS EXPERTS_PER_TOKEN MESH"""
TINY = "gin_configs/run/tiny.gin"


def overrides_for(path: pathlib.Path) -> list[str]:
    """Run files over the user's own files need to be told where they are."""
    text = path.read_text()
    paths = {"DATA_PATHS": "data/files.gin", "IMAGE_PATHS": "data/pictures.gin"}
    return [f'{macro} = ["somewhere"]' for macro, file in paths.items() if file in text]


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_every_run_file_builds_and_has_the_macros_people_rely_on(path):
    _, text = build_run([str(path)], overrides_for(path))
    for macro in REQUIRED_MACROS.split():
        assert f"\n{macro} = " in text, f"{path.stem} has no {macro}"


@pytest.mark.parametrize("path", RUN_FILES + MODEL_FILES, ids=lambda path: path.stem)
def test_every_gin_file_opens_with_what_it_is_for(path):
    assert path.read_text().startswith("# ")
    assert build_model([str(path)], overrides_for(path)).num_layers >= 1


def test_an_override_changes_what_it_names():
    run, text = build_run([TINY], ["TRAIN_STEPS = 3", "moe.MoeConfig.capacity_factor = 1.5"])
    assert run.train.steps == 3
    assert run.model.moe.capacity_factor == pytest.approx(1.5)
    assert "TRAIN_STEPS = 3" in text


def test_the_saved_configuration_builds_the_same_run(tmp_path):
    run, text = build_run([TINY], ["NUM_EXPERTS = 2"])
    saved = tmp_path / "config.gin"
    saved.write_text(text)
    again, text_again = build_run([str(saved)])
    assert again == run
    assert text_again == text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("NUM_EXPRTS=8", "NUM_EXPRTS is set but read by nothing in this configuration; did you mean NUM_EXPERTS"),
        ("moe.MoeConfig.capacty_factor=2", "did you mean moe.MoeConfig.capacity_factor"),
        ("other/moe.MoeConfig.capacity_factor=2", "is set but read by nothing"),
        ("nothing.here=2", "No configurable matching 'nothing'"),
        ("SEED=zero", "SEED=zero is not a Python literal; quote strings"),
        ("SEED", "must have the form --gin.NAME=VALUE"),
        ("EXPERTS_PER_TOKEN=9", "experts_per_token=9 must be at most num_experts (4)"),
        ("BATCH_TOKENS=100", "batch_tokens=100 must be a multiple of sequence_length"),
        ("ROUTER=@routers.sigmod_top_k", "names no function; did you mean @routers.sigmoid_top_k"),
        ("ROUTER=@routers.zzz", "names no function; there are balanced, "),
        ("ROUTER=sigmoid_top_k", "a function is named so: --gin.ROUTER=@routers.sigmoid_top_k"),
        ("ROUTER=@sigmoid_top_k", "did you mean @routers.sigmoid_top_k?"),
        ("ROUTER=@mine.cold", "names no module that a gin file imports, see docs/plugging_in.md"),
        ("ROUTER='sigmoid_top_k'", "must be a function or None; set --gin.ROUTER=@routers.sigmoid_top_k"),
        ("moe.MoeConfig.drop_priority='gate'", "is read where capacity is short; this layer drops none"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(override, message, capsys, tmp_path):
    with pytest.raises(CallerError) as caught:
        build_run([TINY], [override])
    assert message in str(caught.value)
    workdir = tmp_path / "run"
    assert main(["train", f"--gin_file={TINY}", f"--gin.{override}", f"--workdir={workdir}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["moe.MoeConfig.grouped_product='triton'"], "runs on cuda or rocm only; leave it out"),
        (["ROUTER=@routers.group_limited"], "num_groups=1 leaves the router group_limited no groups to limit; set it"),
        (["INIT_FROM='nowhere'"], "init_from='nowhere' has no complete checkpoint; name the work directory of a run"),
        (["moe.MoeConfig.router_noise=2"], "router_noise=2 is not read by the router top_k; leave it at 1.0 or"),
        (
            ["ROUTER=@routers.softmax_of_chosen", "EXPERTS_PER_TOKEN=1"],
            "for the Switch router leave ROUTER out and set",
        ),
    ],
)
def test_what_the_model_cannot_be_is_refused_before_anything_is_written(overrides, message, capsys, tmp_path):
    flags = [f"--gin.{override}" for override in overrides]
    assert main(["train", f"--gin_file={TINY}", *flags, f"--workdir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt="], "--prompt='' is empty"),
        (["--text=empty.txt"], "--text='empty.txt' is empty; give some text"),
        (["--text=latin.txt"], "--text='latin.txt' is not UTF-8; convert it"),
        (["--text=nowhere.txt"], "--text='nowhere.txt' is not a file; name a text file, or -"),
        (["--text=."], "--text='.' is not a file"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("\u00e9".encode("latin-1"))
    (tmp_path / "metrics.jsonl").touch()
    assert main(["report", f"--workdir={tmp_path}", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_macro_misspelt_in_a_file_is_refused_too(tmp_path):
    path = tmp_path / "mine.gin"
    path.write_text(f'include "{ROOT}/{TINY}"\nNUM_EXPRTS = 8\n')
    with pytest.raises(CallerError, match=r"NUM_EXPRTS is set but read by nothing.*NUM_EXPERTS"):
        build_run([str(path)])


def test_a_missing_file_and_an_unknown_command_are_one_line(capsys):
    assert main(["inspect", "--gin_file=nowhere.gin"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for words in (["inspct"], ["inspect", "--gin_fil=x"], []):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_inspect_prints_one_json_document_and_nothing_else(capsys):
    assert main(["inspect", "--gin_file=gin_configs/model/gpt4_1p8t.gin", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert round(document["parameters"]["experts"] / 16 / 1e9, 2) == 110.98
    assert round(document["total"] / 1e9, 1) == 1832.6
    assert captured.err == ""


def test_inspect_counts_the_frames_of_a_clip(capsys):
    words = ["inspect", "--gin_file=gin_configs/run/vision_from_start.gin", "--json"]
    changes = ([], ["--gin.IMAGE_FRAMES=4"], ["--gin.vision.EncoderConfig.max_frames=4"])
    found = []
    for change in changes:
        assert main([*words, *change]) == 0
        found.append(json.loads(capsys.readouterr().out))
    for name in ("features_per_image", "input_bytes_per_image", "forward_flops_per_image", "cache_bytes_per_image"):
        assert [document[name] / found[0][name] for document in found] == [1, 4, 1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("IMAGES_PER_ROW=0", "ImageConfig.per_row=0 must be an integer of at least 1"),
        ("VISION_WEIGHT=-1", "weight=-1 must be a number of at least 0"),
        ("IMAGE_WORKERS=-1", "ImageConfig.workers=-1 must be an integer of at least 0"),
    ],
)
def test_inspect_refuses_what_the_data_cannot_be(override, message, capsys):
    assert main(["inspect", "--gin_file=gin_configs/run/vision_from_start.gin", f"--gin.{override}"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_inspect_needs_no_paths_but_checks_those_given(capsys):
    words = ["inspect", "--gin_file=gin_configs/run/files.gin"]
    assert main(words) == 0
    assert main([*words, "--gin.DATA_PATHS=[3]"]) == 2
    assert "paths=[3] must be text" in capsys.readouterr().err
    assert main([*words, "--gin.DATA_EPOCHS=-1"]) == 2


def test_a_macro_near_to_none_is_answered_with_a_few_others():
    for name in ("QQQQ", "zzz"):
        with pytest.raises(CallerError) as caught:
            build_run([TINY], [f"{name} = 3"])
        listed, _, more = str(caught.value).partition("known macros: ")[2].rpartition(" and ")
        names = listed.split(", ")
        assert len(names) == 8 and name not in names
        macros = re.findall(r"^(\w+) = ", build_run([TINY])[1], re.MULTILINE)
        assert more.endswith(" others") and int(more.split()[0]) >= len(macros) - 8


def test_includes_resolve_from_a_foreign_directory(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/run.gin").write_text('include "gin_configs/model/tiny.gin"\nNUM_LAYERS = 3\n')
    words = [sys.executable, "-m", "gpt4moe.launch", "inspect", "--gin_file=mine/run.gin", "--json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["parameters"]["norms"] == 7 * 32


def test_help_answers_without_importing_jax():
    code = "import sys; from gpt4moe.launch import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    check = "assert not {'jax', 'flax', 'numpy', 'gin'} & set(sys.modules), 'heavy import'"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--workdir" in done.stdout


def test_a_router_and_an_optimizer_of_the_users_own_are_named_in_gin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_of_all.py").write_text(
        textwrap.dedent("""
        import optax
        from gpt4moe.model.router import top_k

        def my_router(logits_UE, inputs, config):
            return top_k(logits_UE / 2.0, inputs, config)

        def my_optimizer(learning_rate, config):
            return optax.sgd(learning_rate)
        """)
    )
    (tmp_path / "mine.gin").write_text(
        textwrap.dedent(f"""
        from __gin__ import dynamic_registration
        from gpt4moe.config import moe
        from gpt4moe.config import optimizer
        import mine_of_all
        include "{ROOT}/{TINY}"
        moe.MoeConfig.router = @mine_of_all.my_router
        optimizer.OptimizerConfig.build = @mine_of_all.my_optimizer
        """)
    )
    run, text = build_run(["mine.gin"])
    assert run.model.moe.router.__name__ == "my_router"
    assert run.optimizer.build.__name__ == "my_optimizer"
    (tmp_path / "config.gin").write_text(text)
    assert build_run(["config.gin"])[0].model.moe.router.__name__ == "my_router"
