"""Writes folders as `gpt4moe sweep` leaves them, of runs whose losses are planted."""

import itertools
import json
import math

SOURCES = {"files": 6000, "unseen": 3000}
STEPS = 40


def write_sweep(folder, axes, plant, *, seeds=3, failed=None, steps=STEPS):
    """One run for every combination of `axes` and seed.

    `plant(point, seed)` gives the columns of a row that matter, `held_out_loss`, `tokens`, `active_parameters` and the
    like; `failed`: point to the reason it failed for. Names joined by commas take tuples, as in `SweepConfig.axes`.
    """
    rows = []
    for values in itertools.product(*axes.values()):
        point = {}
        for names, value in zip(axes, values, strict=True):
            point |= dict(zip(names.split(","), value, strict=True)) if "," in names else {names: value}
        for seed in range(seeds):
            name = f"run{len(rows):03d}"
            row = {**point, "seed": seed, "id": name, "state": "done", "reason": None}
            if failed and (reason := failed(point, seed)):
                row |= {"state": "failed", "reason": reason}
            else:
                row |= planted_row(point, plant(point, seed))
                write_run(folder / "runs" / name, row, steps)
            rows.append(row)
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(rows))
    manifest = {"axes": [names.split(",") for names in axes], "cells": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return rows


def planted_row(point, planted):
    """The columns of `gpt4moe.sweep.results` for a planted loss."""
    loss, size = planted["held_out_loss"], planted["active_parameters"]
    experts = point.get("NUM_EXPERTS", 4)
    row = {"total_parameters": size * (1 + 0.6 * (experts - 1)), "forward_flops_per_token": 2 * size}
    row |= {"train_flops_per_token": 6 * size, "train_state_bytes": 16 * row["total_parameters"]}
    row |= {"loss": loss - 0.05, "train_seconds": 20 + experts, "tokens_per_second": 40_000 / (1 + experts / 40)}
    row |= {"load_max_over_mean": 1 + 0.1 * math.log2(experts), "dead_experts": 0.0, "dropped_fraction": 0.01}
    row |= {"load_max_over_mean_by_layer": [1.0, 1 + 0.2 * math.log2(experts)], "router_largest_logit": 2.0}
    row |= {"router_entropy": math.log(experts), "skipped_steps": 0, "model_flops_utilization": 0.3, "loss_spikes": 1}
    row |= {"sparsity": 1 - point.get("EXPERTS_PER_TOKEN", 1) / experts}
    row |= {"eval/files/loss": loss - 0.2, "eval/unseen/loss": loss + 0.4}
    return row | planted


def write_run(folder, row, steps):
    """`metrics.jsonl` of a run that falls to the losses of its row, with three evaluations on the way."""
    folder.mkdir(parents=True)
    lines, source = [], row.get("source", "files")
    for step in range(1, steps + 1):
        above = 4 * math.exp(-6 * step / steps)
        at = {"step": step, "tokens": row["tokens"] * step // steps}
        logged = {"loss": row["loss"] + above, "step_seconds": row["train_seconds"] / steps}
        epochs = row.get("epochs", 0.5) * step / steps
        lines.append(at | logged | {f"loss/{source}": row["loss"] + above, f"epoch/{source}": epochs})
        if step in (steps // 3, 2 * steps // 3, steps):
            held = {}
            for name, tokens in SOURCES.items():
                held |= {f"eval/{name}/loss": row[f"eval/{name}/loss"] + (above if step < steps else 0)}
                held |= {f"eval/{name}/tokens": tokens}
            lines.append(at | held)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
