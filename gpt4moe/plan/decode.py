"""The decode loop of `infer.generate` on abstract arrays laid out over a mesh, ready to compile."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt4moe.config.compile import CompileConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer import generate
from gpt4moe.infer.sampling import row_keys, sampling_params
from gpt4moe.model.cache import KVCache
from gpt4moe.model.transformer import Transformer
from gpt4moe.parallel import sharding
from gpt4moe.train.state import run_layout

# The loop of `infer.generate` over new tokens, whose length is known only at run time: one round is one step.
PROMPT_LENGTH = 16
END_OF_TEXT = 0


def lower_decode(run: RunConfig, config: CompileConfig, mesh: Mesh) -> jax.stages.Lowered:
    """Returns the loop that draws token after token for `config.decode_rows` rows; its weights are `weight_dtype`.

    Rows, and their caches, lie over the batch axes; layers of the cache over `stage`.
    """
    layout = run_layout(run, mesh)
    model = nnx.eval_shape(lambda: Transformer(run.model, rngs=nnx.Rngs(0), layout=layout))
    definition, shapes = nnx.split(model)
    where = sharding.state_shardings(shapes, mesh, run.rules)
    params = jax.tree.map(functools.partial(_weight, jnp.dtype(config.weight_dtype)), shapes, where)
    request = jax.eval_shape(lambda: _request(run, config))
    prefill = functools.partial(generate._prefill, num_slots=config.decode_length, num_new=PROMPT_LENGTH)
    decoding = jax.eval_shape(prefill, definition, params, request, END_OF_TEXT)
    request, decoding = (_over_rows(tree, config.decode_rows, run, mesh) for tree in (request, decoding))
    return generate._decode.lower(definition, params, decoding, request, END_OF_TEXT)


def _request(run: RunConfig, config: CompileConfig) -> Any:
    rows = config.decode_rows
    return generate._Request(
        tokens_BT=jnp.zeros((rows, PROMPT_LENGTH), jnp.int32),
        lengths_B=jnp.ones(rows, jnp.int32),
        limits_B=jnp.ones(rows, jnp.int32),
        params=sampling_params([SamplingConfig()] * rows, run.model.vocab_size),
        keys_B=row_keys(jnp.zeros(rows, jnp.uint32)),
    )


def _weight(dtype: jnp.dtype, leaf: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where)


def _over_rows(tree: Any, rows: int, run: RunConfig, mesh: Mesh) -> Any:
    """`tree` with the dim of each array that is `rows` long over the batch axes, and a cache's layers over `stage`."""
    batch = sharding.split_axes(mesh, run.rules.batch_axes)

    def lay_out(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, KVCache):
            cache = PartitionSpec(sharding.split_axes(mesh, ("stage",)), batch)
            return jax.tree.map(lambda array: lay_out(array, cache), leaf)
        return lay_out(leaf, PartitionSpec(batch) if leaf.shape[:1] == (rows,) else PartitionSpec())

    return jax.tree.map(of_leaf, tree, is_leaf=lambda leaf: isinstance(leaf, KVCache))
