"""What is frozen stays, costs nothing and counts nowhere; what is trained trains as ever, or at a rate of its own."""

import dataclasses
import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from gpt4moe import checkpoint, launch
from gpt4moe.accounting import parameters
from gpt4moe.config.check import CallerError
from gpt4moe.config.optimizer import OptimizerConfig
from gpt4moe.configure import build_run
from gpt4moe.parallel import sharding
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.train import beginning, feed, loop, optimizer, resume, state, step, trainable
from tests.train import tiny
from tests.train.test_optimizer import parameter
from tests.train.test_step import cut

ROWS, PIECE = 8, 4
ADAPTED = ("*", "!blocks.attention.*", "!final_norm.*")
ROUTED = ("blocks.attention.*", "blocks.moe.router")
EXPERTS = {"blocks.moe.experts.*": 0.5}
MODEL = dataclasses.replace(tiny.MODEL, moe=dataclasses.replace(tiny.MODEL.moe, bias_rate=0.01))


def run_of(mesh=(), zero1=False, **settings):
    run = tiny.run_config(
        pathlib.Path("unused"), mesh=mesh, model=MODEL, batch_tokens=ROWS * tiny.LENGTH, microbatch_rows=PIECE
    )
    optimizer = dataclasses.replace(run.optimizer, **settings)
    return dataclasses.replace(run, optimizer=optimizer, mesh=dataclasses.replace(run.mesh, zero1=zero1))


@functools.cache
def start():
    run = run_of()
    return jax.device_get(state.create_state(run, state.abstract_state(run, make_mesh(run.mesh))).params)


@functools.cache
def take(run, steps=1):
    """State and last metrics after so many steps, each on a batch of its own in two pieces, past the warm-up."""
    mesh = make_mesh(run.mesh)
    abstract = state.abstract_state(run, mesh)
    rows = feed.abstract_microbatches(run, sharding.batch_sharding(mesh, run.rules))
    train_step, at = step.make_step(run, 2, abstract), state.create_state(run, abstract)
    for seed in range(steps):
        drawn = feed.draw(iter(cut(tiny.random_batch(ROWS, seed=seed), PIECE)), ROWS * tiny.LENGTH, rows)
        at, metrics = train_step(at, drawn.microbatches, jnp.int32(drawn.num_microbatches), jnp.float32(1000 + seed))
    return jax.device_get((at, metrics))


def keep_gradients(learning_rate, config):
    """SGD whose state is the gradients it was given."""
    return optax.chain(optax.trace(0.0), optax.scale(-learning_rate))


def by_name(params):
    return dict(zip(trainable.names(params), jax.tree.leaves(params), strict=True))


def names_of_state(opt_state):
    """Names of the parameters that have moments."""
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(opt_state)]
    found = {path.partition(f".{kind}.")[2].removesuffix(".value") for path in paths for kind in ("mu", "nu", "trace")}
    return found - {""}


@pytest.mark.parametrize(
    ("frozen", "layout"),
    [
        (ROUTED, {}),
        (ADAPTED, {"mesh": (("data", 4), ("tensor", 2)), "zero1": True}),
        (ADAPTED, {"mesh": (("fsdp", 4), ("tensor", 2))}),
    ],
)
def test_what_is_frozen_stays_bit_for_bit_and_has_no_optimizer_state(frozen, layout):
    run = run_of(frozen=frozen, **layout)
    at, metrics = take(run, 3)
    before, after = by_name(start()), by_name(at.params)
    still = {name for name in before if not run.optimizer.trains(name)}
    assert still and names_of_state(at.opt_state) == before.keys() - still
    unmoved = {name for name in before if np.array_equal(before[name], after[name])}
    bias = {"blocks.moe.router_bias"}  # not frozen itself, but it belongs to a router that is
    assert unmoved == still | bias
    assert int(at.step) == 3 and int(metrics.skipped_steps) == 0
    norms = metrics.expert_grad_norm_LE
    assert norms.shape == (2, 4) and (norms > 0).all() == run.optimizer.trains("blocks.moe.experts.up")


def test_layouts_train_what_is_trained_alike():
    at, _ = take(run_of(frozen=ADAPTED, mesh=(("data", 4), ("tensor", 2)), zero1=True), 3)
    other, _ = take(run_of(frozen=ADAPTED, mesh=(("fsdp", 4), ("tensor", 2))), 3)
    for a, b in zip(jax.tree.leaves(at.params), jax.tree.leaves(other.params), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-8


def test_gradients_and_their_norm_are_those_of_the_whole_model_where_it_is_trained():
    settings = {"build": keep_gradients, "clip_norm": None}
    whole, _ = take(run_of(**settings))
    part, metrics = take(run_of(**settings, frozen=ADAPTED))
    gradients, of_all = by_name(part.opt_state[1][0].trace), by_name(whole.opt_state[1][0].trace)
    assert len(gradients) == 5 < len(of_all)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, of_all[name], rtol=1e-5, atol=1e-8)
    norm = np.sqrt(sum(np.sum(np.square(of_all[name])) for name in gradients))
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)


def test_no_product_is_made_for_the_gradient_of_what_is_frozen():
    runs = (tiny.with_train(run_of(frozen=frozen), microbatch_rows=ROWS) for frozen in ((), ("blocks.attention.*",)))
    texts = (step.lower_step(run, 2, state.abstract_state(run, make_mesh(run.mesh))).as_text() for run in runs)
    whole, less = (text.count("dot_general") for text in texts)
    assert whole - less == 4 * MODEL.num_layers  # query, key, value, output


def test_without_patterns_the_optimizer_state_is_where_it_was():
    assert names_of_state(state.initial_state(run_of()).opt_state) == by_name(start()).keys()
    config = run_of().optimizer
    params = {"a": parameter([0.0], "norm")}
    structures = [optimizer.make_optimizer(1.0, config).init(params), optimizer.adamw(1.0, config).init(params)]
    assert len(structures[0]) == 2 and jax.tree.structure(structures[0][1]) == jax.tree.structure(structures[1])


@pytest.mark.parametrize("factor", [0.5, 0.3])
def test_a_scaled_rate_is_adamw_at_that_rate_decay_included(factor):
    config = OptimizerConfig(0.1, weight_decay=0.2, rate_scales={"matrix": factor, "*": 1.0})
    draw = np.random.default_rng(0)
    matrix, scale = draw.normal(size=(2, 3)), draw.normal(size=3)
    params = {"matrix": parameter(matrix, "embed", "mlp"), "scale": parameter(scale, "norm")}
    grads = [jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), params) for _ in "abc"]

    def trained(config, rate):
        at, opt_state = params, optimizer.make_optimizer(rate, config).init(params)
        for each in grads:
            updates, opt_state = optimizer.make_optimizer(rate, config).update(each, opt_state, at)
            at = optax.apply_updates(at, updates)
        return at

    plain = dataclasses.replace(config, rate_scales=())
    got, slow, fast = trained(config, 0.1), trained(plain, 0.1 * factor), trained(plain, 0.1)
    np.testing.assert_allclose(got["matrix"][...], slow["matrix"][...], rtol=1e-6)
    np.testing.assert_array_equal(got["scale"][...], fast["scale"][...])
    assert np.abs(got["matrix"][...] - fast["matrix"][...]).max() > 0.01


def test_a_scaled_rate_reaches_the_parameters_of_a_step():
    got, slow = (
        by_name(take(run_of(rate_scales=EXPERTS))[0].params),
        by_name(take(run_of(learning_rate=5e-3))[0].params),
    )
    before = by_name(start())
    for name, value in got.items():
        times = 1 if "experts" in name else 0 if name == "blocks.moe.router_bias" else 2
        if times:
            change, half = value - before[name], slow[name] - before[name]
            rounding = 2e-7 * np.linalg.norm(before[name])
            assert np.linalg.norm(change - times * half) <= 1e-4 * np.linalg.norm(half) + rounding, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frozen": ["blocks"]}, "frozen='blocks' matches no parameter; did you mean blocks.*"),
        ({"frozen": ["*", "!final_norn.scale"]}, "matches no parameter; did you mean final_norm.scale"),
        ({"frozen": "zzz"}, "frozen='zzz' matches no parameter; there are blocks.*, embedding, final_norm.*"),
        ({"frozen": ["*"]}, "frozen=('*',) leaves nothing to train"),
        ({"frozen": ["!embedding"]}, "begins with an exception, of nothing"),
        ({"frozen": [3]}, "frozen=[3] must be text"),
        ({"rate_scales": {"embeding": 2}}, "rate_scales='embeding' matches no parameter; did you mean embedding?"),
        ({"rate_scales": {"*": 2, "embedding": 3}}, "rate_scales='embedding' scales nothing"),
        ({"rate_scales": {"embedding": 2}, "frozen": ["embedding"]}, "rate_scales='embedding' scales nothing"),
        ({"rate_scales": {"embedding": 0}}, "rate_scales['embedding']=0 must be a number above 0"),
        ({"rate_scales": ["embedding"]}, "must be a dict from patterns to factors"),
    ],
)  # fmt: skip
def test_a_pattern_that_fits_nothing_is_refused(settings, message):
    with pytest.raises(CallerError) as raised:
        run = run_of(**settings)
        state.abstract_state(run, make_mesh(run.mesh))
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(run, work directory) of a frozen run of 6 steps, checkpoints at 3 and 6."""
    corpus = tmp_path_factory.mktemp("corpus")
    tiny.write_corpus(corpus)
    run = tiny.run_config(corpus, steps=6, checkpoint_every=3, batch_tokens=4 * tiny.LENGTH)
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, frozen=ADAPTED))
    workdir = tmp_path_factory.mktemp("finished") / "run"
    loop.train(run, workdir, config_text="", show_progress=False)
    return run, workdir


def cut_short(workdir, elsewhere):
    shutil.copytree(workdir, elsewhere)
    shutil.rmtree(elsewhere / "checkpoints" / "6")
    return elsewhere


def with_frozen(run, frozen):
    return dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, frozen=frozen))


def test_a_frozen_run_goes_on_bit_for_bit(finished, tmp_path):
    run, workdir = finished
    again = cut_short(workdir, tmp_path / "again")
    loop.train(run, again, config_text="", show_progress=False)
    abstract = state.abstract_state(run, make_mesh(run.mesh))
    whole, resumed = (checkpoint.restore(each, 6, abstract) for each in (workdir, again))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    names = set(checkpoint.saved_names(workdir, 6))
    assert "params.embedding" in names and not any(name.endswith("mu.embedding") for name in names)


def test_freezing_otherwise_is_a_change_that_is_told_in_a_line(finished, tmp_path):
    run, workdir = finished
    abstract = state.abstract_state(run, make_mesh(run.mesh))
    for frozen in ((), ADAPTED[:2]):
        changed = with_frozen(run, frozen)
        with pytest.raises(CallerError, match=r"was trained with another configuration .optimizer.frozen: "):
            resume.saved_progress(changed, epath.Path(workdir), abstract, allow_change=False)
    with pytest.raises(CallerError) as raised:
        loop.train(with_frozen(run, ()), workdir, config_text="", show_progress=False, allow_config_change=True)
    trains = "frozen=[] trains blocks.attention_norm.scale and 6 more, of which the checkpoint has no optimizer state;"
    assert str(raised.value).startswith(trains) and "INIT_FROM" in str(raised.value)
    fewer = with_frozen(run, ADAPTED[:2])  # what is frozen now loses its moments
    again = epath.Path(cut_short(workdir, tmp_path / "fewer"))
    at = beginning.first_position(beginning.begin(fewer, again, "", allow_change=True, progress=None))
    assert at.step == 3 and "final_norm.scale" not in names_of_state(at.state.opt_state)


def test_the_macros_arrive_and_what_is_frozen_takes_no_memory(capsys):
    gin, overrides = ["gin_configs/run/tiny.gin"], ["FROZEN=['*', '!*.router']", "RATE_SCALES={'*.router': 0.1}"]
    run, text = build_run(gin, overrides)
    assert run.optimizer.frozen == ("*", "!*.router") and run.optimizer.rate_scales == (("*.router", 0.1),)
    assert "FROZEN = ['*', '!*.router']" in text and hash(run)
    plain, _ = build_run(gin)
    assert (plain.optimizer.frozen, plain.optimizer.rate_scales) == ((), ())
    flags = [f"--gin.{override}" for override in overrides]
    assert launch.main(["inspect", "--gin_file", gin[0], *flags, "--paths"]) == launch.DONE
    counted = parameters.count(run.model)
    table = capsys.readouterr().out
    assert f"{counted.router:,}  (" in table and "blocks.attention.query" in table
    assert trainable.count(run.model, run.optimizer) == counted.router
    assert launch.main(["inspect", "--gin_file", gin[0], "--gin.FROZEN=['rooter']"]) == launch.CALLER_MISTAKE
    assert "did you mean" in capsys.readouterr().err
