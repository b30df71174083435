"""Choosing the next token from logits: temperature, top-k, top-p, min-p, greedy; every row has its own settings.

In: float32 logits [B, V], `SamplingParams` (one entry a row) and one random key a row. Out: token ids [B] and the
model's own log-probability of each. Nothing here sorts the vocabulary, which would take longer than a small model's
decode step: the place where a filter cuts is found bit by bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Integer, Key, UInt32

from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.types import Array

# Tokens of a block: a draw chooses a block and then a token in it, so that no sum runs over the whole vocabulary twice.
DRAW_BLOCK = 128
# Logits divided by less might overflow; what is colder draws the likeliest token anyway.
COLDEST = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of each row, traced, so that one compiled program serves them all.

    temperature_B: float32, 0 is greedy; top_k_B: int32, the vocabulary size keeps everything; top_p_B: float32,
    1 keeps everything; min_p_B: float32, 0 keeps everything.
    """

    temperature_B: Float[Array, " B"]
    top_k_B: Int[Array, " B"]
    top_p_B: Float[Array, " B"]
    min_p_B: Float[Array, " B"]


def sampling_params(configs: Sequence[SamplingConfig], vocab_size: int) -> SamplingParams:
    """`SamplingParams` of one row per config, on the host."""
    return SamplingParams(
        temperature_B=np.array([config.temperature for config in configs], np.float32),
        top_k_B=np.array([min(config.top_k or vocab_size, vocab_size) for config in configs], np.int32),
        top_p_B=np.array([config.top_p for config in configs], np.float32),
        min_p_B=np.array([config.min_p for config in configs], np.float32),
    )


def row_keys(seeds_B: Integer[Array, " B"], draws_B: Integer[Array, " B"] | None = None) -> Key[Array, " B"]:
    """One key per row from its seed and which of its draws it is (None: its place), whatever its neighbours are."""
    draws_B = jnp.arange(seeds_B.shape[0]) if draws_B is None else draws_B
    return jax.vmap(lambda seed, draw: jax.random.fold_in(jax.random.key(seed), draw))(seeds_B, draws_B)


def sample(
    logits_BV: Float[Array, "B V"], params: SamplingParams, keys_B: Key[Array, " B"]
) -> tuple[Int[Array, " B"], Float32[Array, " B"]]:
    """Token ids [B] int32 and their log-probabilities [B] under the unmodified distribution (temperature 1, no filter).

    A row of temperature 0 takes the largest logit, the lowest id where several are equal. The others draw from
    `filtered_logits`.
    """
    ids_B = choose(logits_BV, params, keys_B)
    return ids_B, token_logprobs(logits_BV, ids_B)


def choose(logits_BV: Float[Array, "B V"], params: SamplingParams, keys_B: Key[Array, " B"]) -> Int[Array, " B"]:
    """The ids of `sample` alone."""
    greedy_B = jnp.argmax(logits_BV, axis=-1)

    def drawn() -> Array:
        return jnp.where(params.temperature_B > 0, draw(filtered_logits(logits_BV, params), keys_B), greedy_B)

    return jax.lax.cond(jnp.any(params.temperature_B > 0), drawn, lambda: greedy_B).astype(jnp.int32)


def draw(logits_BV: Float[Array, "B V"], keys_B: Key[Array, " B"]) -> Int[Array, " B"]:
    """One id [B] of each row's softmax: a block of the vocabulary first, then a token in it, by a uniform number each.

    Two numbers, because one float32 is too coarse for the least likely of many tokens; a Gumbel number for every token
    costs ten times as much.
    """
    vocab_size = logits_BV.shape[1]
    padded_BV = jnp.pad(logits_BV, ((0, 0), (0, -vocab_size % DRAW_BLOCK)), constant_values=-jnp.inf)
    weights_BV = jnp.exp(padded_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    blocks = weights_BV.reshape(len(logits_BV), -1, DRAW_BLOCK)
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    block_B = _first_beyond(jnp.sum(blocks, axis=-1), uniform_B2[:, 0])
    within = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
    ids_B = block_B * DRAW_BLOCK + _first_beyond(within, uniform_B2[:, 1])
    return jnp.minimum(ids_B, vocab_size - 1)  # logits that are no numbers have weights nowhere


def _first_beyond(weights: Array, share_B: Array) -> Array:
    """Of each row the first place at which the weights so far exceed a share of them all; never one of weight 0."""
    sums = jnp.cumsum(weights, axis=-1)
    beyond = (sums > share_B[:, None] * sums[:, -1:]) & (weights > 0)
    last = weights.shape[1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)  # where rounding leaves none beyond
    return jnp.where(jnp.any(beyond, axis=-1), jnp.argmax(beyond, axis=-1), last)


def token_logprobs(logits_BV: Float[Array, "B V"], ids_B: Int[Array, " B"]) -> Float32[Array, " B"]:
    """log p(id) [B] float32 of one id per row under the softmax of the logits."""
    logprobs_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(logprobs_BV, ids_B[:, None], axis=-1)[:, 0]


def filtered_logits(logits_BV: Float[Array, "B V"], params: SamplingParams) -> Float32[Array, "B V"]:
    """Logits [B, V] divided by the temperature, -inf outside the tokens that top-k, then top-p, then min-p keep.

    Top-k keeps exactly k tokens, of equal logits the lower ids. Top-p (Holtzman et al. 2019, The Curious Case of
    Neural Text Degeneration) keeps the fewest most probable tokens whose probabilities, renormalised after top-k,
    add up to at least p; the most probable token is always kept. Min-p (Nguyen et al. 2024) keeps tokens at least min_p
    times as probable as the most probable. Temperature 0 is treated as 1 here, one below `COLDEST` as that. What no row
    asks for is skipped.
    """
    temperature_B = jnp.where(params.temperature_B > 0, jnp.maximum(params.temperature_B, COLDEST), 1.0)
    scaled_BV = logits_BV.astype(jnp.float32) / temperature_B[:, None]
    of_top_k, of_top_p = params.top_k_B < logits_BV.shape[-1], params.top_p_B < 1
    kept_BV = _where_asked(of_top_k, _top_k, scaled_BV, params.top_k_B)
    kept_BV = _where_asked(of_top_p, _top_p, kept_BV, params.top_p_B)
    return _where_asked(params.min_p_B > 0, _min_p, kept_BV, params.min_p_B)


def _where_asked(asked_B: Array, keep: Callable, logits_BV: Array, setting_B: Array) -> Array:
    def cut() -> Array:
        kept_BV = keep(logits_BV, setting_B) | ~asked_B[:, None]
        return jnp.where(kept_BV, logits_BV, -jnp.inf)

    return jax.lax.cond(jnp.any(asked_B), cut, lambda: logits_BV)


def _top_k(logits_BV: Array, top_k_B: Array) -> Bool[Array, "B V"]:
    rank_BV = _ordered(logits_BV)
    cut_B = _largest(lambda cut_B: jnp.sum(rank_BV >= cut_B[:, None], axis=-1) >= top_k_B, len(logits_BV))
    above_BV = rank_BV > cut_B[:, None]
    return above_BV | _lowest(rank_BV == cut_B[:, None], top_k_B - jnp.sum(above_BV, axis=-1))


def _top_p(logits_BV: Array, top_p_B: Array) -> Bool[Array, "B V"]:
    rank_BV, probabilities_BV = _ordered(logits_BV), jax.nn.softmax(logits_BV, axis=-1)

    def sum_of(kept_BV: Array) -> Array:
        return jnp.sum(jnp.where(kept_BV, probabilities_BV, 0.0), axis=-1)

    # Rounding may bring the sum of all short of p.
    wanted_B = jnp.minimum(top_p_B, sum_of(jnp.ones_like(rank_BV, bool)))
    cut_B = _largest(lambda cut_B: sum_of(rank_BV >= cut_B[:, None]) >= wanted_B, len(logits_BV))
    above_BV, at_BV = rank_BV > cut_B[:, None], rank_BV == cut_B[:, None]
    each_B = jnp.max(jnp.where(at_BV, probabilities_BV, 0.0), axis=-1)
    needed_B = jnp.ceil((wanted_B - sum_of(above_BV)) / jnp.maximum(each_B, jnp.finfo(jnp.float32).tiny))
    needed_B = jnp.clip(needed_B, 1, logits_BV.shape[1]).astype(jnp.int32)
    return above_BV | _lowest(at_BV, needed_B)


def _min_p(logits_BV: Array, min_p_B: Array) -> Bool[Array, "B V"]:
    return logits_BV >= (jnp.max(logits_BV, axis=-1) + jnp.log(min_p_B))[:, None]


def _ordered(logits_BV: Array) -> UInt32[Array, "B V"]:
    """Integers in the order of the floats."""
    bits_BV = jax.lax.bitcast_convert_type(logits_BV + 0.0, jnp.uint32)  # + 0: of the two zeros one
    return jnp.where(bits_BV >> 31 == 1, ~bits_BV, bits_BV | jnp.uint32(1 << 31))


def _largest(holds: Callable[[Array], Array], num_rows: int) -> UInt32[Array, " B"]:
    """The largest integer of each row for which `holds`; it holds for 0, and for all below one that it holds for."""

    def with_bit(index: Array, found_B: Array) -> Array:
        tried_B = found_B | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        return jnp.where(holds(tried_B), tried_B, found_B)

    return jax.lax.fori_loop(0, 32, with_bit, jnp.zeros(num_rows, jnp.uint32))


def _lowest(tied_BV: Array, count_B: Array) -> Array:
    """`tied_BV` with only the first `count_B` of each row left."""
    few = jnp.any(jnp.sum(tied_BV, axis=-1) > count_B)
    return jax.lax.cond(few, lambda: tied_BV & (jnp.cumsum(tied_BV, axis=-1) <= count_B[:, None]), lambda: tied_BV)
