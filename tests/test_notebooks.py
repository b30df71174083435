"""Notebooks run from their first cell to their last on small sizes, and are kept as they are before anyone ran them."""

import json
import pathlib
import runpy

import nbclient
import nbformat
import pytest

from gpt4moe.configure import build_run

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Seconds for one cell, on a machine that runs the other tests beside it.
CELL_SECONDS = 400
TINY = "gin_configs/run/tiny.gin"
PATHS = [str(ROOT / "gpt4moe/config"), str(ROOT / "gpt4moe/accounting")]


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(name, folder, monkeypatch, parameters, asked):
    """Returns the values of the expressions `asked` at the end of the notebook, and the notebook as it then is.

    `parameters` stand in the place of those with the same names in the cell tagged so. The kernel works in `folder`,
    and imports the code that this test belongs to.
    """
    notebook = read(name)
    (cell,) = [cell for cell in code(notebook) if "parameters" in cell.metadata.get("tags", ())]
    settings = {}
    exec(cell.source, settings)
    assert not parameters.keys() - settings.keys(), "a setting that the notebook does not have"
    cell.source = "\n".join([cell.source, *(f"{parameter} = {value!r}" for parameter, value in parameters.items())])
    document = ", ".join(f"{key!r}: {expression}" for key, expression in asked.items())
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({{{document}}}))"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    client = nbclient.NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return json.loads(notebook.cells[-1].outputs[0].text), notebook


def shown(notebook, cell_id):
    """All that a cell left below it, as one text."""
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    said = [output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"]
    kinds = ("text/html", "image/png")
    return "".join(
        [*said, *(output.data[kind] for output in cell.outputs for kind in kinds if kind in output.get("data", {}))]
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_what_a_machine_put_out(path):
    for cell in code(read(path.stem)):
        assert cell.outputs == [] and cell.execution_count is None, f"clear all outputs of {path.name}"
        assert set(cell.metadata) <= {"tags"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_cell_installs_from_the_repository_where_nothing_is_installed(path, monkeypatch):
    called = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda command, check: called.append(command))
    monkeypatch.chdir(path.parent)
    first = code(read(path.stem))[0].source
    exec(first, {})
    exec(first.replace('REPOSITORY = ".."', 'REPOSITORY = "https://example.org/gpt4moe"'), {})
    assert [command[-1] for command in called] == [
        f"gpt4moe @ {ROOT.as_uri()}",
        "gpt4moe @ git+https://example.org/gpt4moe",
    ]


def test_gin_files_are_installed_with_the_package(monkeypatch):
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **settings: given.update(settings))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    folder = ROOT / "gin_configs"
    packed = {path for pattern in given["package_data"]["gin_configs"] for path in folder.glob(pattern)}
    assert packed == set(folder.rglob("*.gin")) and "gin_configs" in given["packages"]


def test_quickstart_trains_shows_experts_and_answers_its_questions(tmp_path, monkeypatch):
    parameters = {
        "GIN_FILE": TINY,
        "WORKDIR": "runs/tiny",
        "STEPS": 12,
        "NUM_EXPERTS": 4,
        "NEW_TOKENS": 8,
        "OVERRIDES": [f"DATA_PATHS={PATHS}", "NUM_LAYERS=1"],
        "ASK": True,
    }
    asked = {
        "losses": "[row['loss'] for row in history.rows if 'loss' in row]",
        "answers": "answers",
        "said": "said.text",
    }
    found, notebook = run("quickstart", tmp_path, monkeypatch, parameters, asked)
    assert len(found["losses"]) == 12 and found["losses"][-1] < found["losses"][0] - 0.3
    assert set(found["answers"]) == {"as above", "sigmoid-router", "twice-the-experts"}
    assert len(set(found["answers"].values())) == 3
    assert "<svg" in shown(notebook, "curves") and shown(notebook, "experts").count("<svg") == 3
    assert "srcdoc=" in shown(notebook, "colours") and found["said"]
    assert (tmp_path / "runs/tiny/metrics.jsonl").exists()


def test_sweep_runs_every_cell_and_fits_a_law_that_warns(tmp_path, monkeypatch):
    parameters = {
        "GIN_FILE": TINY,
        "WORKDIR": "runs/sweep",
        "EXPERTS": [1, 2, 4],
        "SEEDS": 2,
        "STEPS": 6,
        "SMALLER": {"BATCH_TOKENS": 128, "DATA_PATHS": PATHS, "NUM_LAYERS": 1},
    }
    asked = {
        "rows": "rows",
        "constants": "list(found.intervals)",
        "warning": "said.warning",
        "losses": "observed.loss.tolist()",
    }
    found, notebook = run("sweep", tmp_path, monkeypatch, parameters, asked)
    cells = [(row["NUM_EXPERTS"], row["seed"], row["state"]) for row in found["rows"]]
    assert cells == [(experts, seed, "done") for experts in (1, 2, 4) for seed in (0, 1)]
    assert found["constants"] == ["b", "d"] and "num_experts 4 .. 16 (fitted on 1 .. 4)" in found["warning"]
    assert len(set(found["losses"])) == 6
    assert "± 0." in shown(notebook, "results") and len(shown(notebook, "predict")) > 5000
    assert "srcdoc=" in shown(notebook, "report")
    assert (tmp_path / "runs/sweep/results.parquet").exists()


EYES = """from __gin__ import dynamic_registration
from gpt4moe.config import data
from gpt4moe.data import rendered
include "gin_configs/run/tiny.gin"
include "gin_configs/variant/vision.gin"
NUM_LAYERS = 1
ENCODER_LAYERS = 1
FROZEN = ["*", "!cross_attention.*", "!vision_encoder.*"]
GATE_INIT = 1.0
data.SourceConfig.paths = ()
data.DataConfig.sources = [@digits/data.SourceConfig()]
digits/data.SourceConfig.name = "digits"
digits/data.SourceConfig.documents = @rendered.digits
rendered.digits.count = 400
"""


def test_vision_takes_the_steps_of_its_gin_file():
    settings = {}
    (cell,) = [cell for cell in code(read("vision")) if "parameters" in cell.metadata.get("tags", ())]
    exec(cell.source, settings)
    assert build_run([str(ROOT / settings["GIN_FILE"])])[0].train.steps == settings["STEPS"]


def test_vision_trains_an_adapter_and_shows_where_it_looks(tmp_path, monkeypatch):
    (tmp_path / "eyes.gin").write_text(EYES)
    parameters = {
        "TEXT_GIN_FILE": TINY,
        "TEXT_WORKDIR": "runs/text",
        "TEXT_OVERRIDES": [f"DATA_PATHS={PATHS}", "TRAIN_STEPS=4", "NUM_LAYERS=1"],
        "GIN_FILE": str(tmp_path / "eyes.gin"),
        "WORKDIR": "runs/eyes",
        "STEPS": 6,
        "EXAMPLES": 2,
    }
    asked = {
        "texts": "[reading.text for reading in readings]",
        "mapped": "[float(reading.maps.sum(axis=(1, 2, 3)).mean()) for reading in readings if len(reading.tokens)]",
        "held_out": "list(result.evaluation.sets)",
        "said": "said.text",
    }
    found, notebook = run("vision", tmp_path, monkeypatch, parameters, asked)
    assert len(found["texts"]) == 2 and all(text.isdigit() for text in found["texts"])
    assert found["held_out"] == ["digits"] and all(abs(total - 1) < 1e-4 for total in found["mapped"])
    assert len(shown(notebook, "data")) > 5000 and len(shown(notebook, "maps")) > 5000
    assert "without images" in shown(notebook, "result") and "<svg" in shown(notebook, "result")


def test_plan_audits_the_reference_and_prices_its_experts(tmp_path, monkeypatch):
    asked = {
        "moved": "[row.id for row in moved]",
        "verdicts": "[row.verdict for row in rows]",
        "drawn": "{str(factor): mean for factor, (mean, _) in found.items()}",
        "cheapest": "list(cheapest.values())",
    }
    found, notebook = run("plan", tmp_path, monkeypatch, {"RUNS": 2}, asked)
    assert found["moved"] == [36, 43, 68] and found["verdicts"].count("UNIT-ERROR") == 4
    assert max(found["drawn"], key=found["drawn"].get) == "1"
    assert found["cheapest"] == sorted(found["cheapest"], reverse=True) and 16 in found["cheapest"]
    assert "bubble" in shown(notebook, "explain")
    assert all(len(shown(notebook, cell)) > 5000 for cell in ("explain", "experts", "assumptions"))


def test_serving_batches_speculates_quantises_and_answers(tmp_path, monkeypatch):
    parameters = {"STEPS": 8, "NUM_EXPERTS": 4, "REQUESTS": 12, "LONGEST": 24}
    asked = {
        "gain": "gain",
        "routed": "experts_TLK.tolist()",
        "speculated": "[tokens, list(alone.token_ids), list(made.token_ids), float(np.mean(gained)), said]",
        "difference": "losses['files'].difference",
        "usage": "[answer['usage'] for answer in answers]",
    }
    found, notebook = run("serving", tmp_path, monkeypatch, parameters, asked)
    assert 1.2 < found["gain"] < 4  # of the slots
    assert {len(set(of_layer)) for of_token in found["routed"] for of_layer in of_token} == {2}
    speculated, alone, imported, measured, formula = found["speculated"]
    assert len(alone) == 100 and speculated == alone == imported and measured > 1 and abs(measured - formula) < 0.5
    assert 0 < abs(found["difference"]) < 0.05
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in found["usage"]] == [0, 64]
    assert all(len(shown(notebook, cell)) > 5000 for cell in ("engine", "experts", "speculation"))
    assert "background: rgb" in shown(notebook, "stream") and "experts of the last token" in shown(notebook, "openai")
    assert (tmp_path / "runs/serving-mixtral/config.json").exists()
