"""Examples in the documents are run as they stand."""

import dataclasses
import json
import pathlib
import re
import shlex
import subprocess

import pytest

import gpt4moe
from gpt4moe import flags
from gpt4moe.analysis.scaling import REFIT_S_BASE, Routed
from gpt4moe.configure import build_model, build_run, build_sweep
from gpt4moe.data.prepare import prepare
from gpt4moe.launch import main
from gpt4moe.sweep.cells import make_cells
from gpt4moe.train import trainable
from tests.data.image_documents import picture

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_plugging_in_example_trains_and_loads(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/plugging_in.md").read_text()
    module, gin_file = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mine.py").write_text(module)
    (tmp_path / "mine.gin").write_text(gin_file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    small = ["TRAIN_STEPS=2", "BATCH_TOKENS=256", "SEQUENCE_LENGTH=64", "VOCAB_SIZE=300", "NUM_LAYERS=1"]
    words = ["--gin_file=mine.gin", *(f"--gin.{override}" for override in small)]
    assert main(["train", *words, "--workdir=run", "--json"]) == 0
    capsys.readouterr()
    run, _ = build_run(["run/config.gin"])
    assert run.model.moe.router.__name__ == "cold_router"
    assert run.optimizer.build.__name__ == "lion"
    assert run.data.sources[0].documents.__name__ == "haikus"
    assert gpt4moe.load("run").step == 2


def test_the_commands_about_experts_build():
    """Each as it stands, but for the data: the macros exist, and what a comment says of the model is so."""
    text = (ROOT / "docs/experts.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("gpt4moe ")]
    assert len(commands) >= 8
    for command in commands:
        words, (said,) = shlex.split(command.partition("#")[0]), re.findall(r"# (.+)", command)
        arguments = flags.parse(words[1:])
        moe = build_model(arguments.gin_file, arguments.overrides).moe
        assert said == f"E {moe.num_experts}, K {moe.experts_per_token}, F {moe.hidden_dim}"


def test_the_commands_about_routers_build():
    """Each as it stands: every override is one that a part of the run reads."""
    text = (ROOT / "docs/routers.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("gpt4moe ")]
    assert len(commands) >= 5
    for command in commands:
        arguments = flags.parse(shlex.split(command)[1:])
        run, _ = build_run(arguments.gin_file, arguments.overrides)
        plain, _ = build_run(arguments.gin_file)
        assert (run.model, run.train) != (plain.model, plain.train)


def test_the_commands_about_freezing_build():
    """Each as it stands: its patterns are of parameters that the model has."""
    text = (ROOT / "docs/freezing.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("gpt4moe train")]
    assert len(commands) >= 4
    for command in commands:
        arguments = flags.parse(shlex.split(command)[1:])
        run, _ = build_run(arguments.gin_file, arguments.overrides)
        assert run.optimizer.frozen or run.optimizer.rate_scales
        trainable.table(run.model, run.optimizer)


# Documents and images that each example of docs/vision.md has.
OWN_PICTURES = {"text": (2, 2), "json": (6, 6), "bash": (2, 2), "python": (2, 2)}


@pytest.mark.parametrize("block", OWN_PICTURES)
def test_the_pictures_of_the_docs_are_read(block, tmp_path, monkeypatch):
    """Every way of keeping them, as it stands: prepared with the commands of the page, from byte tokens."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures/clip").mkdir(parents=True)
    for name, red, kind in (("a.png", 10, "PNG"), ("b.JPG", 20, "JPEG"), ("clip/0.png", 30, "PNG")):
        (tmp_path / "pictures" / name).write_bytes(picture(red, kind=kind))
    text = (ROOT / "docs/vision.md").read_text().partition("## Your own pictures")[2].partition("\n## ")[0]
    commands, *examples = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    example, beside = dict(examples)[block], dict(examples)["text"]
    if block in ("text", "bash"):
        for line in beside.splitlines():
            name, _, content = line.partition("  ")
            if content:
                (tmp_path / name).write_text(content.strip())
    path = "pictures/"
    if block == "json":
        (tmp_path / "pictures/captions.jsonl").write_text(example)
    elif block == "text":
        (tmp_path / "pictures/clip/0.png").unlink()
    elif block == "bash":
        subprocess.run(shlex.split(example), check=True)
        path = "pictures/000.tar"
    else:
        exec(example, {})
        path = "pictures/*.parquet"
    (command,) = [line for line in commands[1].splitlines() if line.startswith("gpt4moe prepare")]
    arguments = flags.parse(shlex.split(command)[1:])
    changes = [f"IMAGE_PATHS = {[path]}", "INIT_FROM = None", "IMAGE_FRAMES = 2"]
    changes += ["tokenizer.TokenizerConfig.byte_level_only = True"]
    run, _ = build_run(arguments.gin_file, [*arguments.overrides, *changes])
    report = prepare(dataclasses.replace(run.data, held_out_fraction=0.0), tmp_path / "store")
    (source,) = report.sources
    assert (source.documents, source.images, source.bad_records) == (*OWN_PICTURES[block], 0)


def test_every_command_about_vision_is_one_that_there_is():
    commands = [line for line in (ROOT / "docs/vision.md").read_text().splitlines() if line.startswith("gpt4moe ")]
    assert len(commands) >= 8
    for command in commands:
        arguments = flags.parse(shlex.split(command)[1:])
        if arguments.command in ("train", "prepare"):
            build_run(arguments.gin_file, arguments.overrides)


def test_the_sweeps_of_the_docs_have_the_cells_they_say(tmp_path):
    examples = re.findall(r"```python\n(from __gin__.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL)
    for count, example in zip((3 * 3 * 3, 2 * 2 * 2), examples, strict=True):
        given = tmp_path / "my_sweep.gin"
        given.write_text(example)
        config, build = build_sweep([str(given)])
        cells = make_cells(config, build)
        assert len(cells) == count and not any(cell.refused for cell in cells)


def test_the_axis_of_functions_in_the_docs_builds(tmp_path):
    (axes,) = re.findall(r"`(axes = .*@routers.*)`, in a file", (ROOT / "docs/sweeps.md").read_text())
    given = tmp_path / "routers.gin"
    lines = [
        "from __gin__ import dynamic_registration",
        "from gpt4moe.config import sweep",
        "from gpt4moe.model import routers",
    ]
    given.write_text("\n".join([*lines, 'include "gin_configs/run/tiny.gin"', f"sweep.SweepConfig.{axes}"]) + "\n")
    config, build = build_sweep([str(given)])
    named = [build(cell.overrides)[0].model.moe.router.__name__ for cell in make_cells(config, build)]
    assert named == ["noisy_top_k", "sigmoid_top_k"]


def test_the_fit_to_a_sweep_in_the_docs_runs(tmp_path, monkeypatch):
    """On the rows that the sweep at the top of the page has."""
    text = (ROOT / "docs/sweeps.md").read_text()
    example = re.findall(r"```python\n(from gpt4moe.analysis.scaling.*?)```", text, re.DOTALL)[0]
    law = Routed(a=0.0, b=-0.05, c=0.0, d=0.6, E_start=REFIT_S_BASE.law.E_start, E_max=REFIT_S_BASE.law.E_max)
    grid = [(experts, rate, seed) for experts in (2, 4, 8) for rate in (1e-3, 1e-2) for seed in range(3)]
    rows = [
        {"NUM_EXPERTS": experts, "LEARNING_RATE": rate, "seed": seed, "state": "done"}
        | {"held_out_loss": float(law.loss(1.0, experts)) + 0.5 * (rate > 1e-3)}
        for experts, rate, seed in grid
    ]
    (tmp_path / "runs/sweep").mkdir(parents=True)
    (tmp_path / "runs/sweep/results.json").write_text(json.dumps([*rows, rows[0] | {"state": "failed"}]))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "docs/sweeps.md", "exec"), names)
    assert len(names["runs"]) == 9 and abs(names["found"].law.b + 0.05) < 1e-6


def test_the_examples_of_the_laws_run_and_give_what_they_say(capsys):
    """`print` lines end in a comment with what they print."""
    text = (ROOT / "docs/laws.md").read_text()
    names, said = {}, []
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(example, "docs/laws.md", "exec"), names)
        said += re.findall(r"^print\(.*\)  # (.+)$", example, re.MULTILINE)
    assert len(said) > 8
    assert capsys.readouterr().out.splitlines() == said


def test_the_readme_shows_what_the_planner_prints(capsys):
    text = (ROOT / "README.md").read_text()
    shown = re.findall(r"```bash\n(gpt4moe plan [^`]*?)\n```\n\n```text\n(.*?)\n```", text, re.DOTALL)
    assert len(shown) == 4
    for command, lines in shown:
        assert main(shlex.split(command)[1:]) == 0
        printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert printed[: len(lines.splitlines())] == lines.splitlines(), command


def test_every_file_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?:gin_configs|docs|benchmarks|experiments|gpt4moe)/[\w/.]+\.(?:gin|md|py)", text))
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_continuous_integration_runs_the_second_command_of_the_readme():
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    second = re.findall(r"```bash\n(python3 -m venv.*?)\n```", readme, re.DOTALL)[1]
    assert second in script


def test_the_commands_about_planning_answer(tmp_path, monkeypatch, capsys):
    """Each as it stands, from a folder that has the gin files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gin_configs").symlink_to(ROOT / "gin_configs")
    text = (ROOT / "docs/plan.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("gpt4moe plan ")]
    assert len(commands) >= 12
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
        assert capsys.readouterr().out.strip()
    assert (tmp_path / "audit.html").exists()


def test_the_commands_about_foreign_weights_are_read():
    """Each as it stands; tests/interop/test_mixtral.py runs what they do."""
    text = (ROOT / "docs/foreign_weights.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("gpt4moe ")]
    assert len(commands) >= 9
    parsed = [flags.parse(shlex.split(command)[1:]) for command in commands]
    assert {"import", "export", "evaluate"} <= {each.command for each in parsed}
    (golden,) = [each.golden for each in parsed if each.command == "evaluate" and each.golden]
    assert (ROOT / golden).exists() and any(each.source == "tests/golden/mixtral/gqa" for each in parsed[-3:-1])
