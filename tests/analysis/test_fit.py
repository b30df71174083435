"""Fits recover constants that were planted, with intervals that hold them, and say where they do not know."""

import dataclasses

import numpy as np
import pytest

from gpt4moe.analysis.scaling import fit as fitting
from gpt4moe.analysis.scaling import laws
from gpt4moe.config.check import CallerError


def design(*axes):
    return [column.ravel() for column in np.meshgrid(*axes, indexing="ij")]


PARAMETERS, TOKENS = np.geomspace(5e7, 5e9, 6), np.geomspace(1e9, 2e11, 6)
CASES = {
    "Chinchilla": (fitting.CHINCHILLA, laws.EPOCH, design(PARAMETERS, TOKENS)),
    "data-constrained": (
        fitting.data_constrained(),
        laws.MUENNIGHOFF,
        design(np.geomspace(1e8, 2e10, 5), np.geomspace(1e9, 3e11, 6), [1e9, 1e10]),
    ),
    "routed": (
        fitting.ROUTED,
        laws.CLARK_REFIT["s_base"],
        design(np.geomspace(1.5e7, 1.3e9, 6), [1, 2, 4, 8, 32, 128, 512]),
    ),
    "fine-grained": (fitting.FINE_GRAINED, laws.KRAJEWSKI, design(PARAMETERS, TOKENS[::2], [1, 2, 4, 8, 16])),
}


def constants_of(law, form):
    return {constant.name: getattr(law, constant.name) for constant in form.constants}


@pytest.mark.parametrize("name", CASES)
def test_planted_constants_are_found_without_noise(name):
    form, law, columns = CASES[name]
    found = fitting.fit(form, dict(zip(form.variables, columns, strict=True)), law.loss(*columns), num_resampled=0)
    for constant, value in constants_of(law, form).items():
        assert getattr(found.law, constant) == pytest.approx(value, rel=2e-2), constant
    assert np.abs(found.residuals).max() < 1e-5


@pytest.mark.parametrize("name", ["Chinchilla", "routed"])
def test_intervals_hold_the_planted_constants(name):
    """Over four draws of the noise: intervals of 95 % from resampling are a little narrow, but not much."""
    form, law, columns = CASES[name]
    variables, truth = dict(zip(form.variables, columns, strict=True)), law.loss(*columns)
    of_constants, of_losses = [], []
    for seed in range(4):
        noisy = truth * np.exp(np.random.default_rng(seed).normal(0, 5e-4, truth.shape))
        found = fitting.fit(form, variables, noisy, num_resampled=40)
        planted = constants_of(law, form)
        of_constants += [low <= planted[key] <= high for key, (low, high) in found.intervals.items()]
        said = found.predict(**variables)
        of_losses.append(np.mean((said.low <= truth) & (truth <= said.high)))
        assert (np.abs(said.loss / truth - 1) < 2e-3).all()
    assert np.mean(of_constants) > 0.8
    assert np.mean(of_losses) > 0.8


def test_a_sparse_law_predicts_though_its_constants_trade_off():
    columns = design(np.geomspace(1e8, 2e10, 5), np.geomspace(1e9, 1e11, 4), [0, 0.5, 0.75, 0.9, 0.95])
    variables = dict(zip(fitting.SPARSE.variables, columns, strict=True))
    found = fitting.fit(fitting.SPARSE, variables, laws.ABNAR.loss(*columns), num_resampled=0)
    assert np.abs(found.residuals).max() < 2e-3


def test_what_was_held_out_is_judged_by_a_fit_that_has_not_seen_it():
    form, law, columns = CASES["Chinchilla"]
    variables = dict(zip(form.variables, columns, strict=True))
    apart = columns[0] * columns[1] > np.quantile(columns[0] * columns[1], 0.8)
    losses = law.loss(*columns)
    honest = fitting.fit(form, variables, losses, hold_out=apart, num_resampled=0)
    assert honest.held_out_error < 1e-4
    broken = np.where(apart, losses * 1.05, losses)
    assert fitting.fit(form, variables, broken, hold_out=apart, num_resampled=0).held_out_error == pytest.approx(
        np.log(1.05), rel=2e-2
    )


def test_extrapolation_is_told():
    form, law, columns = CASES["Chinchilla"]
    variables = dict(zip(form.variables, columns, strict=True))
    found = fitting.fit(form, variables, law.loss(*columns), num_resampled=0)
    said = found.predict(parameters=np.array([1e8, 1e12]), tokens=1e10)
    assert said.extrapolates.tolist() == [False, True]


def test_seeds_of_a_cell_are_drawn_together():
    """Five cells of three equal seeds: cells drawn apart would give a narrower interval than there is."""
    form, law, columns = CASES["Chinchilla"]
    few = [column[::4] for column in columns]
    draw = np.random.default_rng(0)
    once = law.loss(*few) * np.exp(draw.normal(0, 2e-3, few[0].shape))
    thrice = {name: np.repeat(column, 3) for name, column in zip(form.variables, few, strict=True)}
    cells = np.repeat(np.arange(len(once)), 3).tolist()
    widths = [
        np.ptp(fitting.fit(form, thrice, np.repeat(once, 3), cells=given, num_resampled=40).intervals["alpha"])
        for given in (cells, None)
    ]
    assert widths[0] > 1.2 * widths[1]


def test_too_few_runs_and_wrong_variables_are_refused():
    with pytest.raises(CallerError, match="more than the law's 5 constants"):
        fitting.fit(fitting.CHINCHILLA, {"parameters": [1e8] * 5, "tokens": [1e9] * 5}, [3.0] * 5)
    with pytest.raises(CallerError, match="must be those of the law"):
        fitting.fit(fitting.CHINCHILLA, {"size": [1.0]}, [3.0])


def test_the_same_seed_gives_the_same_fit():
    form, law, columns = CASES["routed"]
    variables = dict(zip(form.variables, columns, strict=True))
    first, again = (fitting.fit(form, variables, law.loss(*columns), num_resampled=3, seed=5) for _ in range(2))
    assert dataclasses.asdict(first.law) == dataclasses.asdict(again.law) and first.intervals == again.intervals
