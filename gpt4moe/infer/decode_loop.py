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
from gpt4moe.model.cross_attention import Media
from gpt4moe.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pictures:
    """The images of the prompts and which of them each token sees, all as `types.Batch` has them."""

    images: Array
    image_valid: Array
    image_index_BT: Array
    first_image_BT: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """Right-padded prompts [B, T], how long each is, how many tokens each may get (0: a filling row), how to draw.

    pictures: those of the prompts, None where no prompt has any.
    """

    tokens_BT: Array
    lengths_B: Array
    limits_B: Array
    params: SamplingParams
    keys_B: Array
    pictures: Pictures | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """The decode loop's state: step counts tokens drawn so far, ids_BT and logprobs_BT hold them (-1: none).

    media: the images as the last token of every prompt sees them, encoded once; None without any.
    """

    step: Array
    last_B: Array
    done_B: Array
    ids_BT: Array
    logprobs_BT: Array
    cache: KVCache
    media: Media | None


@functools.partial(jax.jit, static_argnames=("graphdef", "num_slots", "num_new"))
def prefill(graphdef, state, request: Request, end_of_text: Array, num_slots: int, num_new: int) -> Decoding:
    """Reads the prompts into the cache and draws the first token of every row."""
    model = nnx.merge(graphdef, state)
    num_rows, num_tokens = request.tokens_BT.shape
    cache = model.init_cache(num_rows, num_slots)
    positions_BT = jnp.broadcast_to(jnp.arange(num_tokens), (num_rows, num_tokens))
    present_BT = (positions_BT < request.lengths_B[:, None]) & (request.limits_B > 0)[:, None]
    media = None if request.pictures is None else model.keep(model.look(*vars(request.pictures).values()))
    given = {"dropless": True, "cache": cache, "media": media}
    x_BTD, out = model(request.tokens_BT, positions_BT, present_BT.astype(jnp.int32), **given)
    last_BD = x_BTD[jnp.arange(num_rows), request.lengths_B - 1]
    blank = Decoding(
        step=jnp.int32(0),
        last_B=jnp.zeros(num_rows, jnp.int32),
        done_B=request.limits_B <= 0,
        ids_BT=jnp.full((num_rows, num_new), -1, jnp.int32),
        logprobs_BT=jnp.zeros((num_rows, num_new), jnp.float32),
        cache=out.cache,
        media=None if media is None else _after(media, request.lengths_B),
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
        given = {"dropless": True, "cache": decoding.cache, "media": decoding.media}
        x_B1D, out = model(decoding.last_B[:, None], positions_B1, segment_ids_B1, **given)
        drawn = dataclasses.replace(decoding, cache=out.cache)
        return _draw(model.logits(x_B1D[:, 0]), drawn, request, end_of_text)

    return jax.lax.while_loop(lambda decoding: ~jnp.all(decoding.done_B), step, decoding)


def _after(media: Media, lengths_B: Array) -> Media:
    """`media` for tokens after the prompts: they see what the last token of their prompt sees."""
    last_B1 = lengths_B[:, None] - 1
    index_B1, first_B1 = (
        jnp.take_along_axis(of_BT, last_B1, 1) for of_BT in (media.image_index_BT, media.first_image_BT)
    )
    return dataclasses.replace(media, image_index_BT=index_B1, first_image_BT=first_B1)


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
