"""The numbers that a report draws of a fit."""

import json

import numpy as np
import pytest

from gpt4moe.analysis.scaling import ABNAR, REFIT_RL_R, FitConfig, Routed, curve, fit, observe, residual_rows, summary
from gpt4moe.config.check import CallerError

SIZES, EXPERTS = np.geomspace(1e7, 1e9, 5), 2.0 ** np.arange(7)


@pytest.fixture(scope="module")
def fitted():
    sizes, experts = (np.repeat(mesh.ravel(), 2) for mesh in np.meshgrid(SIZES, EXPERTS))
    loss = REFIT_RL_R.loss(active_parameters=sizes, num_experts=experts)
    noisy = loss * np.exp(0.002 * np.random.default_rng(0).standard_normal(loss.shape))
    runs = observe(noisy, active_parameters=sizes, num_experts=experts)
    return fit(Routed, runs, FitConfig(replicates=40, polished=3))


def test_a_curve_has_its_band_its_runs_and_its_shade(fitted):
    drawn = curve(fitted, "num_experts", active_parameters=1e8, beyond=4)
    assert drawn.values[0] == 1  # there are no fewer experts than one
    assert drawn.values[-1] == pytest.approx(256)
    assert np.array_equal(drawn.prediction.outside, drawn.values > 64)
    assert sorted(drawn.runs.variables["num_experts"]) == sorted(np.repeat(EXPERTS, 2))
    assert np.all(drawn.prediction.low <= drawn.prediction.high)
    rows = drawn.rows()
    assert json.loads(json.dumps(rows)) == rows
    assert set(rows[0]) == {"active_parameters", "num_experts", "loss", "low", "high", "outside"}
    at_runs = curve(fitted, "num_experts", EXPERTS, active_parameters=1e8)
    truth = REFIT_RL_R.loss(active_parameters=1e8, num_experts=EXPERTS)
    assert at_runs.prediction.loss == pytest.approx(truth, rel=0.003)


def test_a_size_between_the_runs_has_a_curve_without_runs(fitted):
    assert len(curve(fitted, "num_experts", active_parameters=2e8).runs) == 0
    with pytest.raises(CallerError, match="must be those of Routed"):
        curve(fitted, "num_experts", tokens=1e9)


def test_summary_and_residuals_are_plain(fitted):
    told = summary(fitted)
    assert json.loads(json.dumps(told)) == told
    assert told["num_runs"] == 70
    assert told["num_cells"] == 35
    assert told["constants"]["a"]["low"] < told["constants"]["a"]["value"] < told["constants"]["a"]["high"]
    assert told["ranges"]["num_experts"] == [1, 64]
    rows = residual_rows(fitted)
    assert [row["loss"] for row in rows] == fitted.observations.loss.tolist()
    first = {key: rows[0][key] for key in ("active_parameters", "num_experts")}
    assert rows[0]["predicted"] == pytest.approx(fitted.law.loss(**first), rel=1e-12)


def test_sparsity_goes_towards_one_and_not_beyond():
    left_out = np.array([0, 0.5, 0.75, 0.9])
    total, tokens, shares = (m.ravel() for m in np.meshgrid(np.geomspace(1e8, 1e10, 4), [1e9, 1e10, 1e11], left_out))
    columns = {"total_parameters": total, "tokens": tokens, "sparsity": shares}
    found = fit(
        type(ABNAR.law), observe(ABNAR.loss(**columns), **columns), FitConfig(replicates=0, polished=1, max_starts=500)
    )
    drawn = curve(found, "sparsity", total_parameters=1e9, tokens=1e10)
    assert drawn.values[[0, -1]] == pytest.approx([0, 0.975])
    assert drawn.prediction.outside.any()
    assert np.isfinite(drawn.prediction.loss).all()
