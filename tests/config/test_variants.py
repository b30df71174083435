"""Finer experts and dense layers cost what the layer they are compared with costs, but for the router."""

import dataclasses

import pytest

from gpt4moe.accounting import flops, parameters
from gpt4moe.config.check import CallerError
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.variants import variant
from gpt4moe.configure import build_model

MOE = MoeConfig(8, 2, 96, shared_hidden_dim=32, bias_rate=0.1, num_groups=2, groups_per_token=2, gate_scale=2.0)
BASE = build_model(["gin_configs/model/small.gin"])


def model(moe):
    return dataclasses.replace(BASE, moe=moe)


def without_router(moe):
    """(parameters, forward FLOPs of a token) of a model with these layers, but for the router's."""
    counted = parameters.count(model(moe))
    return counted.total - counted.router, flops.forward_flops_per_token(model(moe)) - 2 * counted.router


@pytest.mark.parametrize("granularity", [1, 2, 3, 8])
def test_finer_experts_cost_the_same(granularity):
    finer = variant(MOE, granularity=granularity)
    assert without_router(finer) == without_router(MOE)
    assert (finer.num_experts, finer.experts_per_token) == (8 * granularity, 2 * granularity)
    assert parameters.count(model(finer)).router >= granularity * parameters.count(model(MOE)).router * 0.9


def test_dense_layers_cost_the_same():
    active, total = variant(MOE, compare="dense_active"), variant(MOE, compare="dense_total")
    assert without_router(active)[1] == without_router(MOE)[1]
    assert without_router(total)[0] == without_router(MOE)[0]
    assert active.num_experts == total.num_experts == 1
    assert active.load_balance_weight == active.router_z_weight == 0


@pytest.mark.parametrize("path", ["tiny", "small", "medium", "gpt4_1p8t", "gpt4_1p8b"])
def test_every_model_file_has_both_macros(path):
    files = [f"gin_configs/model/{path}.gin"]
    base, finer = build_model(files), build_model(files, ["GRANULARITY=2"])
    dense = build_model(files, ["COMPARE='dense_active'"])
    assert finer.moe == variant(base.moe, granularity=2)
    assert dense.moe == variant(base.moe, compare="dense_active")


@pytest.mark.parametrize("settings", [{"granularity": 5}, {"granularity": 0}, {"compare": "dense"}])
def test_mistakes_are_refused(settings):
    with pytest.raises(CallerError):
        variant(MOE, **settings)
