"""The part of a compiled step that chooses tokens: every row with settings of its own, each of them traced.

In: logits of a batch of rows, what each row asks for, what the device remembers of each slot. Out: a token a row, and
log-probabilities where they were asked for. What no row of a batch asks for is skipped as the program runs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Key, UInt32

from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.sampling import SamplingParams, choose, row_keys, sampling_params
from gpt4moe.infer.speculative import judge
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
class Asked:
    """What a batch of rows asks for, where each is remembered, and which of them draw.

    allowed_BW: a bit for every token that a constrained row may draw.
    """

    settings: RowSettings
    slot_B: Int[Array, " B"]
    drawing_B: Bool[Array, " B"]
    allowed_BW: UInt32[Array, "B W"]


@dataclasses.dataclass(frozen=True)
class Proposed:
    """Tokens to be judged, as `gpt4moe.infer.speculative.judge` takes them."""

    ids_BT: Int[Array, "B T"]
    num_B: Int[Array, " B"]
    logits_BTV: Float32[Array, "B T V"] | None


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
    """The first num_B of each row's ids_BT were drawn; logprobs_BT are theirs under the model's own distribution.

    top_*_BTJ: the likeliest tokens in the place of each.
    """

    ids_BT: Int[Array, "B T"]
    num_B: Int[Array, " B"]
    logprobs_BT: Float32[Array, "B T"]
    top_ids_BTJ: Int[Array, "B T J"]
    top_logprobs_BTJ: Float32[Array, "B T J"]


def init_memory(slots: int, vocab_size: int) -> SlotMemory:
    """Returns memory of slots without rows."""
    shape = (slots, vocab_size)
    return SlotMemory(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))


def remember(memory: SlotMemory, slot: Int[Array, ""], row: SlotMemory) -> SlotMemory:
    """Returns the memory (donate it) with that of one row, [V] each, in a slot."""
    return jax.tree.map(lambda all_rows, one: all_rows.at[slot].set(one), memory, row)


def counts_tokens(config: SamplingConfig) -> bool:
    """Whether a row has a penalty, so that the tokens before decide about each."""
    return config.repetition_penalty != 1 or config.presence_penalty != 0 or config.frequency_penalty != 0


def is_remembered(config: SamplingConfig) -> bool:
    """Whether a row needs memory in its slot: it has a penalty or a bias."""
    return counts_tokens(config) or bool(config.logit_bias)


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
    logits_BV: Float32[Array, "B V"], asked: Asked, memory: SlotMemory, num_top: int
) -> tuple[Drawn, SlotMemory]:
    """Returns a token for each row and the memory (donate it) with the tokens of the rows that draw counted.

    `num_top` likeliest tokens are reported where a row wants them.
    """
    shaped_BV = shaped_logits(logits_BV, asked, memory)
    ids_B = choose(shaped_BV, asked.settings.params, place_keys(asked.settings, 1)[:, 0])
    return _drawn(logits_BV[:, None], ids_B[:, None], jnp.ones_like(ids_B), asked, memory, num_top)


def judge_rows(
    logits_BTV: Float32[Array, "B T V"], proposed: Proposed, asked: Asked, memory: SlotMemory, num_top: int
) -> tuple[Drawn, SlotMemory]:
    """`draw_rows` where tokens were proposed; a row with penalties or a constraint has none."""
    _, length, vocab_size = logits_BTV.shape
    flat = jax.tree.map(lambda leaf: jnp.repeat(leaf, length, axis=0), asked)
    shaped_BTV = shaped_logits(logits_BTV.reshape(-1, vocab_size), flat, memory).reshape(logits_BTV.shape)
    params, keys_BT = asked.settings.params, place_keys(asked.settings, length)
    ids_BT, num_B = judge(shaped_BTV, proposed.ids_BT, proposed.num_B, params, keys_BT, proposed.logits_BTV)
    return _drawn(logits_BTV, ids_BT, num_B, asked, memory, num_top)


def place_keys(settings: RowSettings, length: int) -> Key[Array, "B T"]:
    """A random key for each of the next tokens of each row, the same whatever is proposed or stands beside it."""
    number_BT = settings.num_drawn_B[:, None] + jnp.arange(length)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(row_keys(settings.seed_B, settings.draw_B), number_BT)


def _drawn(
    logits_BTV: Array, ids_BT: Array, num_B: Array, asked: Asked, memory: SlotMemory, num_top: int
) -> tuple[Drawn, SlotMemory]:
    """The tokens with what is reported of them, counted in the memory of the rows that draw."""
    settings = asked.settings
    stands_BT = (jnp.arange(ids_BT.shape[1]) < num_B[:, None]) & asked.drawing_B[:, None]
    # Past the last slot: the scatter leaves it out.
    counted_BT = jnp.where(stands_BT, asked.slot_B[:, None], len(memory.counts))
    counts = memory.counts.at[counted_BT, ids_BT].add(1, mode="drop")
    wants_BT, wants_top_BT = (
        (stands_BT & of_row[:, None]).reshape(-1) for of_row in (settings.wants_logprob_B, settings.wants_top_B)
    )
    flat_UV = logits_BTV.reshape(-1, logits_BTV.shape[-1])
    reports = report_logprobs(flat_UV, ids_BT.reshape(-1), wants_BT, wants_top_BT, num_top)
    reports = (leaf.reshape(*ids_BT.shape, *leaf.shape[1:]) for leaf in reports)
    return Drawn(ids_BT, num_B, *reports), dataclasses.replace(memory, counts=counts)


def shaped_logits(logits_BV: Array, asked: Asked, memory: SlotMemory) -> Float32[Array, "B V"]:
    """Returns the logits after bias and penalties, -inf where a constraint forbids a token."""
    settings, slot_B = asked.settings, jnp.minimum(asked.slot_B, len(memory.counts) - 1)

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
        bits = (asked.allowed_BW[..., None] >> jnp.arange(MASK_BITS, dtype=jnp.uint32)) & 1
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
