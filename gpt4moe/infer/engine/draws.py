"""The part of a compiled step that chooses tokens: every row with settings of its own, each of them traced.

In: logits of a batch of rows, what each row asks for, what the device remembers of each slot. Out: a token a row, and
log-probabilities where they were asked for. What no row of a batch asks for is skipped as the program runs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt32

from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.sampling import SamplingParams, choose, row_keys, sampling_params
from gpt4moe.types import Array

MASK_BITS = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSettings:
    """What each row of a batch asks for; made on the host.

    seed_B uint32 and draw_B int32 name the row's stream of random numbers, num_drawn_B how many it has used. biased_B
    and constrained_B: whether the row has a bias, a mask of allowed tokens. wants_logprob_B, wants_top_B: whether to
    report the log-probability of the token drawn, and the likeliest tokens.
    """

    params: SamplingParams
    repetition_B: Float[Array, " B"]
    presence_B: Float[Array, " B"]
    frequency_B: Float[Array, " B"]
    seed_B: UInt32[Array, " B"]
    draw_B: Int[Array, " B"]
    num_drawn_B: Int[Array, " B"]
    biased_B: Bool[Array, " B"]
    constrained_B: Bool[Array, " B"]
    wants_logprob_B: Bool[Array, " B"]
    wants_top_B: Bool[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotMemory:
    """What the device remembers of the row in each slot, for penalties and biases: [slots, V] each.

    counts: how often each token stands in the continuation; in_prompt: whether it stands in the prompt; bias.
    """

    counts: Int[Array, "slots V"]
    in_prompt: Bool[Array, "slots V"]
    bias: Float32[Array, "slots V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """ids_B, the tokens drawn; logprobs_B theirs under the model's own distribution; top_*_BJ of the likeliest."""

    ids_B: Int[Array, " B"]
    logprobs_B: Float32[Array, " B"]
    top_ids_BJ: Int[Array, "B J"]
    top_logprobs_BJ: Float32[Array, "B J"]


def init_memory(slots: int, vocab_size: int) -> SlotMemory:
    """Returns memory of slots without rows."""
    shape = (slots, vocab_size)
    return SlotMemory(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))


def remember(memory: SlotMemory, slot: Int[Array, ""], row: SlotMemory) -> SlotMemory:
    """Returns the memory (donate it) with that of one row, [V] each, in a slot."""
    return jax.tree.map(lambda all_rows, one: all_rows.at[slot].set(one), memory, row)


def penalised(config: SamplingConfig) -> bool:
    """Whether a row needs to be remembered: it has a penalty or a bias."""
    return bool(
        config.repetition_penalty != 1 or config.presence_penalty or config.frequency_penalty or config.logit_bias
    )


def row_memory(config: SamplingConfig, prompt_ids: tuple[int, ...], new_ids: list[int], vocab_size: int) -> SlotMemory:
    """What to remember of a row that enters a slot, on the host."""
    counts, in_prompt = np.zeros(vocab_size, np.int32), np.zeros(vocab_size, bool)
    bias = np.zeros(vocab_size, np.float32)
    np.add.at(counts, np.asarray(new_ids, int), 1)
    in_prompt[list(prompt_ids)] = True
    for token, added in config.logit_bias:
        bias[token] = added
    return SlotMemory(counts, in_prompt, bias)


def row_settings(
    configs: list[SamplingConfig], draws: list[int], num_drawn: list[int], constrained: list[bool], vocab_size: int
) -> RowSettings:
    """`RowSettings` of one row a config, on the host."""

    def each(name: str, kind: type) -> np.ndarray:
        return np.array([getattr(config, name) for config in configs], kind)

    return RowSettings(
        params=sampling_params(configs, vocab_size),
        repetition_B=each("repetition_penalty", np.float32),
        presence_B=each("presence_penalty", np.float32),
        frequency_B=each("frequency_penalty", np.float32),
        seed_B=each("seed", np.uint32),
        draw_B=np.array(draws, np.int32),
        num_drawn_B=np.array(num_drawn, np.int32),
        biased_B=np.array([bool(config.logit_bias) for config in configs]),
        constrained_B=np.array(constrained),
        wants_logprob_B=np.array([config.logprobs is not None for config in configs]),
        wants_top_B=np.array([bool(config.logprobs) for config in configs]),
    )


def draw_rows(
    logits_BV: Float32[Array, "B V"],
    settings: RowSettings,
    memory: SlotMemory,
    slot_B: Int[Array, " B"],
    drawing_B: Bool[Array, " B"],
    allowed_BW: UInt32[Array, "B W"],
    num_top: int,
) -> tuple[Drawn, SlotMemory]:
    """Returns a token for each row and the memory (donate it) with the tokens of the rows that are `drawing_B` counted.

    slot_B: where each row is remembered. allowed_BW: a bit for every token that a constrained row may draw. `num_top`
    likeliest tokens are reported where a row wants them.
    """
    shaped_BV = shaped_logits(logits_BV, settings, memory, slot_B, allowed_BW)
    keys_B = jax.vmap(jax.random.fold_in)(row_keys(settings.seed_B, settings.draw_B), settings.num_drawn_B)
    ids_B = choose(shaped_BV, settings.params, keys_B)
    # Past the last slot: the scatter leaves it out.
    counted_B = jnp.where(drawing_B, slot_B, len(memory.counts))
    counts = memory.counts.at[counted_B, ids_B].add(1, mode="drop")
    wants_B = settings.wants_logprob_B & drawing_B
    logprobs_B, top_ids_BJ, top_BJ = report_logprobs(logits_BV, ids_B, wants_B, settings.wants_top_B, num_top)
    return Drawn(ids_B, logprobs_B, top_ids_BJ, top_BJ), dataclasses.replace(memory, counts=counts)


def shaped_logits(
    logits_BV: Array, settings: RowSettings, memory: SlotMemory, slot_B: Array, allowed_BW: Array
) -> Float32[Array, "B V"]:
    """Returns the logits after bias and penalties, -inf where a constraint forbids a token."""
    slot_B = jnp.minimum(slot_B, len(memory.counts) - 1)

    def punished(logits_BV: Array) -> Array:
        counts_BV = memory.counts[slot_B]
        seen_BV = memory.in_prompt[slot_B] | (counts_BV > 0)
        factor_B1 = settings.repetition_B[:, None]
        repeated_BV = jnp.where(logits_BV > 0, logits_BV / factor_B1, logits_BV * factor_B1)
        present_BV = settings.presence_B[:, None] * (counts_BV > 0)
        return jnp.where(seen_BV, repeated_BV, logits_BV) - present_BV - settings.frequency_B[:, None] * counts_BV

    def biased(logits_BV: Array) -> Array:
        return logits_BV + jnp.where(settings.biased_B[:, None], memory.bias[slot_B], 0.0)

    def constrained(logits_BV: Array) -> Array:
        bits = (allowed_BW[..., None] >> jnp.arange(MASK_BITS, dtype=jnp.uint32)) & 1
        allowed_BV = bits.reshape(len(logits_BV), -1)[:, : logits_BV.shape[1]] > 0
        return jnp.where(allowed_BV | ~settings.constrained_B[:, None], logits_BV, -jnp.inf)

    def as_they_are(logits_BV: Array) -> Array:
        return logits_BV

    has_penalty = (settings.repetition_B != 1) | (settings.presence_B != 0) | (settings.frequency_B != 0)
    shaped_BV = jax.lax.cond(jnp.any(settings.biased_B), biased, as_they_are, logits_BV)
    shaped_BV = jax.lax.cond(jnp.any(has_penalty), punished, as_they_are, shaped_BV)
    return jax.lax.cond(jnp.any(settings.constrained_B), constrained, as_they_are, shaped_BV)


def report_logprobs(
    logits_UV: Array, ids_U: Array, wants_U: Array, wants_top_U: Array, num_top: int
) -> tuple[Float32[Array, " U"], Int[Array, "U J"], Float32[Array, "U J"]]:
    """Returns the log-probability of each id, and the ids and log-probabilities of the likeliest; 0 if nobody asks."""
    num, num_top = len(logits_UV), min(num_top, logits_UV.shape[1])

    def normaliser() -> Array:
        return jax.nn.logsumexp(logits_UV, axis=-1)

    sum_U = jax.lax.cond(jnp.any(wants_U), normaliser, lambda: jnp.zeros(num, jnp.float32))
    logprobs_U = jnp.take_along_axis(logits_UV, ids_U[:, None], axis=-1)[:, 0] - sum_U

    def likeliest() -> tuple[Array, Array]:
        top_UJ, ids_UJ = jax.lax.top_k(logits_UV, num_top)
        return ids_UJ.astype(jnp.int32), top_UJ - sum_U[:, None]

    def nothing() -> tuple[Array, Array]:
        return jnp.zeros((num, num_top), jnp.int32), jnp.zeros((num, num_top), jnp.float32)

    return logprobs_U, *jax.lax.cond(jnp.any(wants_U & wants_top_U), likeliest, nothing)
