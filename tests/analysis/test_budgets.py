"""Budgets of compute: parabolas over sizes that were planted, their minima, and how sure of them the figure is."""

import math
import random

import numpy as np
import pytest

from gpt4moe.analysis.sweeps.budgets import families
from gpt4moe.analysis.sweeps.isoflop import isoflop_plots
from gpt4moe.analysis.sweeps.table import make_sweep, read_sweep
from tests.analysis.sweep_folder import write_sweep

BUDGETS, WIDTHS = (1e12, 3e12, 1e13), (96, 128, 160, 192, 256, 384)


def parabola(point, seed):
    """The best size grows as C^0.5 from 250k at 1e12 FLOPs; each budget a parabola over ln N."""
    size, flops = point["WIDTH"] ** 2 * 12, point["BUDGET"]
    off = math.log(size / (250_000 * (flops / 1e12) ** 0.5))
    loss = 3 + (1e12 / flops) ** 0.1 + 0.05 * off**2 + random.Random(f"{point} {seed}").gauss(0, 1e-3)
    return {"held_out_loss": loss, "active_parameters": size, "tokens": round(flops / 6 / size)}


@pytest.fixture(scope="module")
def isoflop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("isoflop")
    axes = {"BUDGET": (1e12, 3e12, 1e13), "WIDTH": (96, 128, 192, 256, 384)}
    write_sweep(folder, axes, parabola, seeds=2, steps=6)
    return read_sweep(folder)


def test_minima_of_planted_parabolas_are_found(isoflop):
    (family,) = families(isoflop)
    found = family.budgets
    assert len(found) == 3 and family.scatter.of_seeds
    for budget, flops in zip(found, (1e12, 3e12, 1e13), strict=True):
        best = 250_000 * (flops / 1e12) ** 0.5
        assert abs(math.log(budget.best / best)) < 0.03 and budget.inside
        assert budget.interval[0] < best < budget.interval[1]
        assert abs(math.log(budget.tokens * 6 * best / flops)) < 0.04
        assert abs(budget.loss - 3 - (1e12 / flops) ** 0.1) < 2e-3
    (plot,) = isoflop_plots(isoflop)
    facts = plot.facts["all runs"]
    assert abs(facts["parameters"]["exponent"] - 0.5) < 0.03
    assert abs(facts["tokens"]["exponent"] - 0.5) < 0.03
    for kind in ("parameters", "tokens"):
        low, high = facts[kind]["interval"]
        assert low < 0.5 < high and 0.001 < high - low < 0.1


def rows_of(draw, *, seeds, noise=1e-3, routers=("one",), best=250_000, seed_luck=0.0, following=False):
    """Runs of every budget, width, router and seed; the best size grows as C^0.5 from that of the router.

    following: sizes grow with it.
    """
    rows, luck = [], seed_luck * draw.standard_normal(seeds)
    for router in routers:
        for flops in BUDGETS:
            for width in WIDTHS:
                size = round(width**2 * 12 * ((flops / 1e12) ** 0.5 if following else 1))
                middle = best * (4.0 if router == "two" else 1.0) * (flops / 1e12) ** 0.5
                loss = 3 + (1e12 / flops) ** 0.1 + 0.05 * math.log(size / middle) ** 2
                for seed in range(seeds):
                    row = {"ROUTER": router, "BUDGET": flops, "WIDTH": width, "seed": seed, "state": "done"}
                    row |= {"held_out_loss": loss + noise * draw.standard_normal() + luck[seed]}
                    row |= {"active_parameters": size, "tokens": flops / 6 / size, "train_flops_per_token": 6 * size}
                    rows.append(row)
    return rows


@pytest.mark.parametrize("following", [False, True])
@pytest.mark.parametrize(("seeds", "seed_luck"), [(1, 0.0), (3, 0.05)])
def test_intervals_hold_what_was_planted_as_often_as_they_say(seeds, seed_luck, following):
    """The luck of a seed moves all runs of it alike, and no minimum.

    Where sizes follow the best, budgets that err alike would err in no exponent.
    """
    draw = np.random.default_rng(0)
    held = {"size": [], "exponent": []}
    for _ in range(100):
        rows = rows_of(draw, seeds=seeds, noise=4e-3, seed_luck=seed_luck, following=following)
        (family,) = families(make_sweep("", rows, {"axes": [["BUDGET"], ["WIDTH"]]}))
        assert family.scatter.of_seeds == (seeds > 1)
        for budget, flops in zip(family.budgets, BUDGETS, strict=True):
            low, high = budget.interval
            held["size"].append(low < 250_000 * (flops / 1e12) ** 0.5 < high)
        low, high = family.parameters.interval
        held["exponent"].append(low < 0.5 < high)
    assert 0.9 < np.mean(held["size"]) < 0.99
    assert 0.9 <= np.mean(held["exponent"]) <= 1


def test_budgets_of_two_routers_are_not_one():
    rows = rows_of(np.random.default_rng(0), seeds=1, routers=("one", "two"))
    sweep = make_sweep("", rows, {"axes": [["ROUTER"], ["BUDGET"], ["WIDTH"]]})
    one, two = families(sweep)
    assert (one.name, two.name) == ("one", "two")
    for family, best in ((one, 250_000), (two, 1_000_000)):
        assert family.budgets[0].best == pytest.approx(best, rel=0.1)
    (plot,) = isoflop_plots(sweep)
    assert [arm.label for arm in plot.arms][:2] == ["one, 1e+12 FLOPs", "one, 3e+12 FLOPs"]
    assert set(plot.facts) == {"one", "two"}


def test_a_minimum_beyond_the_sizes_is_no_part_of_the_power():
    sweep = make_sweep("", rows_of(np.random.default_rng(0), seeds=1, best=900_000), {"axes": [["BUDGET"], ["WIDTH"]]})
    (family,) = families(sweep)
    assert [budget.inside for budget in family.budgets] == [True, True, False]
    first, second = family.budgets[:2]
    apart = math.log(second.best / first.best) / math.log(second.flops / first.flops)
    assert family.parameters.exponent == pytest.approx(apart)
    (plot,) = isoflop_plots(sweep)
    assert (
        "outside of the sizes that were run and no part of the powers" in plot.caption
        and "C^0.46 and C^0.54" in plot.caption
    )


def test_without_a_curve_nothing_limits_the_minimum():
    draw = np.random.default_rng(0)
    rows = [row | {"held_out_loss": 3 + 0.01 * draw.standard_normal()} for row in rows_of(draw, seeds=1)]
    sweep = make_sweep("", rows, {"axes": [["BUDGET"], ["WIDTH"]]})
    (family,) = families(sweep)
    (plot,) = isoflop_plots(sweep)
    assert "nothing limits it" in plot.caption
    assert not any(math.isfinite(budget.interval[0]) for budget in family.budgets)
