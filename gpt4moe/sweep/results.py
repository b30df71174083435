"""The results of a sweep: one row a cell, failed ones with their reason, as `results.parquet` and `results.json`.

duckdb -c "select NUM_EXPERTS, avg(held_out_loss) from 'runs/sweep/results.parquet' group by all order by 1"
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpt4moe.accounting import flops, memory, parameters
from gpt4moe.config.run import RunConfig
from gpt4moe.sweep.cells import Build, Cell
from gpt4moe.sweep.worker import run_folder, state_of, write_json
from gpt4moe.train import trainable

# An expert with less than this share of the mean load is dead.
DEAD_BELOW = 0.01
# The training loss of a run is the mean over this last part of its steps.
LAST_PART = 0.1
# A step is a spike whose loss lies so many deviations above the mean of so many steps before it.
SPIKE_DEVIATIONS, SPIKE_WINDOW = 6.0, 128
# What is known of a run that has failed.
PROGRESS = ("steps", "tokens", "train_seconds", "skipped_steps", "loss_spikes")


def write(folder: pathlib.Path, cells: Sequence[Cell], build: Build) -> list[dict[str, Any]]:
    """Writes the results of all cells and returns them, in the cells' order."""
    rows = [row_of(folder, cell, build) for cell in cells]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [_plain(row.get(name)) for row in rows] for name in names}
    pq.write_table(pa.table({name: _column(values) for name, values in columns.items()}), folder / "results.parquet")
    write_json(folder / "results.json", [{name: _plain(value) for name, value in row.items()} for row in rows])
    return rows


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of `results.json`."""
    return json.loads((pathlib.Path(folder) / "results.json").read_text())


def format_rows(rows: Sequence[dict[str, Any]], folder: pathlib.Path) -> str:
    """A table to read: swept values, state, held-out loss, sizes and speed; reasons of failures below it."""
    wanted = ("held_out_loss", "loss", "total_parameters", "tokens_per_second")
    measured = [name for name in wanted if any(name in row for row in rows)]
    swept = list(rows[0])[: list(rows[0]).index("id")]
    titles = [*(name.rsplit(".", 1)[-1] for name in swept), "state", *measured]
    lines = [[_shown(row.get(name)) for name in (*swept, "state", *measured)] for row in rows]
    widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (titles, *lines)
    ]
    failed = [f"{_named(row, swept)} ({row['id']}): {row['reason']}" for row in rows if row.get("reason")]
    return "\n".join([*table, *failed, f"results: {folder / 'results.parquet'}"])


def row_of(folder: pathlib.Path, cell: Cell, build: Build) -> dict[str, Any]:
    """One row: the cell, its state, what the configuration counts, and what its run measured.

    Of a run that is not done, only how far it got and how: its losses would enter means as if they were final.
    """
    work = run_folder(folder, cell.id)
    state = state_of(work)
    row = {**cell.point, **cell.derived, "seed": cell.seed, "id": cell.id}
    row |= {name: state.get(name) for name in ("state", "reason", "attempts", "seconds")}
    if cell.refused is not None:
        return row
    run, _ = build(cell.overrides)
    measured = _measured(work, [source.name for source in run.data.sources if source.is_trained])
    if row["state"] != "done":
        measured = {name: measured[name] for name in PROGRESS if name in measured}
    return row | _counted(run) | measured


def _counted(run: RunConfig) -> dict[str, Any]:
    """Sizes and FLOPs: parameters, of a token forward, and bytes of the training state."""
    model = run.model
    counted = parameters.count(model)
    trained = trainable.count(model, run.optimizer) if run.optimizer.frozen else None
    return {
        "total_parameters": counted.total,
        "non_embedding_parameters": counted.total - counted.embedding - counted.head,
        "active_parameters": parameters.count_active(model),
        "forward_flops_per_token": flops.forward_flops_per_token(model),
        "train_flops_per_token": flops.train_flops_per_token(model),
        "train_state_bytes": memory.train_state_bytes(model, trained),
        "sparsity": 1 - model.moe.experts_per_token / model.moe.num_experts,
    }


def _measured(work: pathlib.Path, trained: Sequence[str]) -> dict[str, Any]:
    """Final losses, speed, stability and balance from `metrics.jsonl`."""
    rows = _logged(work / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    if not steps:
        return {}
    last_part = steps[-max(round(len(steps) * LAST_PART), 1) :]
    final = [row["loss"] for row in last_part if row["loss"] is not None]
    apart = np.diff([0, *(row["step"] for row in steps)])  # `log_every` steps
    measured = {
        "steps": max(row["step"] for row in rows),
        "tokens": max(row["tokens"] for row in rows),
        "loss": float(np.mean(final)) if final else None,
        "train_seconds": float(apart @ [row["step_seconds"] for row in steps]),
        "tokens_per_second": float(np.median([row["tokens_per_second"] for row in steps])),
        "model_flops_utilization": float(np.median([row["model_flops_utilization"] for row in steps])),
        "skipped_steps": steps[-1]["skipped_steps"],
        "loss_spikes": count_spikes([row["loss"] for row in steps]),
    }
    return measured | _balance(last_part) | _held_out(rows, trained)


def _logged(path: pathlib.Path) -> list[dict]:
    """The rows of a log, without a last line that a killed process left half written; none where there is no log."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise
    return rows


def count_spikes(losses: Sequence[float | None]) -> int:
    """How often the loss jumps: steps far above the steps before them, neighbours counted once; None is passed over.

    OLMo-core skips steps by the same measure, 6 deviations over 128 steps. The first half window tells nothing.
    """
    values = np.array([loss for loss in losses if loss is not None], np.float64)
    found, jumping = 0, False
    for at in range(SPIKE_WINDOW // 2, len(values)):
        before = values[max(at - SPIKE_WINDOW, 0) : at]
        jumps = bool(values[at] > before.mean() + SPIKE_DEVIATIONS * before.std())
        found, jumping = found + (jumps and not jumping), jumps
    return found


def _balance(steps: Sequence[dict]) -> dict[str, Any]:
    """Of the last part of the steps, means over layers, and of each layer how much its busiest expert has."""
    load_SLE = np.array([row["moe/load"] for row in steps], np.float64)
    load_LE = load_SLE.mean(axis=0)
    busiest_L = load_LE.max(-1) * load_LE.shape[-1]
    return {
        "load_max_over_mean": float(np.mean(busiest_L)),
        "load_max_over_mean_by_layer": busiest_L.tolist(),
        "dead_experts": float(np.mean(load_LE * load_LE.shape[-1] < DEAD_BELOW)),
        "dropped_fraction": _mean(steps, "moe/dropped_fraction"),
        "router_entropy": _mean(steps, "moe/router_entropy"),
        "router_largest_logit": _mean(steps, "moe/router_largest_logit"),
    }


def _mean(steps: Sequence[dict], key: str) -> float | None:
    """Over steps and layers; None where it was not logged or is not finite."""
    values = np.array([row.get(key) for row in steps], np.float64)
    return float(values.mean()) if np.isfinite(values).all() else None


def _held_out(rows: Sequence[dict], trained: Sequence[str]) -> dict[str, float | None]:
    """The newest evaluation: each source's loss and bits per byte, and the loss over all tokens of trained sources."""
    evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)]
    if not evaluations:
        return {}
    newest = evaluations[-1]
    found = {key: value for key, value in newest.items() if key.endswith(("/loss", "/bits_per_byte"))}
    sources = [source for source in trained if f"eval/{source}/loss" in newest]
    losses, tokens = ([newest[f"eval/{source}/{field}"] for source in sources] for field in ("loss", "tokens"))
    whole = bool(losses) and all(loss is not None for loss in losses)
    return found | {"held_out_loss": float(np.average(losses, weights=tokens)) if whole else None}


def _named(row: dict[str, Any], swept: Sequence[str]) -> str:
    return ", ".join(f"{name.rsplit('.', 1)[-1]}={_shown(row.get(name))}" for name in swept)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _column(values: list) -> pa.Array:
    """Arrow's own type where the values agree, else their text."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
