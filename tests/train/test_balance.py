"""Balance of experts over rows, microbatches and whole batches, by its loss and by a bias, against loops."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt4moe.config.moe import MoeConfig
from gpt4moe.model import routers
from gpt4moe.model.moe import MoeOut
from gpt4moe.parallel import sharding
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.train import balance, evaluate, feed, state, step
from gpt4moe.train.state import model_definition
from tests.train import tiny

LAYERS, EXPERTS, ROWS, TOKENS = 2, 3, 4, 5
RATE = 0.01
# What biases have come to before the step: a decay of them would show, and they are no larger than differences between
# scores, so that tokens still choose differently.
BIAS_LE = np.array([[0.015, -0.01, 0.005, 0.0], [-0.005, 0.01, 0.0, 0.015]], np.float32)


def random_choices(seed):
    """(experts [L, B, T, K], probabilities [L, B, T, E], valid [B, T]) of one microbatch."""
    draw = np.random.default_rng(seed)
    probabilities = draw.dirichlet(np.ones(EXPERTS), (LAYERS, ROWS, TOKENS))
    ids = np.argsort(-draw.random(probabilities.shape) * [3, 1, 1], axis=-1)[..., :2]
    return ids, probabilities, draw.random((ROWS, TOKENS)) < 0.8


def load_of(ids, valid):
    return np.array([np.bincount(layer[valid].ravel(), minlength=EXPERTS) for layer in ids])


def report_of(ids, probabilities, valid):
    zeros = np.zeros(LAYERS)
    by_row = [loop([ids[:, [b]]], [probabilities[:, [b]]], [valid[[b]]]) for b in range(ROWS)]
    return MoeOut(
        load_E=jnp.array(load_of(ids, valid)),
        dropped=zeros,
        load_balance=jnp.array(by_row).sum(0),
        router_z=zeros,
        probability_E=jnp.array(probabilities[:, valid].sum(1)),
        router_entropy=zeros,
        largest_logit=zeros,
    )


def loop(ids, probabilities, valid):
    """E sum_e f_e P_e of each layer over all these microbatches' tokens, token by token."""
    losses = []
    for layer in range(LAYERS):
        counts, sums, tokens = np.zeros(EXPERTS), np.zeros(EXPERTS), 0
        for part_ids, part_probabilities, part_valid in zip(ids, probabilities, valid, strict=True):
            for b, t in np.argwhere(part_valid):
                tokens += 1
                sums += part_probabilities[layer, b, t]
                for expert in part_ids[layer, b, t]:
                    counts[expert] += 1
        losses.append(EXPERTS * (counts / max(counts.sum(), 1) * sums / max(tokens, 1)).sum())
    return np.array(losses)


def shares(scope, parts):
    """The losses that `train.balance` adds up over the microbatches of a batch."""
    config = MoeConfig(EXPERTS, 2, hidden_dim=1, load_balance_scope=scope)
    tokens = sum(valid.sum() for *_, valid in parts)
    rows = sum(valid.any(1).sum() for *_, valid in parts)
    total, so_far = np.zeros(LAYERS), None
    for part in parts:
        report = report_of(*part)
        total = total + balance.load_balance(report, config, jnp.float32(rows), jnp.float32(tokens), so_far)
        so_far = report.load_E if so_far is None else so_far + report.load_E
    return total


PARTS = [random_choices(seed) for seed in range(3)]


def test_over_rows_it_is_the_mean_of_the_rows():
    rows = [loop([i[:, [b]]], [p[:, [b]]], [v[[b]]]) for i, p, v in PARTS for b in range(ROWS)]
    np.testing.assert_allclose(shares("row", PARTS), np.mean(rows, axis=0), rtol=1e-5)


def test_over_microbatches_it_is_their_mean_by_tokens():
    tokens = np.array([valid.sum() for *_, valid in PARTS])
    each = np.array([loop([i], [p], [v]) for i, p, v in PARTS])
    np.testing.assert_allclose(shares("microbatch", PARTS), (each * tokens[:, None] / tokens.sum()).sum(0), rtol=1e-5)


def test_over_the_batch_each_microbatch_is_weighed_by_all_counts_so_far():
    tokens, total = sum(valid.sum() for *_, valid in PARTS), np.zeros(LAYERS)
    for index, (_, probabilities, valid) in enumerate(PARTS):
        counts = sum(load_of(ids, v) for ids, _, v in PARTS[: index + 1])
        fraction = counts / counts.sum(1, keepdims=True)
        total += EXPERTS * (fraction * probabilities[:, valid].sum(1)).sum(1) / tokens
    np.testing.assert_allclose(shares("batch", PARTS), total, rtol=1e-5)


def test_a_batch_in_one_piece_is_a_microbatch_and_the_whole_loop():
    one = PARTS[:1]
    np.testing.assert_allclose(shares("batch", one), shares("microbatch", one), rtol=1e-6)
    np.testing.assert_allclose(shares("batch", one), loop(*([part] for part in one[0])), rtol=1e-5)


def test_a_row_may_be_one_sided_where_the_batch_is_even():
    """Rows that prefer different experts are punished one by one, and not together: domains may have their experts."""
    ids = np.broadcast_to(np.arange(3)[None, :, None, None], (LAYERS, 3, TOKENS, 1))
    likely = np.eye(3)[ids[..., 0]]
    part = (
        np.concatenate([ids, ids[:, :1]], 1),
        np.concatenate([likely, likely[:, :1]], 1),
        np.ones((4, TOKENS), bool),
    )
    part[2][3] = False
    np.testing.assert_allclose(shares("row", [part]), 3.0, rtol=1e-6)
    np.testing.assert_allclose(shares("microbatch", [part]), 1.0, rtol=1e-6)


def decays_everything(learning_rate, config):
    """An optimizer of the user's own, without a mask that would spare a bias."""
    return optax.adamw(learning_rate, weight_decay=config.weight_decay)


def run_of(microbatch_rows, **moe):
    settings = {"router": routers.sigmoid_top_k, "bias_rate": RATE, **moe}
    model = dataclasses.replace(tiny.MODEL, remat="full", moe=dataclasses.replace(tiny.MODEL.moe, **settings))
    train = {"batch_tokens": 8 * tiny.LENGTH, "microbatch_rows": microbatch_rows}
    run = tiny.run_config(pathlib.Path("unused"), model=model, **train)
    return dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, build=decays_everything))


@functools.cache
def after_step(microbatch_rows, poison=False, scope="row"):
    """(run, state before, after, metrics) of a step on eight rows."""
    run = run_of(microbatch_rows, load_balance_scope=scope)
    mesh = make_mesh(run.mesh)
    abstract = state.abstract_state(run, mesh)
    before = state.create_state(run, abstract)
    before.params["blocks"]["moe"]["router_bias"][...] = jnp.asarray(BIAS_LE)
    first = jax.device_get(before)
    batch = tiny.random_batch(8, seed=3)
    if poison:
        batch = dataclasses.replace(batch, loss_weights=np.full_like(batch.loss_weights, np.nan))
    rows = feed.abstract_microbatches(run, sharding.batch_sharding(mesh, run.rules))
    parts = [jax.tree.map(lambda x, i=i: x[i : i + microbatch_rows], batch) for i in range(0, 8, microbatch_rows)]
    drawn = feed.draw(iter(parts), batch.tokens.size, rows)
    count = jnp.int32(drawn.num_microbatches)
    tokens = jnp.float32(run.optimizer.schedule.warmup_tokens)  # at 0 the learning rate would be 0
    after, metrics = step.make_step(run, 2, abstract)(before, drawn.microbatches, count, tokens)
    return run, first, jax.device_get(after), jax.device_get(metrics)


def bias_of(at):
    return np.asarray(at.params["blocks"]["moe"]["router_bias"][...])


@pytest.mark.parametrize("microbatch_rows", [8, 2])
def test_a_bias_moves_once_a_step_by_the_counts_of_the_whole_batch(microbatch_rows):
    """Layers recomputed, a batch in four pieces: neither moves a bias twice; and the optimizer not at all."""
    _, before, after, metrics = after_step(microbatch_rows)
    assert metrics.learning_rate > 0
    load = metrics.sums.moe.load_E
    assert load.sum() == 2 * 2 * (tiny.random_batch(8, seed=3).segment_ids > 0).sum()
    want = RATE * np.sign(load.mean(1, keepdims=True) - load)
    np.testing.assert_array_equal(bias_of(before), BIAS_LE)
    np.testing.assert_allclose(bias_of(after), BIAS_LE + want, rtol=1e-6, atol=1e-7)
    assert len(np.unique(want)) > 1


def test_a_step_carries_the_counts_of_a_batch_from_piece_to_piece():
    whole, pieces = (
        [after_step(rows, scope=scope)[3].sums.load_balance for scope in ("batch", "microbatch")] for rows in (8, 2)
    )
    np.testing.assert_allclose(whole[0], whole[1], rtol=1e-6)
    assert np.abs(pieces[0] - pieces[1]).max() > 1e-4  # the same in each only if no count were carried
    assert (np.abs(pieces[0] - whole[0]) < np.abs(pieces[1] - whole[0])).all()


def test_a_skipped_step_moves_no_bias():
    _, before, after, metrics = after_step(8, poison=True)
    assert metrics.skipped_steps == 1
    np.testing.assert_array_equal(bias_of(after), bias_of(before))


def test_evaluation_uses_the_bias_and_moves_nothing():
    run, _, after, _ = after_step(8)
    definition = model_definition(run.model)
    batch = tiny.random_batch(2)
    params = jax.tree.map(jnp.asarray, after.params)
    held = bias_of(after)
    plain = evaluate._sums(definition, params, batch)
    np.testing.assert_array_equal(np.asarray(params["blocks"]["moe"]["router_bias"][...]), held)
    params["blocks"]["moe"]["router_bias"][...] = jnp.array([[5.0, 0, 0, 5.0]] * 2)
    assert abs(float(evaluate._sums(definition, params, batch)[0] - plain[0])) > 1e-4


def test_biases_even_out_loads_that_lean():
    """Forty steps of moving alone, on fixed scores of which one expert gets most."""
    scores = jax.random.uniform(jax.random.key(0), (400, EXPERTS)) + jnp.array([0.4, 0.0, 0.0])
    params = {"blocks": {"moe": {"router_bias": state.nnx.Param(jnp.zeros((1, EXPERTS)))}}}
    for _ in range(60):
        chosen = jax.lax.top_k(scores + params["blocks"]["moe"]["router_bias"][...], 1)[1]
        load = jnp.bincount(chosen.ravel(), length=EXPERTS)[None]
        params = balance.move_biases(params, params, load, (0,), RATE)
    assert int(load.max()) < 1.15 * 400 / EXPERTS
    assert int(jnp.bincount(jax.lax.top_k(scores, 1)[1].ravel(), length=EXPERTS).max()) > 200


def test_stacks_in_another_order_get_their_own_layers_counts():
    before = {"blocks": {"moe": {"router_bias": state.nnx.Param(jnp.zeros((3, 2)))}}}
    load_LE = jnp.array([[3, 1], [1, 3]])
    moved = balance.move_biases(before, before, load_LE, (1, -1, 0), RATE)
    want = [[RATE, -RATE], [0, 0], [-RATE, RATE]]
    np.testing.assert_allclose(moved["blocks"]["moe"]["router_bias"][...], want, rtol=1e-6)
