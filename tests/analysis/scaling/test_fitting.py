"""Fits find planted constants again, say how sure they are, and say where they stop to hold."""

import dataclasses
import math

import numpy as np
import pytest

from gpt4moe.analysis.scaling import (
    ABNAR,
    HOFFMANN,
    KRAJEWSKI,
    MUENNIGHOFF,
    REFIT_HASH,
    Chinchilla,
    FitConfig,
    fit,
    observe,
)
from gpt4moe.config.check import CallerError

NOISE = 0.003  # of log L from seed to seed, as between seeds of one published cell
GRIDS = {
    "chinchilla": (
        HOFFMANN,
        {"active_parameters": np.geomspace(50e6, 16e9, 6), "tokens": np.geomspace(2e9, 500e9, 6)},
        (),
    ),
    "data_constrained": (
        MUENNIGHOFF,
        {
            "active_parameters": np.geomspace(50e6, 9e9, 5),
            "unique_tokens": np.geomspace(1e8, 1e10, 3),
            "epochs": np.array([1, 4, 8, 16, 32, 64]),
        },
        ("A", "B", "E", "alpha", "beta"),
    ),
    "routed": (
        REFIT_HASH,
        {"active_parameters": np.geomspace(15e6, 1.3e9, 5), "num_experts": 2.0 ** np.arange(10)},
        (),
    ),
    "granular": (
        KRAJEWSKI,
        {
            "total_parameters": np.geomspace(129e6, 3.7e9, 4),
            "tokens": np.geomspace(4e9, 130e9, 4),
            "granularity": np.array([1, 2, 4, 8, 16]),
        },
        (),
    ),
    "sparse": (
        ABNAR,
        {
            "total_parameters": np.geomspace(5e7, 2e10, 4),
            "tokens": np.geomspace(1e9, 100e9, 4),
            "sparsity": np.array([0, 0.5, 0.75, 0.9, 0.95]),
        },
        (),
    ),
}


def planted(name: str, *, noise: float = NOISE, num_seeds: int = 2, seed: int = 0):
    """Synthetic runs of a published law over its grid, and that law."""
    published, grid, _ = GRIDS[name]
    mesh = np.meshgrid(*grid.values(), indexing="ij")
    columns = {key: np.repeat(values.ravel(), num_seeds).astype(float) for key, values in zip(grid, mesh, strict=True)}
    if "epochs" in columns:
        columns["tokens"] = columns["unique_tokens"] * columns.pop("epochs")
    loss = published.loss(**columns)
    noisy = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(loss.shape))
    return published.law, observe(noisy, **columns)


@pytest.mark.parametrize("name", GRIDS)
def test_planted_constants_lie_in_their_intervals(name):
    law, runs = planted(name, seed=1)
    held = {constant: getattr(law, constant) for constant in GRIDS[name][2]}
    found = fit(type(law), runs, FitConfig(replicates=40, polished=6), fixed=held)
    assert set(found.intervals) | set(held) == set(law.constants())
    # 40 replicates, so the ends are widened by a tenth of their distance
    for constant, (low, high) in found.intervals.items():
        assert low - 0.1 * (high - low) <= getattr(law, constant) <= high + 0.1 * (high - low), constant
        assert low < getattr(found.law, constant) < high
    assert found.rms == pytest.approx(NOISE, rel=0.25)
    truth = law.loss(**runs.variables)
    said = found.predict(**runs.variables)
    assert np.abs(said.loss / truth - 1).max() < 2 * NOISE
    assert np.mean((said.low <= truth) & (truth <= said.high)) > 0.8
    assert not said.outside.any()
    assert said.warning is None


@pytest.mark.parametrize("name", ["chinchilla", "routed", "granular"])
def test_without_noise_the_constants_come_back_to_six_digits(name):
    law, runs = planted(name, noise=0.0, num_seeds=1)
    found = fit(type(law), runs, FitConfig(replicates=0, polished=4, held_out=0.0))
    for constant in law.constants():
        assert getattr(found.law, constant) == pytest.approx(getattr(law, constant), rel=1e-6), constant
    assert found.rms < 1e-9


def test_runs_that_went_wrong_hardly_move_the_fit():
    """The Huber loss against least squares with one run in twelve 10 % too high."""
    law, runs = planted("chinchilla")
    loss = runs.loss.copy()
    loss[::12] *= 1.1
    spoiled = dataclasses.replace(runs, loss=loss)
    config = FitConfig(replicates=0, polished=4, held_out=0.0)
    robust = fit(Chinchilla, spoiled, config)
    squares = fit(Chinchilla, spoiled, dataclasses.replace(config, delta=math.inf))
    truth = law.loss(**runs.variables)
    error = [np.mean(np.abs(found.law.loss(**runs.variables) / truth - 1)) for found in (robust, squares)]
    assert error[0] < 0.0015
    assert error[1] > 4 * error[0]


def test_gradients_are_exact():
    from gpt4moe.analysis.scaling.fitting import _Problem

    for name in GRIDS:
        law, runs = planted(name, num_seeds=1)
        problem = _Problem(type(law), tuple(law.constants()), {}, runs, 1e-3)
        point = np.array(
            [math.log(getattr(law, key)) if meta["log"] else getattr(law, key) for key, meta in law.constants().items()]
        )
        step = 1e-6 * np.eye(len(point))
        differences = (problem.errors(point + step) - problem.errors(point - step)).T / 2e-6
        assert problem.jacobian(point) == pytest.approx(differences, rel=1e-5, abs=1e-7), name
        # of the Huber loss too, at a point where some errors are beyond its turn and others are not
        near = point * (1 + 2e-4)
        turned = np.mean(np.abs(problem.errors(near[None])) > problem.delta)
        assert 0.05 < turned < 0.95, name
        rise = [problem.value_and_gradient(near + d)[0] - problem.value_and_gradient(near - d)[0] for d in step]
        assert problem.value_and_gradient(near)[1] == pytest.approx(np.array(rise) / 2e-6, rel=1e-3, abs=1e-6), name


def test_seeds_of_a_cell_are_resampled_together():
    """Forty seeds of a cell that agree with each other are no more runs than one: the interval must not shrink."""
    law, runs = planted("chinchilla", num_seeds=1)
    config = FitConfig(replicates=40, polished=3, held_out=0.0)
    copied = observe(np.repeat(runs.loss, 40), **{key: np.repeat(x, 40) for key, x in runs.variables.items()})
    widths = []
    for seen in (runs, copied, dataclasses.replace(copied, cells=np.arange(len(copied)))):
        low, high = fit(type(law), seen, config).intervals["alpha"]
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0], rel=0.05)
    assert widths[2] < 0.4 * widths[0]


def test_intervals_of_five_cells_are_wide_enough():
    """A mean of five normal numbers: percentiles of the bootstrap hold it four times in five, widened ones 19 in 20."""
    config = FitConfig(delta=math.inf, replicates=100, polished=1, held_out=0.0)
    rest = {"A": 1e-9, "B": 1e-9, "alpha": 1.0, "beta": 1.0}
    held = {"widened": [], "percentiles": []}
    for seed in range(80):
        losses = 2.0 * np.exp(0.01 * np.random.default_rng(seed).standard_normal(5))
        runs = observe(losses, active_parameters=np.arange(1e6, 6e6, 1e6), tokens=np.full(5, 1e9))
        found = fit(Chinchilla, runs, config, fixed=rest)
        for name, (low, high) in {
            "widened": found.intervals["E"],
            "percentiles": np.percentile(found.resampled.E, [2.5, 97.5]),
        }.items():
            held[name].append(low <= 2.0 <= high)
        said = found.predict(active_parameters=1e6, tokens=1e9)
        assert [said.low, said.high] == pytest.approx(found.intervals["E"], rel=1e-4)
    assert np.mean(held["widened"]) > 0.9
    assert np.mean(held["percentiles"]) < 0.88


def test_held_out_runs_are_those_of_the_most_compute_and_no_part_of_the_fit():
    _, runs = planted("chinchilla")
    config = FitConfig(replicates=0, polished=3, held_out=0.25)
    clean = fit(Chinchilla, runs, config)
    assert clean.held_out.error < 1.5 * NOISE
    largest = runs.compute >= np.sort(runs.compute)[-clean.held_out.num_runs]
    assert 0.2 * len(runs) <= largest.sum() == clean.held_out.num_runs <= 0.3 * len(runs)
    broken = fit(Chinchilla, dataclasses.replace(runs, loss=runs.loss * np.where(largest, 1.2, 1.0)), config)
    assert broken.held_out.bias == pytest.approx(clean.held_out.bias + math.log(1.2), abs=1e-4)
    assert fit(Chinchilla, dataclasses.replace(runs, compute=None), config).held_out is None


def test_the_same_seed_gives_the_same_fit():
    law, runs = planted("routed")
    first, second, other = (
        fit(type(law), runs, FitConfig(replicates=5, polished=2, held_out=0.0, seed=seed)) for seed in (3, 3, 4)
    )
    assert first.law == second.law
    assert first.intervals == second.intervals != other.intervals


def test_outside_of_the_runs_a_prediction_says_so():
    _, runs = planted("chinchilla")
    found = fit(Chinchilla, runs, FitConfig(replicates=20, polished=3, held_out=0.0))
    said = found.predict(active_parameters=np.array([1e9, 277e9]), tokens=np.array([[1e10], [13e12]]))
    assert said.outside.tolist() == [[False, True], [True, True]]
    assert "tokens 1e+10 .. 1.3e+13 (fitted on 2e+09 .. 5e+11)" in said.warning
    assert said.loss.shape == said.low.shape == (2, 2)
    assert np.all((said.low < said.loss) & (said.loss < said.high))
    # relative to the loss, the band widens where nothing was seen
    width = (said.high - said.low) / said.loss
    assert width[1, 1] > 3 * width[0, 0]


def test_a_constant_that_the_runs_do_not_limit_is_finite_and_says_so():
    """Eight experts at most: where they saturate is anybody's guess, but not below what the runs show."""
    sizes, experts = (np.repeat(mesh.ravel(), 2) for mesh in np.meshgrid(np.geomspace(1e7, 1e9, 5), [1, 2, 4, 8]))
    loss = REFIT_HASH.loss(active_parameters=sizes, num_experts=experts)
    noisy = loss * np.exp(NOISE * np.random.default_rng(0).standard_normal(loss.shape))
    runs = observe(noisy, active_parameters=sizes, num_experts=experts)
    found = fit(type(REFIT_HASH.law), runs, FitConfig(replicates=40, polished=3, held_out=0.0))
    low, high = found.intervals["E_max"]
    assert low < REFIT_HASH.law.E_max < 1e15 < high < math.inf
    assert np.isfinite(found.predict(active_parameters=1e8, num_experts=64).high)


def test_what_cannot_be_fitted_is_refused():
    _, runs = planted("chinchilla")
    with pytest.raises(CallerError, match="must be those of Routed"):
        fit(type(REFIT_HASH.law), runs)
    with pytest.raises(CallerError, match="more cells than 5 constants"):
        fit(Chinchilla, runs.take(np.arange(10)))
    with pytest.raises(CallerError, match=r"fixed=\['gamma'\]"):
        fit(Chinchilla, runs, fixed={"gamma": 1.0})
    with pytest.raises(CallerError, match=r"loss=.*finite"):
        observe([2.0, math.nan], active_parameters=[1, 2], tokens=[1, 2])
    with pytest.raises(CallerError, match=r"tokens=.*2 entries"):
        observe([2.0, 2.1], active_parameters=[1, 2], tokens=[1, 2, 3])
