"""One training step: microbatches in, the updated state and the step's metrics out; pure, jitted, state donated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gpt4moe.config.run import RunConfig
from gpt4moe.parallel import sharding
from gpt4moe.train import adapter, balance, feed, loss, optimizer, schedule, state, trainable
from gpt4moe.train.state import TrainState
from gpt4moe.types import Array, Batch

ROUTER = "blocks.moe.router"  # its bias moves only where it may follow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What one step measured, on the device, over its whole batch.

    sums: what the loss gave, added over microbatches; counts: what to divide them by. grad_norm: before clipping, of
    what is trained. expert_grad_norm_LE: of every expert, 0 where it is frozen. `sums.moe.choices`: where every token
    went, a leading dim over microbatches.
    learning_rate: of this step. skipped_steps, skipped_in_row: the state's counters after it. gates_2L: of its
    cross-attention after it (`adapter.gates`).
    """

    sums: loss.LossOut
    counts: loss.LossNormalizers
    grad_norm: Array
    expert_grad_norm_LE: Array
    learning_rate: Array
    skipped_steps: Array
    skipped_in_row: Array
    gates_2L: Array | None = None


def train_step(
    at: TrainState,
    microbatches: Batch,
    num_microbatches: Array,
    tokens: Array,
    *,
    run: RunConfig,
    definition: nnx.GraphDef,
    num_sources: int,
    lay_out_gradients: Callable[[nnx.State], nnx.State] = lambda grads: grads,
) -> tuple[TrainState, StepMetrics]:
    """Returns the state after one optimizer step on a whole batch, and its metrics.

    `microbatches` [microbatches, B, T] has room for the largest batch of a ramp, zeros where unused, and
    `num_microbatches` (int32 []) says how many to run: one compiled program serves every batch size. Losses are divided
    by counts of the whole batch, so that neither values nor gradients depend on how it is cut. `tokens` (float32 [])
    were seen before this step and set the learning rate. Frozen parameters have no gradient and stay bit for bit. Where
    the loss or the gradient is not finite, parameters and optimizer state stay as they were and the step is counted as
    skipped. `lay_out_gradients` fixes where the gradients lie as they meet the optimizer state.
    """
    counts = loss.normalizers(microbatches)
    gradient = functools.partial(_gradient, at, microbatches, counts, run, definition, num_sources)
    grads, sums = _sum_over(gradient, num_microbatches, room=microbatches.tokens.shape[0])
    grads = lay_out_gradients(grads)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums.cross_entropy)

    fraction = schedule.fraction(tokens, schedule.planned_tokens(run.train), run.optimizer.schedule)
    learning_rate = run.optimizer.learning_rate * fraction
    update = optimizer.make_optimizer(learning_rate, run.optimizer).update
    before, frozen = trainable.split(at.params, run.optimizer)
    updates, opt_state = update(grads, at.opt_state, before)
    trained = optax.apply_updates(before, updates)
    layout, moe = nnx.merge(definition, at.params).layout, run.model.moe
    if moe.bias_rate:
        slots = layout.slots or tuple(range(run.model.num_moe_layers))
        rate = moe.bias_rate if run.optimizer.trains(ROUTER) else 0.0
        trained = balance.move_biases(trained, before, sums.moe.load_E, slots, rate)
    trained, opt_state = jax.tree.map(
        functools.partial(jnp.where, finite), (trained, opt_state), (before, at.opt_state)
    )
    skipped_steps = at.skipped_steps + jnp.where(finite, 0, 1)
    skipped_in_row = jnp.where(finite, 0, at.skipped_in_row + 1)
    params = trainable.join(trained, frozen)
    new = TrainState(params, opt_state, at.step + 1, at.key, skipped_steps, skipped_in_row)
    expert_norms_LE = balance.expert_grad_norms(grads, layout.order(run.model.num_moe_layers), moe.num_experts)
    measured = (grad_norm, expert_norms_LE, learning_rate, skipped_steps, skipped_in_row)
    return new, StepMetrics(sums, counts, *measured, adapter.gates(params, run.model, layout))


def _gradient(
    at: TrainState,
    microbatches: Batch,
    counts: loss.LossNormalizers,
    run: RunConfig,
    definition: nnx.GraphDef,
    num_sources: int,
    index: Array,
    total: tuple[nnx.State, loss.LossOut] | None,
) -> tuple[nnx.State, loss.LossOut]:
    """Gradient, with respect to what is trained, and sums of one microbatch; `total` is what its predecessors gave."""
    batch = jax.tree.map(lambda x: x[index], microbatches)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(at.key), at.step), index)
    load_so_far_LE = None if total is None else total[1].moe.load_E
    given = {"key": key, "load_so_far_LE": load_so_far_LE, "with_choices": run.train.record_routing}
    trained, frozen = trainable.split(at.params, run.optimizer)

    def objective(trained: nnx.State) -> tuple[Array, loss.LossOut]:
        model = nnx.merge(definition, trainable.join(trained, frozen))
        return loss.batch_loss(model, batch, counts, num_sources=num_sources, **given)

    grads, sums = jax.grad(objective, has_aux=True)(trained)
    room = len(microbatches.tokens)
    placed = jax.tree.map(lambda leaf: jnp.zeros((room, *leaf.shape), leaf.dtype).at[index].set(leaf), sums.moe.choices)
    return grads, dataclasses.replace(sums, moe=dataclasses.replace(sums.moe, choices=placed))


def make_step(run: RunConfig, num_sources: int, abstract: TrainState) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Returns `train_step` jitted for the layout of `abstract`: (state, microbatches, num_microbatches, tokens).

    The state is donated: the arrays it is called with are gone afterwards.
    """
    shardings = state.shardings_of(abstract)
    mesh = shardings.step.mesh
    definition = state.model_definition(run.model, state.run_layout(run, mesh))
    step = functools.partial(train_step, run=run, definition=definition, num_sources=num_sources)
    if run.mesh.zero1:
        trained, _ = trainable.split(abstract.params, run.optimizer)
        parts = jax.tree.map(lambda leaf: sharding.over_data(leaf.sharding, leaf.shape), trained)
        step = functools.partial(step, lay_out_gradients=lambda grads: jax.lax.with_sharding_constraint(grads, parts))
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))


def lower_step(run: RunConfig, num_sources: int, abstract: TrainState) -> jax.stages.Lowered:
    """Returns the step of a run, ready to compile; no array is made, so the devices need not be here."""
    mesh = abstract.step.sharding.mesh
    batch = feed.abstract_microbatches(run, sharding.batch_sharding(mesh, run.rules))
    count, tokens = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    return make_step(run, num_sources, abstract).lower(abstract, batch, count, tokens)


def _sum_over(function: Callable[[Array, Any], Any], count: Array, *, room: int) -> Any:
    """Sum of `function(i, sum so far)` for i < count <= room; a single call, of 0 and None, where room is 1."""
    if room == 1:
        return function(0, None)
    shapes = jax.eval_shape(lambda i: function(i, None), jnp.int32(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.fori_loop(0, count, lambda i, total: jax.tree.map(jnp.add, total, function(i, total)), zeros)
