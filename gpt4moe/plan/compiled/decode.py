"""The decode loop of `infer.decode_loop` on abstract arrays laid out over a mesh, ready to compile."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt4moe.config.compile import PROMPT_LENGTH, CompileConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.decode_loop import Request, decode, prefill
from gpt4moe.infer.sampling import row_keys, sampling_params
from gpt4moe.model.cache import KVCache
from gpt4moe.model.transformer import Transformer
from gpt4moe.parallel import sharding
from gpt4moe.train.state import run_layout

END_OF_TEXT = 0


def lower_decode(run: RunConfig, config: CompileConfig, mesh: Mesh) -> jax.stages.Lowered:
    """Returns the loop that draws token after token for `config.decode_rows` rows; its weights are `weight_dtype`.

    Rows, and their caches, lie over the batch axes; the cache's stack of layers over `stage`.
    """
    layout = run_layout(run, mesh)
    model = nnx.eval_shape(lambda: Transformer(run.model, rngs=nnx.Rngs(0), layout=layout))
    definition, shapes = nnx.split(model)
    where = sharding.state_shardings(shapes, mesh, run.rules)
    params = sharding.laid_out_shapes(shapes, where, jnp.dtype(config.weight_dtype))
    request = jax.eval_shape(lambda: _request(run, config))
    read = functools.partial(prefill, num_slots=config.decode_length, num_new=PROMPT_LENGTH)
    decoding = jax.eval_shape(read, definition, params, request, END_OF_TEXT)
    request, decoding = (_over_rows(tree, config.decode_rows, run, mesh) for tree in (request, decoding))
    return decode.lower(definition, params, decoding, request, END_OF_TEXT)


def _request(run: RunConfig, config: CompileConfig) -> Request:
    rows = config.decode_rows
    return Request(
        tokens_BT=jnp.zeros((rows, PROMPT_LENGTH), jnp.int32),
        lengths_B=jnp.ones(rows, jnp.int32),
        limits_B=jnp.ones(rows, jnp.int32),
        params=sampling_params([SamplingConfig()] * rows, run.model.vocab_size),
        keys_B=row_keys(jnp.zeros(rows, jnp.uint32)),
    )


def _over_rows(tree: Any, rows: int, run: RunConfig, mesh: Mesh) -> Any:
    """`tree` with the dim of each array that is `rows` long over the batch axes, and a cache's stack over `stage`."""
    batch = sharding.split_axes(mesh, run.rules.batch_axes)

    def lay_out(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, KVCache):
            stacked = PartitionSpec(sharding.split_axes(mesh, ("stage",)), batch)
            leading = jax.tree.map(lambda array: lay_out(array, PartitionSpec(None, batch)), leaf.leading)
            return KVCache(lay_out(leaf.keys, stacked), lay_out(leaf.values, stacked), leading)
        return lay_out(leaf, PartitionSpec(batch) if leaf.shape[:1] == (rows,) else PartitionSpec())

    return jax.tree.map(of_leaf, tree, is_leaf=lambda leaf: isinstance(leaf, KVCache))
