"""The training step: accumulation, the batch ramp, skipping, layouts."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4moe.config.rules import ShardingRules
from gpt4moe.model import router
from gpt4moe.parallel import sharding
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.train import feed, state, step
from gpt4moe.types import Batch
from tests.train import tiny

ROWS = 16


@functools.cache
def compiled(microbatch_rows: int, mesh: tuple):
    """(jitted step, abstract state, abstract microbatches) of a 16-row batch in pieces of `microbatch_rows`."""
    train = {"batch_tokens": ROWS * tiny.LENGTH, "microbatch_rows": microbatch_rows}
    run = tiny.run_config(pathlib.Path("unused"), mesh=mesh, **train)
    layout, rules = make_mesh(run.mesh), ShardingRules()
    abstract = state.abstract_state(run, layout)
    batch = feed.abstract_microbatches(run, sharding.batch_sharding(layout, rules))
    return step.make_step(run, 2, abstract), abstract, batch


@functools.cache
def start():
    """The initial state on the host."""
    run = tiny.run_config(pathlib.Path("unused"))
    return jax.device_get(state.create_state(run, state.abstract_state(run, make_mesh(run.mesh))))


def cut(batch: Batch, rows: int) -> list[Batch]:
    count = len(batch.tokens) // rows
    return [jax.tree.map(lambda x, i=i: x[i * rows : (i + 1) * rows], batch) for i in range(count)]


def take(batches: list[Batch], microbatch_rows: int, mesh: tuple = ()):
    """State and metrics after a step on each of `batches`, from the same start."""
    train_step, abstract_state, abstract = compiled(microbatch_rows, mesh)
    at = jax.device_put(start(), state.shardings_of(abstract_state))
    history, tokens = [], 0
    for batch in batches:
        drawn = feed.draw(iter(cut(batch, microbatch_rows)), batch.tokens.size, abstract)
        at, metrics = train_step(at, drawn.microbatches, jnp.int32(drawn.num_microbatches), jnp.float32(tokens))
        history.append(jax.device_get(metrics))
        tokens += drawn.tokens
    return jax.device_get(at), history


def assert_same_training(actual, expected, tolerance):
    (at, metrics), (other, other_metrics) = actual, expected
    moments = jax.tree.leaves((at.params, at.opt_state)), jax.tree.leaves((other.params, other.opt_state))
    for a, b in zip(*moments, strict=True):
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-6)
    for a, b in zip(metrics, other_metrics, strict=True):
        np.testing.assert_allclose(a.sums.cross_entropy, b.sums.cross_entropy, rtol=tolerance)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=tolerance)
        np.testing.assert_array_equal(a.sums.moe.load_E.sum(-1), b.sums.moe.load_E.sum(-1))


@pytest.mark.parametrize("microbatch_rows", [2, 8])
def test_a_batch_in_pieces_trains_like_the_whole(microbatch_rows):
    batches = [tiny.random_batch(ROWS, seed=seed) for seed in range(3)]
    assert_same_training(take(batches, microbatch_rows), take(batches, ROWS), 1e-5)


@pytest.mark.parametrize("mesh", [(("fsdp", 4), ("expert", 2)), (("data", 2), ("expert", 2), ("tensor", 2))])
def test_layouts_train_like_one_device(mesh):
    batches = [tiny.random_batch(ROWS, seed=seed) for seed in range(2)]
    assert_same_training(take(batches, 8, mesh), take(batches, ROWS), 1e-5)


def test_zero1_divides_the_moments_and_gives_every_gradient_its_place():
    """Each of eight replicas holds an eighth of what divides by 8, and XLA is told where every gradient goes."""
    run = tiny.run_config(pathlib.Path("unused"), batch_tokens=ROWS * tiny.LENGTH, mesh=(("data", 8),))
    divided = dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, zero1=True))
    mesh = make_mesh(run.mesh)
    abstract = state.abstract_state(divided, mesh)
    moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(abstract.params))
    assert {leaf.size / np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in moments} == {8}
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(abstract.params))
    lowered = (step.lower_step(each, 2, state.abstract_state(each, mesh)) for each in (run, divided))
    plain, told = (each.as_text().count("sharding_constraint") for each in lowered)
    assert told - plain == len(jax.tree.leaves(abstract.params))


def test_a_growing_batch_compiles_once():
    batches = [tiny.random_batch(rows) for rows in (2, 2, 6, 16, 16, 4)]
    take(batches, 2)
    assert compiled(2, ())[0]._cache_size() == 1


def test_unused_room_is_not_trained_on():
    """A 4-row batch in a program with room for 16 rows is a 4-row batch."""
    short = tiny.random_batch(4)
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros((12, *x.shape[1:]), x.dtype)]), short)
    assert_same_training(take([short], 2), take([padded], ROWS), 1e-5)


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    good, bad = tiny.random_batch(ROWS), tiny.random_batch(ROWS, seed=1)
    weights = bad.loss_weights.copy()
    weights[0, 0] = np.nan
    poisoned = Batch(**vars(bad) | {"loss_weights": weights})
    at, metrics = take([good, poisoned, poisoned, good], ROWS)
    assert [int(m.skipped_in_row) for m in metrics] == [0, 1, 2, 0]
    assert int(at.skipped_steps) == 2 and int(at.step) == 4
    before, _ = take([good], ROWS)
    skipped, _ = take([good, poisoned, poisoned], ROWS)
    for a, b in zip(
        jax.tree.leaves((before.params, before.opt_state)),
        jax.tree.leaves((skipped.params, skipped.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(at.params))


def test_what_a_router_draws_is_of_its_step_microbatch_layer_and_row():
    train = {"batch_tokens": 4 * tiny.LENGTH, "microbatch_rows": 2, "record_routing": True}
    model = dataclasses.replace(tiny.MODEL, moe=dataclasses.replace(tiny.MODEL.moe, router=drawn_at_random))
    run = tiny.run_config(pathlib.Path("unused"), model=model, **train)
    mesh = make_mesh(run.mesh)
    abstract = state.abstract_state(run, mesh)
    batch = feed.abstract_microbatches(run, sharding.batch_sharding(mesh, run.rules))
    full = dataclasses.replace(tiny.random_batch(4), segment_ids=np.ones((4, tiny.LENGTH), np.int32))
    train_step, at, choices = step.make_step(run, 2, abstract), state.create_state(run, abstract), []
    for tokens in (0, full.tokens.size):
        drawn = feed.draw(iter(cut(full, 2)), full.tokens.size, batch)
        at, metrics = train_step(at, drawn.microbatches, jnp.int32(2), jnp.float32(tokens))
        choices.append(jax.device_get(metrics.sums.moe.choices.expert_ids_BTK))
    ids = np.concatenate(choices).reshape(-1, 2 * tiny.LENGTH)
    assert len(ids) == 2 * 2 * 2 * 2 and (ids >= 0).all()
    assert len(np.unique(ids, axis=0)) == len(ids)


def drawn_at_random(logits_UE, inputs, config):
    return router.top_k(jax.random.normal(inputs.key, logits_UE.shape) + 0 * logits_UE, inputs, config)


def test_training_learns_a_batch_by_heart():
    _, metrics = take([tiny.random_batch(ROWS)] * 30, ROWS)
    losses = [m.sums.cross_entropy / m.counts.target_weight for m in metrics]
    assert losses[0] == pytest.approx(np.log(tiny.VOCAB), rel=0.25) and losses[-1] < 0.9 * losses[0]
