"""The studies: each can be built, here and scaled up, and says what it asks, takes and found."""

import dataclasses
import pathlib

import pytest

from gpt4moe.configure import build_sweep
from gpt4moe.sweep.cells import make_cells

ROOT = pathlib.Path(__file__).resolve().parent.parent
STUDIES = sorted(path.parent for path in (ROOT / "experiments").glob("*/sweep.gin"))
SECTIONS = ("Question", "Command", "Hardware and minutes", "Expected", "Result", "Verdict")
TEXT = {"CODE_PATHS": "['gpt4moe']", "TEXT_PATHS": "['docs']"}


def ends(config):
    """The sweep with the first and the last value of each axis, and one seed."""
    axes = [(names, list(dict.fromkeys((values[0], values[-1])))) for names, values in config.axes]
    return dataclasses.replace(config, axes=axes, seeds=config.seeds[:1])


def scaled_of(study):
    return study / "scaled.gin" if (study / "scaled.gin").exists() else study.parent / "scaled.gin"


@pytest.mark.parametrize("scaled", [False, True], ids=["here", "scaled"])
@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_a_study_builds(study, scaled):
    names = ["CODE_PATHS", "TEXT_PATHS"] if study.name == "epochs" else ["CODE_PATHS"]
    overrides = [f"{name}={TEXT[name]}" for name in names] if scaled else []
    files = [study / "sweep.gin", *([scaled_of(study)] if scaled else [])]
    config, build = build_sweep([str(file.relative_to(ROOT)) for file in files], overrides)
    cells = make_cells(ends(config), build)
    assert len(cells) >= 2 and not any(cell.refused for cell in cells)
    runs = [build(cell.overrides)[0] for cell in cells]
    assert all(run.data.sequence_length == (1024 if scaled else 128) for run in runs)
    assert all(abs(off) < 0.05 for cell in cells for off in cell.deviations.values())


def test_a_study_builds_from_any_folder(tmp_path, monkeypatch):
    """What a study includes lies beside it, in a folder without `__init__.py`."""
    monkeypatch.chdir(tmp_path)
    config, build = build_sweep([str(STUDIES[0] / "sweep.gin")])
    assert not make_cells(ends(config), build)[0].refused


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_a_study_says_what_it_asks_and_found(study):
    text = (study / "README.md").read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(SECTIONS)
    assert f"gpt4moe sweep --gin_file=experiments/{study.name}/sweep.gin" in text
    assert f"runs/{study.name}" in text
    result = text[text.index("## Result") : text.index("## Verdict")]
    has_data = (study / "results.json").exists()
    assert has_data or "Not run yet" in result, "a result is committed with its data"
