"""The report of a sweep: figures, tables and files, against losses that were planted and counted otherwise."""

import csv
import html.parser
import json
import math
import random
import re
import statistics

import numpy as np
import pytest

from gpt4moe import launch
from gpt4moe.analysis.scaling import DataConstrained, FitConfig, Routed
from gpt4moe.analysis.sweeps.costs import front
from gpt4moe.analysis.sweeps.curves import read_curves, tokens_to_match
from gpt4moe.analysis.sweeps.experts_law import expert_law_plots
from gpt4moe.analysis.sweeps.granularity import granularity_plots
from gpt4moe.analysis.sweeps.isoflop import isoflop_plots
from gpt4moe.analysis.sweeps.repeats import repeat_plots
from gpt4moe.analysis.sweeps.report import write_sweep_report
from gpt4moe.analysis.sweeps.sparsity import fit_surface, sparsity_plots
from gpt4moe.analysis.sweeps.table import make_sweep, read_sweep
from tests.analysis.sweep_folder import write_sweep

PLANTED = Routed(a=0.0, b=-0.06, c=0.0, d=0.62, E_start=2.0, E_max=150.0)
QUICK = FitConfig(polished=4, replicates=20)
REASON = "out of memory: RESOURCE_EXHAUSTED: 17 <GiB> & more"
EXPERTS, TOKENS = (1, 2, 4, 8, 16, 32, 64), 2_000_000


class Page(html.parser.HTMLParser):
    """Tags in order, text, and whether every tag that is opened is closed in its turn."""

    VOID = ("meta", "link", "br", "input")

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [tag] * (tag not in self.VOID)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def read_csv(folder, name):
    with open(folder / "figures" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def planted_experts(point, seed):
    """A seed's luck, and that of a run beside others of the same seed."""
    noise = random.Random(f"{point} {seed}").gauss(0, 0.004) + 0.008 * (seed - 1)
    loss = float(PLANTED.loss(1e6, point["NUM_EXPERTS"])) + noise
    return {"held_out_loss": loss, "active_parameters": 1_000_000 + 500 * point["NUM_EXPERTS"], "tokens": TOKENS}


def ran_out_of_memory(point, seed):
    return REASON if (point["NUM_EXPERTS"], seed) == (64, 2) else None


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A sweep over experts and its report: folder, rows, page."""
    folder = tmp_path_factory.mktemp("sweep")
    rows = write_sweep(folder, {"NUM_EXPERTS": EXPERTS}, planted_experts, failed=ran_out_of_memory)
    path = write_sweep_report(folder, QUICK)
    return folder, rows, path.read_text()


def test_page_is_whole_and_stands_alone(experts):
    folder, _, source = experts
    page = Page(source)
    assert page.open == []
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    curves = {f"curves_{kind}" for kind in ("tokens", "FLOPs", "seconds")}
    assert names == curves | {"loss_by_NUM_EXPERTS", "law_experts", "costs", "sources", "load", "load_by_layer"}
    assert page.count("svg") == len(names)
    assert {path.stem for path in (folder / "figures").glob("*.csv")} == names | {"points"}
    for _, attributes in page.tags:
        for link in (attributes.get("src"), attributes.get("href"), attributes.get("xlink:href")):
            assert (
                link is None or link.startswith(("#", "data:image/png;base64")) or (folder / link).stat().st_size > 100
            ), link
    assert not re.search(r"https?://(?!www\.w3\.org/(1999/xlink|2000/svg))|@import", source)
    assert "currentColor" in source and "#010203" not in source


def test_ids_on_the_page_are_not_those_of_lines(experts):
    """Lines are hidden by their class within a figure: all of a legend's boxes have something to hide."""
    page = Page(experts[2])
    classes = {attributes.get("class") for tag, attributes in page.tags if tag == "g"}
    boxes = [attributes["data-arm"] for tag, attributes in page.tags if tag == "input"]
    assert len(boxes) == 3 * 7 + 7 + 2 and set(boxes) <= classes
    assert not any(str(attributes.get("id", "")).startswith("arm") for _, attributes in page.tags)


def noise_beside(rows):
    """Deviation of a run from its point and its seed: means of either are taken off in turn until none is left."""
    done = [row for row in rows if row["state"] == "done"]
    left = {(row["NUM_EXPERTS"], row["seed"]): row["held_out_loss"] for row in done}
    for turn in range(200):
        for name in {key[turn % 2] for key in left}:
            members = [key for key in left if key[turn % 2] == name]
            mean = statistics.mean(left[key] for key in members)
            left |= {key: left[key] - mean for key in members}
    freedom = len(left) - len({count for count, _ in left}) - len({seed for _, seed in left}) + 1
    return math.sqrt(sum(value**2 for value in left.values()) / freedom)


def test_points_have_mean_error_and_difference(experts):
    folder, rows, source = experts
    losses = {count: [row["held_out_loss"] for row in rows if row["NUM_EXPERTS"] == count and row["state"] == "done"]
              for count in EXPERTS}  # fmt: skip
    noise = noise_beside(rows)
    points, dots = read_csv(folder, "points"), read_csv(folder, "loss_by_NUM_EXPERTS")
    assert [int(row["NUM_EXPERTS"]) for row in dots] == list(EXPERTS)
    for count, point, dot in zip(EXPERTS, points, dots, strict=True):
        mean, error = statistics.mean(losses[count]), statistics.stdev(losses[count]) / math.sqrt(len(losses[count]))
        apart = statistics.mean(own - first for own, first in zip(losses[count], losses[1], strict=False))
        np.testing.assert_allclose([float(point["mean"]), float(dot["held_out_loss"])], mean)
        np.testing.assert_allclose([float(point["standard error"]), float(dot["held_out_loss_standard_error"])], error)
        np.testing.assert_allclose(float(point["to the first"]), apart, atol=1e-12)
        of_difference = noise * math.sqrt(2 / len(losses[count]))
        np.testing.assert_allclose(float(point["in standard errors"]), apart / of_difference, atol=1e-9)
    assert points[-1]["seeds done"] == "2 of 3" and float(points[-1]["to the best"]) == 0
    assert f"{statistics.mean(losses[64]):.4f}" in Page(source).text


def test_failed_cells_are_rows_with_their_reason(experts):
    _, rows, source = experts
    page = Page(source)
    assert page.text.count(REASON) == 1 and "<GiB>" not in source
    assert sum(attributes.get("class") == "failed" for tag, attributes in page.tags if tag == "tr") == 1
    assert all(row["id"] in page.text for row in rows)


def test_planted_law_of_experts_is_found_and_extrapolates(experts):
    folder, _, source = experts
    facts = json.loads((folder / "figures" / "summary.json").read_text())["fits"]["law_experts"]["all runs"]
    assert facts["fixed"] == {"a": 0.0, "c": 0.0} and facts["num_runs"] == 20
    assert abs(facts["constants"]["b"]["value"] + 0.06) < 0.015 and facts["rms"] < 0.004
    drawn = read_csv(folder, "law_experts")
    law = [row for row in drawn if row["set"] == "law"]
    for row in law:
        expected = float(PLANTED.loss(1e6, float(row["num_experts"])))
        assert abs(float(row["loss"]) / expected - 1) < (0.02 if row["outside"] == "True" else 0.004)
    assert max(float(row["num_experts"]) for row in law if row["outside"] == "False") <= 64 * (1 + 1e-9)
    assert max(float(row["num_experts"]) for row in law if row["outside"] == "True") > 200
    assert sum(row["set"] == "run" for row in drawn) == 20
    assert "on the 5 runs with the most experts when fitted without them" in Page(source).text


def test_curves_are_means_over_seeds_between_their_extremes(experts):
    folder, rows, _ = experts
    held = [
        row for row in read_csv(folder, "curves_FLOPs") if row["set"] == "held out" and row["point"] == "NUM_EXPERTS 8"
    ]
    # Of what was trained on: `unseen` does not count.
    ends = [row["eval/files/loss"] for row in rows if row["NUM_EXPERTS"] == 8]
    assert len(held) == 3 and float(held[-1]["tokens"]) == TOKENS
    np.testing.assert_allclose([float(held[-1][name]) for name in ("loss", "low", "high")],
                               [statistics.mean(ends), min(ends), max(ends)])  # fmt: skip
    size = 1_000_000 + 500 * 8
    np.testing.assert_allclose([float(row["flops"]) for row in held], [6 * size * float(row["tokens"]) for row in held])
    np.testing.assert_allclose(float(held[-1]["seconds"]), 20 + 8)


def test_sources_are_compared_seed_by_seed(experts):
    folder, rows, source = experts
    by_cell = {(row["NUM_EXPERTS"], row["seed"]): row for row in rows if row["state"] == "done"}
    found = {(row["NUM_EXPERTS"], row["source"]): row for row in read_csv(folder, "sources")}
    off = [by_cell[64, seed]["eval/unseen/loss"] - by_cell[1, seed]["eval/unseen/loss"] for seed in (0, 1)]
    np.testing.assert_allclose(float(found["64", "unseen"]["difference"]), statistics.mean(off))
    np.testing.assert_allclose(float(found["64", "unseen"]["standard_error"]), statistics.stdev(off) / math.sqrt(2))
    assert found["64", "unseen"]["runs"] == "2"
    assert "unseen, not trained on" in Page(source).text and "files, not trained on" not in Page(source).text


def test_front_holds_what_no_other_beats(experts):
    points = read_sweep(experts[0]).measured
    for key, more in (("tokens_per_second", True), ("train_state_bytes", False)):
        sign = -1 if more else 1
        slow = [
            point
            for point in points
            if not any(
                sign * other.mean(key) <= sign * point.mean(key)
                and other.mean("held_out_loss") < point.mean("held_out_loss")
                for other in points
            )
        ]
        assert {point.label for point in front(points, key, "held_out_loss", more=more)} == {p.label for p in slow}


def test_tokens_to_match_lie_where_the_curve_comes_down(experts):
    curves = {curve.point.label: curve for curve in read_curves(read_sweep(experts[0]))}
    curve = curves["NUM_EXPERTS 4"]
    middle = (curve.loss[40] + curve.loss[41]) / 2
    np.testing.assert_allclose(tokens_to_match(curve, middle), (curve.tokens[40] + curve.tokens[41]) / 2)
    assert math.isnan(tokens_to_match(curve, curve.loss.min() - 0.1))


def test_budgets_need_sizes_that_differ(experts):
    """Experts at equal active FLOPs are one size: no parabola is laid through them."""
    assert isoflop_plots(read_sweep(experts[0])) == []


def test_worth_of_repeated_tokens_is_found_for_each_source(tmp_path):
    laws = {"code": 6.0, "text": 3.0}

    def planted(point, seed):
        source = "code" if point["CODE_WEIGHT"] else "text"
        law = DataConstrained(A=0.0, B=80.0, E=2.5, alpha=0.3, beta=0.32, R_D=laws[source], R_N=5.0)
        unique, tokens = point["UNIQUE"], point["BUDGET"]
        loss = law.E + law.B / law.effective_tokens(tokens, unique) ** law.beta
        loss += tokens / unique == 16  # too often: what no worth of a token can say
        row = {"active_parameters": 1_000_000, "tokens": tokens, "epochs": tokens / unique, "source": source}
        return row | {"held_out_loss": float(loss)}

    amounts = [(unique, unique * epochs) for unique in (100_000, 400_000) for epochs in (1, 2, 4, 8, 16)]
    axes = {"CODE_WEIGHT,TEXT_WEIGHT": [(1, 0), (0, 1)], "UNIQUE,BUDGET": amounts}
    write_sweep(tmp_path, axes, planted, seeds=1, steps=6)
    sweep = read_sweep(tmp_path)
    (plot,) = repeat_plots(sweep, read_curves(sweep), QUICK)
    for source, worth in laws.items():
        assert abs(plot.facts[source]["fit"]["constants"]["R_D"]["value"] - worth) < 0.1
    unique = ("100k unique tokens", "400k unique tokens")
    assert {arm.label for arm in plot.arms} == {f"{source}, {amount}" for source in laws for amount in unique}
    assert [row["epochs"] for row in plot.rows] == [1, 2, 4, 8, 16] * 4
    assert "4 points at which more epochs raised the loss beyond noise are left out" in plot.caption


def test_one_law_is_fitted_to_a_grid_of_sizes():
    law = Routed(a=-0.08, b=-0.12, c=0.01, d=1.1, E_start=2.0, E_max=200.0)
    rows = [
        {"WIDTH": width, "NUM_EXPERTS": count, "seed": 0, "id": f"{width} {count}", "state": "done", "tokens": 1e6}
        | {"active_parameters": width**2 * 100, "held_out_loss": float(law.loss(width**2 * 100, count))}
        for width in (100, 200, 400, 800)
        for count in (1, 4, 16, 64)
    ]
    (plot,) = expert_law_plots(make_sweep("", rows, {}), QUICK)
    (facts,) = plot.facts.values()
    assert facts["fixed"] == {} and facts["num_cells"] == 16 and facts["rms"] < 1e-3
    dense = float(law.dense_multiplier(200**2 * 100, 64))
    assert facts["dense_multiplier"]["WIDTH 200"]["64"] == pytest.approx(dense, rel=0.05)
    assert facts["dense_multiplier"]["WIDTH 200"]["1"] == pytest.approx(1)
    assert [arm.label for arm in plot.arms] == [f"WIDTH {width}" for width in (100, 200, 400, 800)]


def bowl(x, y):
    """Nats at x = ln N / 10^7 and y = ln(1 - S)."""
    return 3.0 - 0.1 * x + 0.05 * y + 0.02 * x * x - 0.01 * x * y + 0.03 * y * y


def planted_bowl(point, seed):
    size, experts = point["SIZE"], point["NUM_EXPERTS"]
    total = size * (1 + 0.6 * (experts - 1))
    loss = bowl(math.log(total / 1e7), math.log(2 / experts)) + (0.001, -0.001)[seed]
    return {"held_out_loss": loss, "active_parameters": size, "total_parameters": total, "tokens": TOKENS}


def test_planted_surface_over_parameters_and_sparsity_is_found(tmp_path):
    axes = {"SIZE": [1_000_000, 3_000_000, 10_000_000], "NUM_EXPERTS,EXPERTS_PER_TOKEN": [(2, 2), (8, 2), (32, 2)]}
    write_sweep(tmp_path, axes, planted_bowl, seeds=2)
    sweep = read_sweep(tmp_path)
    surface = fit_surface(sweep)
    assert surface.rms < 1e-9
    x, y = np.meshgrid(np.log([2e6, 5e6, 2e8]), np.log([1.0, 0.5, 0.1]))
    expected = bowl(x - math.log(1e7), y)
    np.testing.assert_allclose(surface.loss(np.stack([x, y], axis=-1)), expected, rtol=1e-9)
    write_sweep_report(tmp_path, QUICK)
    rows = read_csv(tmp_path, "sparsity")
    assert {round(float(row["sparsity"]), 6) for row in rows} == {0, 0.75, 0.9375}
    assert all(float(row["loss"]) == pytest.approx(float(row["surface"])) for row in rows)


def test_a_surface_needs_parameters_and_sparsity_that_change_apart(experts):
    assert sparsity_plots(read_sweep(experts[0])) == []


def test_load_of_layers_and_stability_are_told(experts):
    folder = experts[0]
    layers = read_csv(folder, "load_by_layer")
    assert [row["layer"] for row in layers] == ["0", "1"] * len(EXPERTS)
    assert [float(row["load_max_over_mean"]) for row in layers[1::2]] == pytest.approx(
        [1 + 0.2 * math.log2(count) for count in EXPERTS]
    )
    points = read_csv(folder, "points")
    assert [int(float(row["loss spikes"])) for row in points] == [3, 3, 3, 3, 3, 3, 2]
    assert [row["diverged"] for row in points] == ["0"] * len(EXPERTS)


def rows_of(points):
    return [
        {**point, "seed": 0, "id": str(at), "state": "done", "held_out_loss": 3.0} for at, point in enumerate(points)
    ]


def test_axes_are_told_apart_with_and_without_a_manifest():
    together = [{"NUM_EXPERTS": e, "K": k, "LR": lr} for e, k in ((8, 2), (1, 1), (64, 4)) for lr in (1e-3, 1e-2)]
    for manifest in ({}, {"axes": [["NUM_EXPERTS", "K"], ["LR"]]}):
        axes = make_sweep("", rows_of(together), manifest).axes
        assert [axis.names for axis in axes] == [("NUM_EXPERTS", "K"), ("LR",)]
        assert axes[0].at == (1, 8, 64) and axes[0].log and axes[0].labels == ("1", "8", "64")
    drawn = [{"LR": 1e-3 * at, "WD": 0.5 / at} for at in (1, 2, 3)]
    assert len(make_sweep("", rows_of(drawn), {"axes": [["LR"], ["WD"]]}).axes) == 2
    derived = {"cells": [{"derived": {"hidden_dim": 3}}]}
    held = [{"NUM_EXPERTS": e, "hidden_dim": 64 // e} for e in (1, 2, 4)]
    assert [axis.names for axis in make_sweep("", rows_of(held), derived).axes] == [("NUM_EXPERTS",)]


def test_axes_of_another_sweep_planned_in_the_folder_are_not_those_of_the_results():
    rows = [row | {"id": str(at)} for at, row in enumerate(rows_of([{"LR": 1e-3}, {"LR": 1e-2}]))]
    other = {"axes": [["NUM_EXPERTS"]], "cells": [{"id": "0"}, {"id": "7"}]}
    assert [axis.names for axis in make_sweep("", rows, other).axes] == [("LR",)]
    same = {"axes": [["LR"]], "cells": [{"id": "0"}, {"id": "1"}]}
    assert [axis.names for axis in make_sweep("", rows, same).axes] == [("LR",)]


def test_runs_that_were_cut_do_not_count_although_they_have_a_loss():
    rows = rows_of([{"LR": 0.1}, {"LR": 0.2}])
    rows[0] |= {"state": "running", "held_out_loss": 1.0}
    sweep = make_sweep("", rows, {})
    assert [point.label for point in sweep.measured] == ["LR 0.2"] and len(sweep.points) == 2


def test_granularity_stands_beside_the_published_law():
    """Differences of Krajewski's law at one size and budget: (g / G^gamma - g) / N^alpha, level and tokens aside."""
    rows = rows_of([{"GRANULARITY": grain} for grain in (1, 2, 4)])
    for row, loss in zip(rows, (4.0, 3.9, 3.85), strict=True):
        row |= {"held_out_loss": loss, "total_parameters": 1e8, "tokens": 1e9}
    (plot,) = granularity_plots(make_sweep("", rows, {}))
    np.testing.assert_allclose([row["difference"] for row in plot.rows], [0, -0.1, -0.15], atol=1e-12)
    expected = [2.1 * (grain**-0.58 - 1) / 1e8**0.115 for grain in (1, 2, 4)]
    np.testing.assert_allclose([row["published"] for row in plot.rows], expected, atol=1e-12)


def test_values_of_names_that_change_together_are_told_apart_by_what_differs():
    points = [("@a", 1, 0.1), ("@a", 1, 0.0), ("@b", 4, 0.1)]
    rows = rows_of([dict(zip(("ROUTER", "GROUPS", "WEIGHT"), point, strict=True)) for point in points])
    (axis,) = make_sweep("", rows, {"axes": [["ROUTER", "GROUPS", "WEIGHT"]]}).axes
    assert axis.title == "ROUTER" and axis.labels == ("a, WEIGHT 0.1", "a, WEIGHT 0", "b") and axis.named(2) == "b"


def test_names_are_an_axis_without_numbers():
    points = [{"router": name, "factor": factor} for name in ("@routers.a", "@routers.b") for factor in (None, 1.25)]
    router, factor = make_sweep("", rows_of(points), {}).axes
    assert not router.numeric and router.labels == ("routers.a", "routers.b") and router.named(1) == "routers.b"
    assert not factor.numeric and factor.named(0) == "factor None" and factor.named(1) == "factor 1.25"


NAMES = ("@routers.top_k", "@routers.hash", "@routers.random")


def test_named_and_partly_failed_sweeps_have_a_page_too(tmp_path):
    def planted(point, seed):
        return {"held_out_loss": 3 + 0.1 * NAMES.index(point["ROUTER"]) + 0.01 * seed, "active_parameters": 10**6,
                "tokens": 10**6}  # fmt: skip

    def failed(point, seed):
        return "loss is not finite" if point["ROUTER"] == "@routers.random" else None

    write_sweep(tmp_path, {"ROUTER": NAMES}, planted, failed=failed, steps=6)
    page = Page(write_sweep_report(tmp_path).read_text())
    ranked = read_csv(tmp_path, "loss_by_ROUTER")
    assert [row["ROUTER"] for row in ranked] == ["@routers.top_k", "@routers.hash"]
    assert json.loads((tmp_path / "figures" / "summary.json").read_text())["noise"] == pytest.approx(0.01)
    assert "0 of 3" in page.text and page.text.count("loss is not finite") == 3


def test_sweep_of_which_nothing_is_done_has_a_page(tmp_path):
    write_sweep(tmp_path, {"NUM_EXPERTS": (2, 4)}, planted_experts, failed=lambda point, seed: "no", seeds=1)
    page = Page(write_sweep_report(tmp_path).read_text())
    assert "No run is done yet" in page.text and page.count("svg") == 0


def test_single_run_and_missing_logs_have_a_page(tmp_path):
    (row,) = write_sweep(tmp_path, {}, lambda point, seed: planted_experts({"NUM_EXPERTS": 4}, 0), seeds=1, steps=6)
    (tmp_path / "runs" / row["id"] / "metrics.jsonl").unlink()
    page = Page(write_sweep_report(tmp_path).read_text())
    assert "all runs" in page.text and page.open == []


def test_command_writes_the_report_or_says_in_one_line_why_not(tmp_path, capsys):
    def answer(*words):
        try:
            code = launch.main(["report", *words])
        except SystemExit as leaving:
            code = leaving.code
        said = capsys.readouterr()
        return code, said.out, said.err

    write_sweep(tmp_path / "done", {"LR": (0.1, 0.2)}, lambda point, seed: planted_experts({"NUM_EXPERTS": 4}, seed),
                seeds=1, steps=6)  # fmt: skip
    code, out, _ = answer(f"--sweep={tmp_path / 'done'}", "--json")
    assert code == 0 and json.loads(out) == {"report": str(tmp_path / "done" / "report.html")}
    (tmp_path / "cut" / "runs").mkdir(parents=True)
    for words, said in (
        ([f"--sweep={tmp_path / 'none'}"], "has no results.json; give the --workdir of a gpt4moe sweep"),
        ([f"--sweep={tmp_path / 'cut'}"], "has runs but no results.json; give the same gpt4moe sweep command again"),
        ([f"--sweep={tmp_path}", f"--workdir={tmp_path}"], "not allowed with argument --sweep"),
        ([], "one of the arguments --workdir --sweep is required"),
        ([f"--sweep={tmp_path / 'done'}", "--step=3"], "takes no ['--step']"),
    ):
        code, _, err = answer(*words)
        assert code == 2 and said in err and err.count("\n") == 1, err
