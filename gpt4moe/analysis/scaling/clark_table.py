"""Reads the open table of routed runs behind Clark et al. 2022: a CSV in, runs to fit out, one set a router."""

from __future__ import annotations

import csv
import gzip
import pathlib

from gpt4moe.analysis.scaling.observations import Observations, observe
from gpt4moe.config.check import require

DENSE, ROUTERS = "Dense", ("S-Base", "RL-R", "Hash")
READ = ("hyper_id", "step", "router_type", "num_experts", "k", "routing_frequency", "dense_parameter_count")


def read_clark_csv(path: str | pathlib.Path, loss: str = "loss_validation") -> dict[str, Observations]:
    """Returns the runs of every router in the table, the dense ones among them as one expert; fit `Routed` to each.

    The table is `data/curves.csv.gz` of github.com/google-deepmind/scaling_laws_for_routing (Apache-2.0, 5,799 rows),
    plain or gzipped. Columns that are read, others are passed over: `hyper_id` (one a run), `step`, `router_type`
    (`Dense`, `S-Base`, `RL-R`, `Hash`), `num_experts`, `k` (experts per token), `routing_frequency`,
    `dense_parameter_count` and `loss`. Taken is what the paper's law was fitted to: the last step of runs with k = 1
    and every second layer routed. Runs that differ in the seed alone are one cell.

    To expect of the table as published, in the order S-Base, RL-R, Hash: 61, 62 and 59 runs (a few more where other
    seeds are in it); least squares (`FitConfig(delta=math.inf)`) leaves an rms of log10 L of 0.0032, 0.0032 and 0.0030,
    which is 0.0074, 0.0074 and 0.0069 of `Fit.rms`, with the constants and cut-offs of `routed.REFIT_*`; table 3 of
    the paper has a mean error of 0.72 %, 1.60 % and 0.98 %.
    """
    path = pathlib.Path(path)
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        rows = list(csv.DictReader(file))
    missing = [column for column in (*READ, loss) if not rows or column not in rows[0]]
    require(not missing, "path", str(path), f"lacks the columns {missing}", f"a table has {', '.join((*READ, loss))}")
    last: dict[str, dict] = {}
    for row in rows:
        if row["hyper_id"] not in last or float(row["step"]) > float(last[row["hyper_id"]]["step"]):
            last[row["hyper_id"]] = row
    taken = [row for row in last.values() if float(row["k"]) == 1 and float(row["routing_frequency"]) == 0.5]
    found = {}
    for router in ROUTERS:
        runs = [row for row in taken if row["router_type"] in (router, DENSE)]
        if any(row["router_type"] == router for row in runs):
            found[router] = observe(
                [float(row[loss]) for row in runs],
                active_parameters=[float(row["dense_parameter_count"]) for row in runs],
                num_experts=[1.0 if row["router_type"] == DENSE else float(row["num_experts"]) for row in runs],
            )
    require(bool(found), "path", str(path), f"has no run of {ROUTERS} with k = 1 and every second layer routed")
    return found
