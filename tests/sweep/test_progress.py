"""The live table of a sweep, drawn of the files that its workers leave."""

import json

import pytest
from rich.console import Console

from gpt4moe.config.sweep import SweepConfig
from gpt4moe.configure import build_sweep
from gpt4moe.sweep.cells import make_cells
from gpt4moe.sweep.progress import Clock, drawn, states_of, table
from gpt4moe.sweep.worker import run_folder, write_json

AXES = {"NUM_EXPERTS": [2, 4], "ROUTER": ["@routers.noisy_top_k", "@routers.sigmoid_top_k"]}
SWEEP = """from __gin__ import dynamic_registration
from gpt4moe.config import sweep
from gpt4moe.model import routers
include "gin_configs/run/tiny.gin"
sweep.SweepConfig.axes = {"NUM_EXPERTS": [2, 4]}
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    file = tmp_path_factory.mktemp("gin") / "sweep.gin"
    file.write_text(SWEEP)
    return make_cells(SweepConfig(axes=AXES), build_sweep([str(file)])[1])


def leave(folder, cell, state, *, seconds=None, reason=None, logged=(), attempts=1):
    """What a worker leaves of a cell."""
    work = run_folder(folder, cell.id)
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "cell.json", {"state": state, "seconds": seconds, "reason": reason, "attempts": attempts})
    (work / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))


def printed(cells, folder, clock):
    console = Console(width=100)
    with console.capture() as captured:
        console.print(drawn(cells, folder, clock))
    return captured.get().splitlines()


def test_story_of_four_cells(cells, tmp_path):
    trained = {"step": 6, "tokens": 12_288, "loss": 3.25, "loss/code": 3.25}
    held_out = {"step": 6, "tokens": 12_288, "eval/code/loss": 3.4, "eval/code/tokens": 300, "eval/unseen/loss": 9.0}
    held_out |= {"loss/prose": 3.0, "eval/prose/loss": 3.8, "eval/prose/tokens": 100, "eval/unseen/tokens": 50}
    leave(tmp_path, cells[0], "done", seconds=30.0, logged=(trained, held_out))
    leave(tmp_path, cells[1], "failed", seconds=300.0, reason="out of memory: 17 GB")
    leave(tmp_path, cells[2], "running", seconds=0.0, logged=(trained,))
    clock = Clock(began=0.0, retries=0, ended={cells[0].id})
    states = states_of(cells, tmp_path)
    # one cell has ended since, in a minute; a running one counts half
    assert clock.said(states, 60.0) == "60 s so far, about 90 s left"
    assert Clock(0.0, 0, {cells[0].id, cells[1].id}).said(states, 60.0) == "60 s so far"
    assert Clock(0.0, 1, {cells[0].id}).said(states, 60.0) == "60 s so far", "what is tried again has not ended"
    # a cell that had ended and that another sweep tries again is not counted as one that has ended since
    assert Clock(0.0, 0, {cells[2].id}).said(states, 60.0) == "60 s so far, about 45 s left"
    lines = printed(cells, tmp_path, clock)
    assert lines[0].startswith("4 cells: 1 done, 1 waiting, 1 failed, 1 running; ")
    rows = [line.split() for line in lines[1:] if line[:1].isdigit()]
    assert rows[0][:5] == ["4", "noisy_top_k", "running", "12,288", "3.250"]
    assert rows[1][:3] == ["2", "sigmoid_top_k", "out"] and rows[1][-2:] == ["5", "min"]
    assert rows[2][:3] == ["4", "sigmoid_top_k", "waiting"]
    # a source that is not trained on, with its loss of 9, is no part of the held-out loss; three times as much is code
    assert rows[3] == ["2", "noisy_top_k", "done", "12,288", "3.250", "3.500", "30", "s"]


def test_without_a_terminal_each_cell_is_a_line_once_it_has_ended(cells, tmp_path, capsys):
    row = {"tokens": 64, "loss/code": 3.0, "eval/code/loss": 3.5, "eval/code/tokens": 9}
    with table(cells, tmp_path, retries=1, enabled=True) as refresh:
        refresh()
        leave(tmp_path, cells[0], "done", seconds=30.0)
        leave(tmp_path, cells[1], "failed", reason="killed")  # and tried again
        refresh()
        leave(tmp_path, cells[3], "failed", seconds=3.0, reason="loss of the last 10 steps was not finite", attempts=2)
        refresh()
        leave(tmp_path, cells[1], "done", reason="the data ended after 64 tokens", logged=(row,), attempts=2)
        refresh()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert "NUM_EXPERTS=2, ROUTER=sigmoid_top_k, seed=0: done (the data ended after 64 tokens), held" in said[2]
    assert "held-out loss 3.5000; " in said[2]
    assert said[0].startswith("1 of 4: NUM_EXPERTS=2, ROUTER=noisy_top_k, seed=0: done; ")
    assert "2 of 4: NUM_EXPERTS=4, ROUTER=sigmoid_top_k, seed=0: failed (loss of the last 10 steps" in said[1]
