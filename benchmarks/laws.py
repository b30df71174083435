"""Seconds of a fit of each scaling law, and how often its intervals hold the constants that were planted.

    python benchmarks/laws.py [--datasets 20] [--replicates 200] [--json]

Each data set is a grid of two seeds a cell (`GRIDS`) of a published law with 0.3 % noise on the loss. A nominal 95 %
interval of a perfect method would hold a constant 95 times in a hundred.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator

import numpy as np

from gpt4moe.analysis.scaling import (
    ABNAR,
    HOFFMANN,
    KRAJEWSKI,
    MUENNIGHOFF,
    REFIT_HASH,
    FitConfig,
    Law,
    Observations,
    fit,
    observe,
)

NOISE, SEEDS = 0.003, 2
SIZES, TOKENS = np.geomspace(50e6, 10e9, 6), np.geomspace(2e9, 500e9, 6)
FRESH = ("A", "B", "E", "alpha", "beta")  # held where repetition is fitted
GRIDS = {
    "Chinchilla": (HOFFMANN, {"active_parameters": SIZES, "tokens": TOKENS}, ()),
    "DataConstrained": (
        MUENNIGHOFF,
        {"active_parameters": SIZES, "unique_tokens": [1e8, 1e9, 1e10], "epochs": [1, 4, 8, 16, 32, 64]},
        FRESH,
    ),
    "Routed": (
        REFIT_HASH,
        {"active_parameters": np.geomspace(15e6, 1.3e9, 6), "num_experts": 2.0 ** np.arange(10)},
        (),
    ),
    "Granular": (
        KRAJEWSKI,
        {"total_parameters": np.geomspace(129e6, 3.7e9, 5), "tokens": TOKENS, "granularity": [1, 2, 4, 8, 16]},
        (),
    ),
    "Sparse": (ABNAR, {"total_parameters": SIZES, "tokens": TOKENS, "sparsity": [0, 0.5, 0.75, 0.9, 0.95]}, ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laws", nargs="*", default=list(GRIDS), choices=list(GRIDS), help="which to fit")
    parser.add_argument("--datasets", type=int, default=20, help="synthetic data sets a law")
    parser.add_argument("--replicates", type=int, default=200, help="of the bootstrap")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    rows = [measure(name, arguments.datasets, arguments.replicates) for name in arguments.laws]
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"{'law':16} {'runs':>5} {'constants':>10} {'seconds':>8} {'held':>6}")
    for row in rows:
        print(f"{row['law']:16} {row['runs']:5} {row['constants']:10} {row['seconds']:8.2f} {row['held']:6.3f}")


def measure(name: str, num_datasets: int, replicates: int) -> dict:
    """Median seconds of a fit, and the share of all intervals that hold their constant."""
    held, seconds = [], []
    for law, runs in datasets(name, num_datasets):
        fixed = {constant: getattr(law, constant) for constant in GRIDS[name][2]}
        found = fit(type(law), runs, FitConfig(replicates=replicates, held_out=0.0), fixed)
        held += [low <= getattr(law, constant) <= high for constant, (low, high) in found.intervals.items()]
        seconds.append(found.seconds)
    num_constants = len(held) // num_datasets
    row = {"law": name, "runs": len(runs), "constants": num_constants}
    return row | {"seconds": statistics.median(seconds), "held": statistics.mean(held)}


def datasets(name: str, count: int) -> Iterator[tuple[Law, Observations]]:
    """The law that was planted and runs of it, `count` times with other noise."""
    published, grid, _ = GRIDS[name]
    mesh = np.meshgrid(*grid.values(), indexing="ij")
    columns = {key: np.repeat(np.ravel(values), SEEDS) for key, values in zip(grid, mesh, strict=True)}
    if "epochs" in columns:
        columns["tokens"] = columns["unique_tokens"] * columns.pop("epochs")
    loss = published.loss(**columns)
    for seed in range(count):
        noise = np.random.default_rng(seed).standard_normal(len(loss))
        yield published.law, observe(loss * np.exp(NOISE * noise), **columns)


if __name__ == "__main__":
    main()
