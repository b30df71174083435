"""Experts made of a dense model, through its checkpoint: the same output before the first step, whatever is chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from gpt4moe.config.check import CallerError
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.variants import variant
from gpt4moe.infer import trained
from gpt4moe.model import routers
from gpt4moe.train import beginning, loop
from gpt4moe.train.state import model_definition, run_layout
from tests.model.slow import relative_difference
from tests.train import tiny

MOE = dataclasses.replace(tiny.MODEL.moe, num_experts=4, experts_per_token=2, hidden_dim=32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    tiny.write_corpus(directory)
    return directory


def run_of(corpus, moe, **train):
    return tiny.run_config(corpus, model=dataclasses.replace(tiny.MODEL, moe=moe), **train)


@pytest.fixture(scope="module")
def dense(corpus, tmp_path_factory):
    """(work directory, hidden states of a batch) of a dense model of twice the width of an expert, after two steps."""
    run = run_of(corpus, variant(MOE, compare="dense_active"), steps=2, checkpoint_every=2)
    workdir = tmp_path_factory.mktemp("dense") / "run"
    loop.train(run, workdir, config_text="", show_progress=False)
    return workdir, forward(trained.restore(run, workdir).model)[0]


def forward(model):
    batch = tiny.random_batch(4)
    x_BTD, out = jax.jit(lambda b: model(b.tokens, b.positions, b.segment_ids, with_choices=True))(batch)
    return np.asarray(x_BTD), out


def begin(run, workdir):
    return beginning.begin(run, epath.Path(workdir), "", allow_change=False, progress=None)


@pytest.mark.parametrize(
    ("changes", "mesh"),
    [
        ({"hidden_dim": 64}, ()),  # copies
        ({"hidden_dim": 64, "experts_per_token": 3, "num_experts": 5}, ()),
        ({}, ()),  # two halves, each twice
        ({"router": routers.sigmoid_top_k}, ()),
        ({}, (("stage", 2), ("expert", 2), ("data", 2))),
        ({"hidden_dim": 16, "num_experts": 12, "experts_per_token": 8}, ()),  # four quarters, each three times
    ],
)
def test_the_first_output_is_the_dense_models(corpus, dense, tmp_path, changes, mesh):
    workdir, want_BTD = dense
    run = run_of(corpus, dataclasses.replace(MOE, **changes), init_from=str(workdir), batch_tokens=4 * tiny.LENGTH)
    start = begin(dataclasses.replace(run, mesh=MeshConfig(mesh)), tmp_path / "moe")
    state = beginning.first_position(start).state
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(lambda leaf: leaf.shape, start.abstract)
    model = nnx.merge(model_definition(run.model, run_layout(start.run, start.mesh)), state.params)
    if mesh:
        x_BTD, _ = jax.jit(lambda b: model(b.tokens, b.positions, b.segment_ids))(tiny.random_batch(4))
        assert relative_difference(np.asarray(x_BTD), want_BTD) < 1e-5
        return
    got_BTD, out = forward(model)
    assert relative_difference(got_BTD, want_BTD) < 1e-5
    slices = 64 // run.model.moe.hidden_dim
    ids = np.asarray(out.moe.choices.expert_ids_BTK)
    routed = ids[ids.min(-1) >= 0] % slices  # every token takes each slice equally often, and not always one replica
    assert all((np.sum(routed == s, axis=-1) == run.model.moe.experts_per_token // slices).all() for s in range(slices))
    assert len(np.unique(ids)) > run.model.moe.experts_per_token


def test_upcycled_experts_train_apart(corpus, dense, tmp_path, capsys):
    run = run_of(corpus, MOE, init_from=str(dense[0]), steps=2, checkpoint_every=2)
    loop.train(run, tmp_path / "moe", config_text="")
    assert "its feed-forward of 64 as 4 experts" in capsys.readouterr().err
    up = trained.restore(run, tmp_path / "moe").model.blocks.moe.experts.up[...]
    assert relative_difference(up[:, 0], up[:, 2]) > 1e-4  # two replicas of one slice


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 48}, "hidden_dim=48 must divide the dense model's hidden_dim (64)"),
        ({"num_experts": 5}, "num_experts=5 must be a multiple of the slices (2)"),
        ({"experts_per_token": 3}, "experts_per_token=3 must be a multiple"),
        ({"normalize_gates": False}, "normalize_gates=False gives gates that do not sum to 1"),
        ({"gate_scale": 2.5}, "gate_scale=2.5 gives gates that do not sum to 1"),
        ({"router": routers.noisy_top_k}, "router='noisy_top_k' need not choose whole replicas of the 2 slices"),
        (
            {"router": routers.expert_choice, "hidden_dim": 64, "load_balance_weight": 0.0},
            "router='expert_choice' gives gates that do not sum to 1",
        ),
        ({"shared_hidden_dim": 8}, "shared_expert.down is missing"),
    ],
)
def test_what_does_not_fit_is_refused(corpus, dense, tmp_path, changes, message):
    run = run_of(corpus, dataclasses.replace(MOE, **changes), init_from=str(dense[0]))
    with pytest.raises(CallerError) as raised:
        begin(run, tmp_path / "refused")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "refused").exists()


def test_a_mixture_still_starts_from_a_mixture(corpus, dense, tmp_path):
    moe_run = run_of(corpus, MOE, steps=1, checkpoint_every=1)
    loop.train(moe_run, tmp_path / "first", config_text="", show_progress=False)
    again = run_of(corpus, MOE, init_from=str(tmp_path / "first"))
    state = beginning.first_position(begin(again, tmp_path / "again")).state
    want = nnx.split(trained.restore(moe_run, tmp_path / "first").model)[1]
    assert relative_difference(state.params, want) == 0
