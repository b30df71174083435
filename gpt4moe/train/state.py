"""The training state: everything on the device that a checkpoint must hold, created in its final layout."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gpt4moe.config.model import ModelConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.model.layout import ONE_DEVICE, Layout
from gpt4moe.model.transformer import Transformer
from gpt4moe.parallel import sharding
from gpt4moe.parallel.layout import make_layout
from gpt4moe.train import optimizer, trainable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, optimizer moments and counters; the data position and the tokens seen are kept on the host.

    params: `nnx.State` of float32 parameters. opt_state: as optax has it, of those that are trained. step: int32 [],
    steps taken, skipped ones included. key: uint32 [2], key data for what is random inside a step. skipped_steps,
    skipped_in_row: int32 [], steps whose update was not applied for a non-finite loss or gradient, in all and since the
    last applied one.
    """

    params: nnx.State
    opt_state: Any
    step: jax.Array
    key: jax.Array
    skipped_steps: jax.Array
    skipped_in_row: jax.Array


@functools.lru_cache(maxsize=16)
def model_definition(config: ModelConfig, layout: Layout = ONE_DEVICE) -> nnx.GraphDef:
    """The model without its arrays: `nnx.merge` it with a state's `params` to get the model."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), layout=layout)))[0]


def run_layout(run: RunConfig, mesh: Mesh) -> Layout:
    """The layout of a run's model on `mesh`."""
    return make_layout(run.model, run.mesh, run.rules, mesh)


def initial_state(run: RunConfig, layout: Layout = ONE_DEVICE) -> TrainState:
    """The state before the first step, from `run.train.seed`; pure, so that it can be traced, laid out and jitted.

    Raises `CallerError` where a pattern of `run.optimizer` fits no parameter.
    """
    model_key, step_key = jax.random.split(jax.random.key(run.train.seed))
    params = nnx.split(Transformer(run.model, rngs=nnx.Rngs(model_key), layout=layout))[1]
    trainable.check(params, run.optimizer)
    trained, _ = trainable.split(params, run.optimizer)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        params=params,
        opt_state=optimizer.make_optimizer(run.optimizer.learning_rate, run.optimizer).init(trained),
        step=zero,
        key=jax.random.key_data(step_key),
        skipped_steps=zero,
        skipped_in_row=zero,
    )


# Shapes and values come from one trace.
_initial_state = jax.jit(initial_state, static_argnums=(0, 1))


def abstract_state(run: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without allocating it."""
    shapes = jax.eval_shape(lambda: _initial_state(run, run_layout(run, mesh)))
    shardings = sharding.state_shardings(shapes, mesh, run.rules)
    if run.mesh.zero1:
        moments = jax.tree.map(
            lambda leaf, where: sharding.over_data(where, leaf.shape), shapes.opt_state, shardings.opt_state
        )
        shardings = dataclasses.replace(shardings, opt_state=moments)
    return sharding.laid_out_shapes(shapes, shardings)


def create_state(run: RunConfig, abstract: TrainState) -> TrainState:
    """The initial state, every array made directly in the layout of `abstract`: no device ever holds the whole."""
    # A program that runs once is not worth optimising: at level 1 XLA:CPU compiles it 2.6 times faster.
    level, given = "xla_backend_optimization_level", os.environ.get("XLA_FLAGS", "")
    options = {level: 1} if jax.default_backend() == "cpu" and level not in given else None
    layout = run_layout(run, shardings_of(abstract).step.mesh)
    laid_out = {"out_shardings": shardings_of(abstract), "compiler_options": options}
    return jax.jit(lambda: _initial_state(run, layout), **laid_out)()


def shardings_of(abstract: TrainState) -> TrainState:
    """The sharding of every leaf of an abstract state, in its structure."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
