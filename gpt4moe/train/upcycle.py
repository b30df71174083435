"""A mixture of experts from a dense model: parameters of one wide feed-forward in, of many experts out.

The dense feed-forward, F_dense wide, is cut into G = F_dense / F slices as wide as an expert, and the E experts are
E / G replicas of all slices: expert r G + s holds slice s. G = 1 is sparse upcycling (Komatsuzaki et al. 2023), G > 1
is granular (He et al. 2024, whose "virtual groups" the replicas are).

The new model gives the dense model's output at step 0, whatever its fresh router chooses, where nothing is dropped: in
dropless training, evaluation and decoding; with a capacity, training drops choices and their share of the output.
The slices of a replica begin with one router column, so that their scores are equal; `top_k` takes equal scores in the
order of the experts, and a token's K experts are K / G whole replicas. Gates of a replica's slices are equal and all
gates of a token sum to 1, so that the sum of gate times slice is 1 / G of the dense output: `down` of every expert is G
times the dense one's.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gpt4moe import checkpoint
from gpt4moe.config.check import require
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.model import routers
from gpt4moe.model.router import top_k
from gpt4moe.model.transformer import Transformer
from gpt4moe.parallel import sharding
from gpt4moe.parallel.layout import make_layout
from gpt4moe.train import adapter
from gpt4moe.types import Array

# They choose by each expert's own score and nothing else, so that equal scores are chosen together.
CHOOSE_WHOLE_REPLICAS = (top_k, routers.softmax_of_chosen, routers.sigmoid_top_k)


def dense_source(run: RunConfig, step: int) -> ModelConfig | None:
    """The dense model at `step` of `init_from` that `run`'s experts are to be made of; None where it is no such thing.

    Raises `CallerError` where it is, but the experts could not give the dense model's output.
    """
    saved = checkpoint.restore_progress(run.train.init_from, step).get("settings", {})
    moe, width = run.model.moe, saved.get("model.moe.hidden_dim")
    if saved.get("model.moe.num_experts") != 1 or moe.num_experts == 1:
        return None
    _check(moe, width)
    one = {"num_experts": 1, "experts_per_token": 1, "hidden_dim": width, "normalize_gates": False}
    none = {"router": None, "bias_rate": 0.0, "num_groups": 1, "groups_per_token": 1, "gate_scale": 1.0}
    return dataclasses.replace(run.model, moe=dataclasses.replace(moe, **one, **none))


def restore_upcycled(run: RunConfig, dense: ModelConfig, step: int, fresh: nnx.State, mesh: Mesh) -> nnx.State:
    """Returns `fresh` parameters of the run's model with those of the `dense` one at `step` of `init_from` in them."""
    abstract, order = abstract_dense(run, dense, mesh)
    source = run.train.init_from
    abstract = adapter.without(
        abstract, [part for part in (*adapter.PARTS, *adapter.GROWN) if not adapter.has(fresh, part)]
    )
    params = checkpoint.restore(source, step, {"params": abstract}, layer_order=order)["params"]
    where = jax.tree.map(lambda leaf: leaf.sharding, fresh)
    return jax.jit(lambda params, fresh: upcycled(params, fresh, run.model.moe), out_shardings=where)(params, fresh)


def abstract_dense(run: RunConfig, dense: ModelConfig, mesh: Mesh) -> tuple[nnx.State, tuple[int, ...] | None]:
    """Shapes and layout of the dense model's parameters on the run's mesh, and its slots."""
    layout = make_layout(run.model, run.mesh, run.rules, mesh)
    shapes = nnx.split(nnx.eval_shape(lambda: Transformer(dense, rngs=nnx.Rngs(0), layout=layout)))[1]
    return sharding.laid_out_shapes(shapes, sharding.state_shardings(shapes, mesh, run.rules)), layout.slots


def upcycled(dense: nnx.State, fresh: nnx.State, moe: MoeConfig) -> nnx.State:
    """Returns all of `dense` but with the experts and the router that `fresh` has the shapes of."""
    made = jax.tree.map(lambda leaf: leaf, dense)  # its containers anew
    mixture, experts = made["blocks"]["moe"], dense["blocks"]["moe"]["experts"]
    slices = experts["up"][...].shape[-1] // moe.hidden_dim
    for name, matrix in experts.items():
        cut = _cut(matrix[...], slices, dim=2 if name == "down" else 3)
        scaled = cut * slices if name == "down" else cut
        mixture["experts"][name].set_value(jnp.tile(scaled, (1, moe.num_experts // slices, 1, 1)))
    columns_LDR = fresh["blocks"]["moe"]["router"][...][..., ::slices]
    mixture["router"].set_value(jnp.repeat(columns_LDR, slices, axis=-1))
    if "router_bias" in fresh["blocks"]["moe"]:
        mixture["router_bias"] = fresh["blocks"]["moe"]["router_bias"]
    return made


def _cut(matrix_L1DF: Array, slices: int, *, dim: int) -> Array:
    """The one matrix of each layer cut along `dim` into so many, in the place of its dim of size 1."""
    return jnp.concatenate(jnp.split(matrix_L1DF, slices, axis=dim), axis=1)


def _check(moe: MoeConfig, width: int) -> None:
    fits, slices = width % moe.hidden_dim == 0, width // moe.hidden_dim
    constraint = f"must divide the dense model's hidden_dim ({width}) to be made of it"
    require(fits, "hidden_dim", moe.hidden_dim, constraint, "change hidden_dim or INIT_FROM")
    for name in ("num_experts", "experts_per_token"):
        value = getattr(moe, name)
        constraint = f"must be a multiple of the slices ({slices}) that experts of {moe.hidden_dim} cut {width} into"
        require(value % slices == 0, name, value, constraint, f"change {name} or hidden_dim")
    constraint = "gives gates that do not sum to 1, so that experts of a dense model would not give its output"
    for name, wanted in (("normalize_gates", True), ("gate_scale", 1.0)):
        require(getattr(moe, name) == wanted, name, getattr(moe, name), constraint, f"set {name}={wanted}")
    mend, name = "take top_k", getattr(moe.router, "__name__", None)
    require(not routers.is_among(moe.router, (routers.expert_choice,)), "router", name, constraint, mend)
    constraint = f"need not choose whole replicas of the {slices} slices"
    whole = routers.is_among(moe.router, CHOOSE_WHOLE_REPLICAS)
    require(slices == 1 or whole, "router", name, constraint, f"{mend}, or experts as wide as the dense model's")
