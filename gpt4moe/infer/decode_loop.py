"""The two programs of generation: one reads the prompts into a cache, the other draws token after token.

In: a model, prompts padded to one length and how to draw. Out: the drawn ids and their log-probabilities. The cache is
donated from one to the other and within the loop.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gpt4moe.infer.sampling import SamplingParams, sample
from gpt4moe.model.cache import KVCache
from gpt4moe.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """Right-padded prompts [B, T], how long each is, how many tokens each may get (0: a filling row), how to draw."""

    tokens_BT: Array
    lengths_B: Array
    limits_B: Array
    params: SamplingParams
    keys_B: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """The decode loop's state: step counts tokens drawn so far, ids_BT and logprobs_BT hold them (-1: none)."""

    step: Array
    last_B: Array
    done_B: Array
    ids_BT: Array
    logprobs_BT: Array
    cache: KVCache


@functools.partial(jax.jit, static_argnames=("graphdef", "num_slots", "num_new"))
def prefill(graphdef, state, request: Request, end_of_text: Array, num_slots: int, num_new: int) -> Decoding:
    """Reads the prompts into the cache and draws the first token of every row."""
    model = nnx.merge(graphdef, state)
    num_rows, num_tokens = request.tokens_BT.shape
    cache = model.init_cache(num_rows, num_slots)
    positions_BT = jnp.broadcast_to(jnp.arange(num_tokens), (num_rows, num_tokens))
    present_BT = (positions_BT < request.lengths_B[:, None]) & (request.limits_B > 0)[:, None]
    x_BTD, out = model(request.tokens_BT, positions_BT, present_BT.astype(jnp.int32), dropless=True, cache=cache)
    last_BD = x_BTD[jnp.arange(num_rows), request.lengths_B - 1]
    blank = Decoding(
        step=jnp.int32(0),
        last_B=jnp.zeros(num_rows, jnp.int32),
        done_B=request.limits_B <= 0,
        ids_BT=jnp.full((num_rows, num_new), -1, jnp.int32),
        logprobs_BT=jnp.zeros((num_rows, num_new), jnp.float32),
        cache=out.cache,
    )
    return _draw(model.logits(last_BD), blank, request, end_of_text)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("decoding",))
def decode(graphdef, state, decoding: Decoding, request: Request, end_of_text: Array) -> Decoding:
    """Draws token after token until every row has finished."""
    model = nnx.merge(graphdef, state)

    def step(decoding: Decoding) -> Decoding:
        positions_B1 = (request.lengths_B + decoding.step - 1)[:, None]
        # A finished row is padding: it is neither routed to an expert nor written to the cache.
        segment_ids_B1 = (~decoding.done_B).astype(jnp.int32)[:, None]
        x_B1D, out = model(decoding.last_B[:, None], positions_B1, segment_ids_B1, dropless=True, cache=decoding.cache)
        drawn = dataclasses.replace(decoding, cache=out.cache)
        return _draw(model.logits(x_B1D[:, 0]), drawn, request, end_of_text)

    return jax.lax.while_loop(lambda decoding: ~jnp.all(decoding.done_B), step, decoding)


def _draw(logits_BV: Array, decoding: Decoding, request: Request, end_of_text: Array) -> Decoding:
    """`decoding` with one more token for every row that has not finished."""
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(request.keys_B, decoding.step)
    ids_B, logprobs_B = sample(logits_BV, request.params, keys_B)
    ids_B = jnp.where(decoding.done_B, -1, ids_B)
    step = decoding.step + 1
    return dataclasses.replace(
        decoding,
        step=step,
        last_B=jnp.maximum(ids_B, 0),
        done_B=decoding.done_B | (ids_B == end_of_text) | (step >= request.limits_B),
        ids_BT=decoding.ids_BT.at[:, decoding.step].set(ids_B),
        logprobs_BT=decoding.logprobs_BT.at[:, decoding.step].set(jnp.where(ids_B < 0, 0.0, logprobs_B)),
    )
