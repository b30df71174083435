"""A table in the form of the open one of Clark et al. 2022 is read and fitted."""

import csv
import gzip
import math

import numpy as np
import pytest

from gpt4moe.analysis.scaling import REFIT_HASH, REFIT_S_BASE, FitConfig, Routed, fit, read_clark_csv
from gpt4moe.config.check import CallerError

COLUMNS = "hyper_id step router_type num_experts k routing_frequency seed dense_parameter_count loss_validation loss_c4"
SIZES = np.geomspace(15e6, 1.3e9, 7)
NOISE = 0.003 * math.log(10)  # an rms of log10 L of 0.003


def write(path):
    """Dense runs and two routers, with an earlier step of every run, other k and other layers, which are not taken."""
    noise = np.random.default_rng(0)
    rows = []

    def run(router, size, experts, k=1, frequency=0.5, seed=42, factor=1.0):
        law = (REFIT_HASH if router == "Hash" else REFIT_S_BASE).law
        name = f"{len(rows)}"
        for step, early in ((250_000, 1.0), (10_000, 1.5)):
            loss = law.loss(size, experts) * math.exp(NOISE * noise.standard_normal()) * early * factor
            rows.append([name, step, router, experts, k, frequency, seed, int(size), loss, 9.9])

    for size in SIZES:
        run("Dense", size, 1)
        for experts in 2 ** np.arange(1, 10):
            for router in ("S-Base", "Hash"):
                run(router, size, experts)
        run("S-Base", size, 64, seed=43)
        run("S-Base", size, 64, k=2, factor=0.5)
        run("S-Base", size, 64, frequency=1.0, factor=0.5)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        csv.writer(file).writerows([COLUMNS.split(), *rows])


def test_a_table_is_read_and_fitted(tmp_path):
    write(tmp_path / "curves.csv.gz")
    tables = read_clark_csv(tmp_path / "curves.csv.gz")
    assert {router: len(runs) for router, runs in tables.items()} == {"S-Base": 77, "Hash": 70}
    runs = tables["S-Base"]
    assert len(np.unique(runs.cells)) == 70  # two seeds of a cell are one
    assert runs.loss.max() < 3.3  # no early step
    found = fit(Routed, runs, FitConfig(delta=math.inf, replicates=0, polished=3))
    assert found.rms / math.log(10) == pytest.approx(0.003, rel=0.2)
    assert found.law.cutoff == pytest.approx(REFIT_S_BASE.law.cutoff, rel=0.9)
    assert found.law.dense_multiplier(15e6, 128) == pytest.approx(
        REFIT_S_BASE.law.dense_multiplier(15e6, 128), rel=0.05
    )
    assert found.held_out.error < 2 * NOISE


def test_a_table_without_a_column_is_refused(tmp_path):
    (tmp_path / "curves.csv").write_text("hyper_id,step\n1,2\n")
    with pytest.raises(CallerError, match=r"lacks the columns \['router_type'"):
        read_clark_csv(tmp_path / "curves.csv")
