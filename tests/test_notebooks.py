"""The notebooks as they are handed out: without output, and run through on sizes that take seconds."""

import json
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {
    "quickstart": 'GIN_FILE = "gin_configs/run/tiny.gin"\nSETTINGS = ["DATA_PATHS=[\'{text}\']"]\nWORKDIR = "run"',
    "sweep": (
        "NUM_EXPERTS = [(1, 1), (2, 2), (4, 2)]\nSEEDS = 2\n"
        'SETTINGS = ["TRAIN_STEPS=8", "BATCH_TOKENS=256", "SEQUENCE_LENGTH=64", "VOCAB_SIZE=512", "CHECKPOINT_EVERY=8"]\n'
        'WORKDIR = "run"\nPARALLEL = 1'
    ),
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_output_and_begins_by_installing(path):
    code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert "pip" in code[0].source and "find_spec" in code[0].source
    assert [cell.metadata.get("tags") for cell in code].count(["parameters"]) == 1
    assert path.stem in SMALL, "every notebook is run below"


def run_through(name, folder, monkeypatch):
    """The cells of a notebook after it has run in `folder` on small sizes."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    parameters = next(cell for cell in book.cells if cell.metadata.get("tags") == ["parameters"])
    text = folder / "text"
    text.mkdir()
    (text / "mine.txt").write_text("To be, or not to be, that is the question.\n\n" * 400)
    parameters.source = SMALL[name].replace("{text}", str(text))
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return book.cells


def shown(cells, kind):
    """Everything of one kind that the cells put out."""
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    if kind == "text":
        return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def test_the_quickstart_trains_shows_and_writes(tmp_path, monkeypatch):
    cells = run_through("quickstart", tmp_path, monkeypatch)
    text, pages = shown(cells, "text"), shown(cells, "text/html")
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in logged if "loss" in row]
    assert losses[-1] < losses[0]
    assert "bits per byte" in text and "experts at step 8" in text and "import os" in text
    assert sum("<svg" in page for page in pages) == 6 and "iframe" in pages[-1] and "def mean" not in text


def test_the_sweep_fits_its_law_and_marks_what_lies_outside(tmp_path, monkeypatch):
    cells = run_through("sweep", tmp_path, monkeypatch)
    text = shown(cells, "text")
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())) == 6
    assert "each doubling of the experts changes the loss by" in text
    assert [line.endswith("OUTSIDE THE SWEEP") for line in text.splitlines() if line.startswith("E = ")] == [
        False
    ] * 3 + [True]
    assert shown(cells, "image/png") and "iframe" in shown(cells, "text/html")[-1]
