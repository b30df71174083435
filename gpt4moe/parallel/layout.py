"""Assembles the layout of a run on a mesh: which operations of the model are replaced by which of this folder."""

from __future__ import annotations

import functools
import math

import jax
from jax.sharding import Mesh, PartitionSpec

from gpt4moe.config.check import require
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.rules import ShardingRules
from gpt4moe.model.attention_kernel import attend, attend_across
from gpt4moe.model.experts import apply_experts
from gpt4moe.model.layout import ONE_DEVICE, Layout
from gpt4moe.parallel.attention import sharded_attend, sharded_attend_across, sharded_attend_through
from gpt4moe.parallel.expert import sharded_experts
from gpt4moe.parallel.island import Spread, laid_out, spread
from gpt4moe.parallel.pipeline import Schedule, pipelined_layers
from gpt4moe.parallel.vocabulary import sharded_cross_entropy
from gpt4moe.types import Array


@functools.lru_cache
def make_layout(model: ModelConfig, config: MeshConfig, rules: ShardingRules, mesh: Mesh) -> Layout:
    """Returns the layout of `model` on `mesh`; the same one for the same arguments, so that programs are found again.

    Raises `CallerError` for rules under which a product's partial sums would mix different tokens.
    """
    platform = mesh.devices.flat[0].platform
    if mesh.size == 1:
        return _one_device(platform)
    over = spread(mesh, config, rules)
    _require_unmixed(over)
    plain = {} if mesh.shape["stage"] == 1 else _pipeline(over, model, config)
    return Layout(
        attend=sharded_attend(over, platform),
        attend_across=sharded_attend_across(over, platform),
        attend_through=sharded_attend_through(over),
        apply_experts=sharded_experts(over, config.expert_bucket_factor, _exchange(config, over, platform), platform),
        cross_entropy=sharded_cross_entropy(over),
        row_multiple=math.prod(mesh.shape[axis] for axis in over.rows),
        residual=functools.partial(_residual, over),
        by_row=functools.partial(_by_row, over),
        **plain,
    )


def _one_device(platform: str) -> Layout:
    """The layout of one device, which may be of another platform than those here: one that is only compiled for."""
    if platform == jax.default_backend():
        return ONE_DEVICE
    return Layout(
        attend=functools.partial(attend, backend=platform),
        attend_across=functools.partial(attend_across, backend=platform),
        apply_experts=functools.partial(apply_experts, platform=platform),
    )


def _require_unmixed(over: Spread) -> None:
    """Raises `CallerError` where a sum over a dim's axes would add up different tokens."""
    tokens = {*over.rows, *over.context}
    for dim, taken in (("heads", {"stage"}), ("kv_heads", {"stage"}), ("mlp", {"stage"}), ("vocab", set())):
        mixed = set(over.axes_of(dim)) & (tokens | taken)
        constraint = f"must not share {sorted(mixed)} with rows, sequence{' or stages' if taken else ''}"
        require(not mixed, f"ShardingRules[{dim!r}]", over.rules.axes_of(dim), constraint, f"put {dim} on tensor")


def _pipeline(over: Spread, model: ModelConfig, config: MeshConfig) -> dict:
    slots = config.placement(model.num_moe_layers, over.mesh.shape["stage"])
    schedule = Schedule(over.mesh.shape["stage"], config.virtual_stages, slots, config.stage_microbatches)
    return {"run_layers": pipelined_layers(over, schedule), "slots": slots}


def _exchange(config: MeshConfig, over: Spread, platform: str) -> str:
    """How dropless choices travel; raises `CallerError` where that cannot be. XLA:CPU has no ragged all-to-all."""
    axes, wanted = over.axes_of("experts"), config.expert_exchange
    can = platform != "cpu" and len(axes) < 2
    constraint = f"needs a GPU or TPU and experts on one axis; they lie on {list(axes)} of {platform} devices"
    require(can or wanted != "ragged", "expert_exchange", wanted, constraint, 'leave it out, or set "bucket"')
    return wanted or ("ragged" if can else "bucket")


def _residual(over: Spread, x_BTD: Array) -> Array:
    return laid_out(x_BTD, over.mesh, PartitionSpec(over.rows, over.residual))


def _by_row(over: Spread, x: Array) -> Array:
    return laid_out(x, over.mesh, PartitionSpec(over.rows))
