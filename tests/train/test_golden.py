"""The losses of a tiny run, step by step, as they were when last looked at: any change of the numbers shows here.

    python -m tests.train.test_golden

writes `tests/golden/tiny_losses.json` anew. Do it only after a change that is meant to change the numbers, and say in
the commit why they moved.
"""

from __future__ import annotations

import json
import pathlib
import tempfile

import jax
import numpy as np

from gpt4moe.train import loop
from tests.train import tiny

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden" / "tiny_losses.json"
COMMAND = "python -m tests.train.test_golden"
STEPS = 10


def trained_losses(directory: pathlib.Path) -> list[float]:
    """The loss of each step of a run whose corpus and work directory are made in `directory`."""
    tiny.write_corpus(directory / "corpus")
    run = tiny.run_config(directory / "corpus", steps=STEPS)
    loop.train(run, directory / "run", config_text="", show_progress=False)
    lines = (directory / "run/metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_the_losses_are_those_on_record(tmp_path):
    recorded = json.loads(GOLDEN.read_text())["losses"]
    assert len(recorded) == STEPS
    np.testing.assert_allclose(trained_losses(tmp_path), recorded, rtol=1e-3, err_msg=f"if meant: {COMMAND}")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        document = {"written_by": COMMAND, "losses": trained_losses(pathlib.Path(folder))}
    GOLDEN.write_text(json.dumps(document, indent=1) + "\n")
