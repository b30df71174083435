"""Numbers of a sweep's report, one by one, against what was planted or counted by hand."""

import json
import math

import numpy as np
import pytest

from gpt4moe.analysis.scaling import KRAJEWSKI, REFIT_S_BASE, FitConfig, Routed
from gpt4moe.analysis.sweeps.costs import cost_plots
from gpt4moe.analysis.sweeps.curves import read_curves
from gpt4moe.analysis.sweeps.experts_law import expert_law_plots
from gpt4moe.analysis.sweeps.final import final_plots
from gpt4moe.analysis.sweeps.granularity import granularity_plots
from gpt4moe.analysis.sweeps.repeats import Repeated, repeat_plots
from gpt4moe.analysis.sweeps.routing import source_plots
from gpt4moe.analysis.sweeps.sparsity import fit_surface, sparsity_plots
from gpt4moe.analysis.sweeps.table import make_sweep, read_sweep
from gpt4moe.analysis.sweeps.tables import point_rows
from gpt4moe.train.loop import SkipLimitError
from tests.analysis.sweep_folder import SOURCES, write_sweep

QUICK = FitConfig(polished=4, replicates=20)
SIZE, TOKENS = 1_000_000, 2_000_000


def run(loss, *, seed=0, state="done", **point):
    """A row of the results."""
    return {**point, "seed": seed, "id": f"{point} {seed}", "state": state, "held_out_loss": loss, "tokens": TOKENS}


def test_a_failed_run_does_not_count_although_it_has_a_loss():
    rows = [run(3.0, LR=0.1), run(1.0, seed=1, state="failed", LR=0.1), run(2.5, LR=0.2)]
    (first, _) = point_rows(make_sweep("", rows, {}), [])
    assert first["mean"] == 3.0 and first["seeds done"] == "1 of 2"


def test_runs_that_diverged_are_counted_by_what_training_says_of_them():
    said = SkipLimitError(
        "the loss or gradient of the last 50 steps was not finite (max_skipped_steps=50); step 7 is saved with the last"
    )
    rows = [run(3.0, LR=0.1), run(None, state="failed", LR=0.2) | {"reason": f"SkipLimitError: {said}"}]
    rows.append(run(None, state="failed", LR=0.3) | {"reason": "out of memory"})
    assert [row["diverged"] for row in point_rows(make_sweep("", rows, {}), [])] == [0, 1, 0]


def test_distance_to_the_best_is_in_the_noise_beside_the_seeds():
    """Two points, two seeds: each seed's difference is 0.2 and 0.4, their mean 0.3 and its error 0.1."""
    rows = [run(loss, seed=seed, LR=rate) for rate, losses in ((0.1, (3.2, 3.5)), (0.2, (3.0, 3.1)))
            for seed, loss in enumerate(losses)]  # fmt: skip
    first, best = point_rows(make_sweep("", rows, {}), [])
    assert first["to the best"] == pytest.approx(0.3) and first["in its standard errors"] == pytest.approx(3)
    assert best["to the best"] == 0 and best["in standard errors"] == pytest.approx(-3)


def test_a_map_has_its_first_axis_across():
    rows = [
        run(3 + 0.1 * width + 0.01 * depth, WIDTH=width, DEPTH=depth) for width in (1, 2, 3, 4) for depth in (5, 6, 7)
    ]
    (plot,) = [plot for plot in final_plots(make_sweep("", rows, {})) if plot.name.startswith("map")]
    assert plot.name == "map_WIDTH_DEPTH" and len(plot.rows) == 12
    for row in plot.rows:
        assert row["held_out_loss"] == pytest.approx(3 + 0.1 * row["WIDTH"] + 0.01 * row["DEPTH"])
    import matplotlib.figure

    from gpt4moe.analysis.sweeps.drawing import Marks

    drawn = matplotlib.figure.Figure()
    plot.draw(drawn, Marks())
    (image,) = drawn.axes[0].images
    expected = [[3 + 0.1 * width + 0.01 * depth for width in (1, 2, 3, 4)] for depth in (5, 6, 7)]
    np.testing.assert_allclose(image.get_array(), expected)
    assert drawn.axes[0].get_xlabel() == "WIDTH" and drawn.axes[0].get_ylabel() == "DEPTH"


def planted(point, seed):
    return {"held_out_loss": 3.0, "active_parameters": SIZE, "tokens": TOKENS}


def logs(folder):
    return [folder / "runs" / f"run{at:03d}" / "metrics.jsonl" for at in range(2)]


def test_held_out_loss_of_two_trained_sources_is_weighted_by_their_tokens(tmp_path):
    rows = write_sweep(tmp_path, {}, planted, seeds=1, steps=6)
    path = logs(tmp_path)[0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(line | {"epoch/unseen": 0.1} if "loss" in line else line) for line in lines))
    (curve,) = read_curves(read_sweep(tmp_path))
    losses = [rows[0][f"eval/{name}/loss"] for name in SOURCES]
    assert curve.held_out[-1] == pytest.approx((6000 * losses[0] + 3000 * losses[1]) / 9000)


def test_the_shortest_seed_ends_a_curve(tmp_path):
    write_sweep(tmp_path, {}, planted, seeds=2, steps=8)
    path = logs(tmp_path)[1]
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= 6]
    path.write_text("\n".join(lines) + "\n")
    (curve,) = read_curves(read_sweep(tmp_path))
    assert curve.tokens[-1] == TOKENS * 6 // 8 and np.isfinite(curve.loss).all()


def test_steps_that_were_not_logged_take_time_too(tmp_path):
    def plant(point, seed):
        return {"held_out_loss": 3.0, "active_parameters": SIZE, "tokens": TOKENS, "train_seconds": 40.0}

    write_sweep(tmp_path, {"LR": [1e-3, 1e-2]}, plant, seeds=1)
    for log in tmp_path.glob("runs/*/metrics.jsonl"):
        rows = map(json.loads, log.read_text().splitlines())
        log.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] % 4 == 0))
    (curve, _) = read_curves(read_sweep(tmp_path))
    assert curve.seconds[-1] == pytest.approx(40.0)


def test_gains_of_a_source_are_over_the_first_value_at_the_same_other_settings():
    """A cell of which the reference has failed gives nothing."""
    level = {0.1: 0.0, 0.2: 5.0, 0.3: 7.0}
    rows = [
        run(3.0, EXPERTS=experts, LR=rate) | {"eval/a/loss": level[rate] - experts / 1e4, "eval/b/loss": level[rate]}
        for experts in (1024, 16_384) for rate in level if (experts, rate) != (1024, 0.3)
    ]  # fmt: skip
    (plot,) = source_plots(make_sweep("", rows, {"axes": [["EXPERTS"], ["LR"]]}), frozenset())
    found = {(row["EXPERTS"], row["source"]): (row["difference"], row["runs"]) for row in plot.rows}
    assert found[16_384, "a"] == (pytest.approx(-1.536), 2) and found[16_384, "b"] == (pytest.approx(0), 2)
    assert found[1024, "a"] == (0, 2)


def test_the_front_of_each_cost_is_in_the_table_of_costs():
    """Of speed the fastest and the best; of seconds the second is beaten by the third in both."""
    measured = [(3.0, 100, 10), (2.9, 50, 30), (2.8, 40, 20)]
    rows = [
        run(loss, LR=0.1 * at) | {"tokens_per_second": speed, "train_seconds": seconds}
        for at, (loss, speed, seconds) in enumerate(measured, 1)
    ]
    (plot,) = cost_plots(make_sweep("", rows, {}))
    assert [row["front_tokens_per_second"] for row in plot.rows] == [True, True, True]
    assert [row["front_train_seconds"] for row in plot.rows] == [True, False, True]


def epochs_sweep(folder, amounts, *, seeds=1, axes=None, loss=None):
    """Runs over unique tokens and all tokens; `loss(point, seed)` or a law of repeated tokens."""
    law = Repeated(B=80.0, E=2.5, beta=0.25, R_D=5.0)

    def plant(point, seed):
        unique, tokens = point["UNIQUE"], point["BUDGET"]
        row = {"active_parameters": SIZE, "tokens": tokens, "epochs": tokens / unique, "source": "text"}
        return row | {"held_out_loss": float(loss(point, seed) if loss else law.loss(tokens, unique))}

    write_sweep(folder, {"UNIQUE,BUDGET": amounts} | (axes or {}), plant, seeds=seeds, steps=3)
    sweep = read_sweep(folder)
    (plot,) = repeat_plots(sweep, read_curves(sweep), QUICK)
    return plot


def test_the_exponent_of_repeated_tokens_is_fitted_where_points_are_enough(tmp_path):
    amounts = [(unique, unique * epochs) for unique in (100_000, 400_000) for epochs in (1, 2, 4, 8)]
    constants = epochs_sweep(tmp_path, amounts).facts["text"]["fit"]["constants"]
    assert constants["beta"]["value"] == pytest.approx(0.25, abs=0.01)
    assert constants["R_D"]["value"] == pytest.approx(5, abs=0.2)


def test_a_rise_within_the_noise_of_seeds_is_no_rise(tmp_path):
    """Seeds err by 0.02 beside each other: of three, a difference by 0.016."""
    rises = {1: 3.0, 2: 2.9, 4: 2.92, 8: 2.85, 16: 3.1}

    def loss(point, seed):
        return rises[point["BUDGET"] // point["UNIQUE"]] + 0.02 * math.sin(5 * point["BUDGET"] / 1e5 + 2 * seed)

    plot = epochs_sweep(tmp_path, [(100_000, 100_000 * epochs) for epochs in rises], seeds=3, loss=loss)
    assert plot.rows[2]["held_out_loss"] > plot.rows[1]["held_out_loss"]
    assert "1 point at which more epochs raised the loss beyond noise is left out" in plot.caption


def test_rises_on_lines_that_are_not_shown_are_left_out_too(tmp_path):
    """Nine lines, eight of which are shown; on each the last point rises."""

    def loss(point, seed):
        epochs = point["BUDGET"] / point["UNIQUE"]
        return 3 - 0.1 * math.log2(epochs) + (epochs == 16) - 1e-7 * point["UNIQUE"]

    amounts = [(100_000, 100_000 * epochs) for epochs in (1, 2, 4, 8, 16)]
    plot = epochs_sweep(tmp_path, amounts, axes={"DROP": [0.01 * at for at in range(9)]}, loss=loss)
    assert "9 points at which more epochs raised the loss" in plot.caption
    assert "8 of 9 lines are shown; the CSV has all." in plot.caption
    assert "The law is fitted to 4 of 9 sources and settings." in plot.caption
    assert len(plot.rows) == 45 and len(plot.arms) == 8


def test_few_numbers_of_experts_do_not_say_where_the_gain_begins_and_ends():
    law = Routed(a=0.0, b=-0.06, c=0.0, d=0.62, E_start=2.0, E_max=150.0)
    for experts, held in (((1, 4, 16, 64), True), ((1, 2, 4, 8, 16, 32), False)):
        rows = [run(float(law.loss(1e6, count)), NUM_EXPERTS=count) | {"active_parameters": SIZE} for count in experts]
        (plot,) = expert_law_plots(make_sweep("", rows, {}), QUICK)
        fixed = {name: getattr(REFIT_S_BASE.law, name) for name in ("E_start", "E_max")} if held else {}
        assert plot.facts["all runs"]["fixed"] == {"a": 0.0, "c": 0.0} | fixed
        assert "of one expert for a token" in plot.caption and "95% bootstrap" in plot.caption


def test_lines_of_experts_without_a_law_are_told():
    law = Routed(a=0.0, b=-0.06, c=0.0, d=0.62, E_start=2.0, E_max=150.0)
    rows = [
        run(float(law.loss(1e6, count)), NUM_EXPERTS=count, LR=rate) | {"active_parameters": SIZE}
        for rate in (0.1, 0.2, 0.3, 0.4, 0.5) for count in (1, 4, 16, 64)
    ]  # fmt: skip
    (plot,) = expert_law_plots(make_sweep("", rows, {}), FitConfig(polished=1, replicates=2))
    assert "Fitted to 4 of 5 lines." in plot.caption


@pytest.mark.parametrize("without_embeddings", [True, False])
def test_laws_of_total_parameters_are_given_those_without_embeddings(without_embeddings):
    """Results of former versions count the embeddings alone."""
    size = {"total_parameters": 3e8} | ({"non_embedding_parameters": 1e8} if without_embeddings else {})
    rows = [run(4.0, GRANULARITY=grain) | size for grain in (1, 2, 4)]
    (plot,) = granularity_plots(make_sweep("", rows, {}))
    law, used = KRAJEWSKI.law, 1e8 if without_embeddings else 3e8
    expected = [law.g * (grain**-law.gamma - 1) / used**law.alpha for grain in (1, 2, 4)]
    np.testing.assert_allclose([row["published"] for row in plot.rows], expected, atol=1e-12)
    assert ("without embeddings" in plot.caption) == without_embeddings


def test_the_surface_is_over_parameters_without_embeddings():
    rows = []
    for size in (1e6, 3e6, 1e7):
        for experts in (2, 8, 32):
            total = size * (1 + 0.6 * (experts - 1))
            row = run(3 - 0.1 * math.log(total), SIZE=size, NUM_EXPERTS=experts) | {"sparsity": 1 - 2 / experts}
            rows.append(row | {"total_parameters": total + 5e6, "non_embedding_parameters": total})
    sweep = make_sweep("", rows, {})
    assert fit_surface(sweep).rms < 1e-9
    (plot,) = sparsity_plots(sweep)
    assert {round(row["non_embedding_parameters"]) for row in plot.rows} == {
        round(row["non_embedding_parameters"]) for row in rows
    }
    assert "total parameters without embeddings" in plot.caption
