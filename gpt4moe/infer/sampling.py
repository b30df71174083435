"""Choosing the next token from logits: temperature, top-k, top-p, greedy; every row has its own settings.

In: float32 logits [B, V], `SamplingParams` (one entry a row) and one random key a row. Out: token ids [B] and the
model's own log-probability of each.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int, Integer, Key

from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of each row, traced, so that one compiled program serves them all.

    temperature_B: float32, 0 is greedy; top_k_B: int32, the vocabulary size keeps everything; top_p_B: float32,
    1 keeps everything.
    """

    temperature_B: Float[Array, " B"]
    top_k_B: Int[Array, " B"]
    top_p_B: Float[Array, " B"]


def sampling_params(configs: list[SamplingConfig], vocab_size: int) -> SamplingParams:
    """`SamplingParams` of one row per config."""
    return SamplingParams(
        temperature_B=jnp.array([config.temperature for config in configs], jnp.float32),
        top_k_B=jnp.array([min(config.top_k or vocab_size, vocab_size) for config in configs], jnp.int32),
        top_p_B=jnp.array([config.top_p for config in configs], jnp.float32),
    )


def row_keys(seeds_B: Integer[Array, " B"]) -> Key[Array, " B"]:
    """One key per row from its seed and its place, so that a row's draws do not depend on its neighbours."""
    return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(
        seeds_B, jnp.arange(seeds_B.shape[0])
    )


def sample(
    logits_BV: Float[Array, "B V"], params: SamplingParams, keys_B: Key[Array, " B"]
) -> tuple[Int[Array, " B"], Float32[Array, " B"]]:
    """Token ids [B] int32 and their log-probabilities [B] under the unmodified distribution (temperature 1, no filter).

    A row of temperature 0 takes the largest logit, the lowest id where several are equal. The others draw from
    `filtered_logits`.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1)

    def draw() -> Array:
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, filtered_logits(logits_BV, params))
        return jnp.where(params.temperature_B > 0, drawn_B, greedy_B)

    # Sorting the vocabulary costs more than the rest of a small model's decode step: skip it where nobody samples.
    ids_B = jax.lax.cond(jnp.any(params.temperature_B > 0), draw, lambda: greedy_B)
    return ids_B.astype(jnp.int32), token_logprobs(logits_BV, ids_B)


def token_logprobs(logits_BV: Float[Array, "B V"], ids_B: Int[Array, " B"]) -> Float32[Array, " B"]:
    """log p(id) [B] float32 of one id per row under the softmax of the logits."""
    logprobs_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(logprobs_BV, ids_B[:, None], axis=-1)[:, 0]


def filtered_logits(logits_BV: Float[Array, "B V"], params: SamplingParams) -> Float32[Array, "B V"]:
    """Logits [B, V] divided by the temperature, -inf outside the tokens that top-k and then top-p keep.

    Top-k keeps exactly k tokens, of equal logits the lower ids. Top-p (Holtzman et al. 2019, The Curious Case of
    Neural Text Degeneration) keeps the fewest most probable tokens whose probabilities, renormalised after top-k,
    add up to at least p; the most probable token is always kept. Temperature 0 is treated as 1 here.
    """
    temperature_B = jnp.where(params.temperature_B > 0, params.temperature_B, 1.0)
    scaled_BV = logits_BV.astype(jnp.float32) / temperature_B[:, None]
    unfiltered = jnp.all((params.top_k_B >= logits_BV.shape[-1]) & (params.top_p_B >= 1))
    return jax.lax.cond(unfiltered, lambda: scaled_BV, lambda: _filter(scaled_BV, params))


def _filter(scaled_BV: Array, params: SamplingParams) -> Array:
    order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    in_top_k_BV = jnp.arange(scaled_BV.shape[-1]) < params.top_k_B[:, None]
    probabilities_BV = jax.nn.softmax(jnp.where(in_top_k_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    # Rounding may bring the sum to 1 before the last tokens: top_p 1 must keep those too.
    in_top_p_BV = (before_BV < params.top_p_B[:, None]) | (params.top_p_B[:, None] >= 1)
    kept_BV = jnp.where(in_top_k_BV & in_top_p_BV, sorted_BV, -jnp.inf)
    rows_B1 = jnp.arange(scaled_BV.shape[0])[:, None]
    return jnp.zeros_like(scaled_BV).at[rows_B1, order_BV].set(kept_BV)
