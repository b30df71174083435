"""Speculative decoding: several tokens are proposed cheaply, one pass of the model judges them all.

In: what the model and the proposer hold likely at each place. Out: the tokens that stand, and one more. Rejection
sampling as of Leviathan et al. 2023 (Fast Inference from Transformers via Speculative Decoding): the tokens are drawn
from the model's own distribution, whatever was proposed; greedy rows get the tokens they would get one by one.
Proposals come from a smaller model, or from the row's own text, where what followed the last few tokens before is
likely to follow again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float32, Int, Key

from gpt4moe.infer.sampling import SamplingParams, draw, filtered_logits
from gpt4moe.types import Array

NGRAMS = (4, 3, 2)
ACCEPTS, PROPOSES = 1, 2  # numbers of the streams of random numbers beside the one that tokens are drawn with


class Lookup:
    """Proposes for one row what followed its last tokens when they stood together before (prompt lookup)."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._known = 0

    def propose(self, ids: list[int], most: int) -> list[int]:
        """So many tokens to come after `ids`, a text that only ever grows; none where nothing is alike.

        Where fewer have followed, the text repeats itself with that period and is taken to go on so.
        """
        for end in range(max(self._known, 1), len(ids)):
            for size in NGRAMS:
                if size <= end:
                    self._ends[tuple(ids[end - size : end])] = end
        self._known = max(self._known, len(ids))
        for size in NGRAMS:
            end = self._ends.get(tuple(ids[-size:])) if size <= len(ids) else None
            if end is not None:
                period = len(ids) - end
                return [ids[end + place % period] for place in range(most)]
        return []


def judge(
    logits_BTV: Float32[Array, "B T V"],
    proposed_BT: Int[Array, "B T"],
    num_proposed_B: Int[Array, " B"],
    params: SamplingParams,
    keys_BT: Key[Array, "B T"],
    proposer_BTV: Float32[Array, "B T V"] | None = None,
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Returns the tokens [B, T] that rows gain and how many of them [B], from one to one more than were proposed.

    logits_BTV: the model's after each of the T tokens that it has read, the last token of the row and the proposals but
    for the last place's; proposed_BT[:, t] stands in the place that logits_BTV[:, t] is about. proposer_BTV: the logits
    that the proposals were drawn from, filtered; None where they were not drawn but looked up. keys_BT: of each place.
    """
    rows, length, vocab_size = logits_BTV.shape
    greedy_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
    equal_BT = proposed_BT == greedy_BT

    def drawn() -> tuple[Array, Array]:
        flat = jax.tree.map(lambda setting_B: jnp.repeat(setting_B, length), params)
        kept_BTV = filtered_logits(logits_BTV.reshape(-1, vocab_size), flat).reshape(logits_BTV.shape)
        chance_BT, rest_BTV = _chances(kept_BTV, proposed_BT, proposer_BTV)
        uniform_BT = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, ACCEPTS))))(keys_BT)
        accepted_BT = jnp.where(params.temperature_B[:, None] > 0, uniform_BT < chance_BT, equal_BT)
        num_B = _leading(accepted_BT, num_proposed_B)
        refused_B1 = (num_B < num_proposed_B)[:, None]
        last_BV = jnp.where(refused_B1, _at(rest_BTV, num_B), _at(kept_BTV, num_B))
        last_B = jnp.where(params.temperature_B > 0, draw(last_BV, _at(keys_BT, num_B)), _at(greedy_BT, num_B))
        return num_B, last_B.astype(jnp.int32)

    def looked_up() -> tuple[Array, Array]:
        num_B = _leading(equal_BT, num_proposed_B)
        return num_B, _at(greedy_BT, num_B)

    num_B, last_B = jax.lax.cond(jnp.any(params.temperature_B > 0), drawn, looked_up)
    return proposed_BT.at[jnp.arange(rows), num_B].set(last_B), num_B + 1


def _chances(kept_BTV: Array, proposed_BT: Array, proposer_BTV: Array | None) -> tuple[Array, Array]:
    """How likely each proposal is to stand, min(1, p / q), and the logits of what is drawn in its place, (p - q)+."""
    p_BTV = jax.nn.softmax(kept_BTV, axis=-1)
    proposed_BT1 = proposed_BT[..., None]
    if proposer_BTV is None:
        q_BTV = jax.nn.one_hot(proposed_BT, kept_BTV.shape[-1])
    else:
        q_BTV = jax.nn.softmax(proposer_BTV, axis=-1)
    p_BT, q_BT = (jnp.take_along_axis(each, proposed_BT1, axis=-1)[..., 0] for each in (p_BTV, q_BTV))
    rest_BTV = jnp.maximum(p_BTV - q_BTV, 0.0)
    # Nothing is left where both are the same: then nothing is refused but by rounding.
    some_BT1 = jnp.any(rest_BTV > 0, axis=-1, keepdims=True)
    return p_BT / jnp.maximum(q_BT, jnp.finfo(jnp.float32).tiny), jnp.where(some_BT1, jnp.log(rest_BTV), kept_BTV)


def _leading(accepted_BT: Array, num_proposed_B: Array) -> Array:
    """How many proposals stand: those before the first that does not."""
    stands_BT = accepted_BT & (jnp.arange(accepted_BT.shape[1]) < num_proposed_B[:, None])
    return jnp.sum(jnp.cumprod(stands_BT, axis=1), axis=1)


def _at(of_places: Array, place_B: Array) -> Array:
    return of_places[jnp.arange(len(place_B)), place_B]
