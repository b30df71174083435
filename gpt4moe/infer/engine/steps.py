"""What a step of the engine computes: prompts are read, a token for each row is drawn, or proposals are judged.

Traced, in: weights, what is held between steps, the step's inputs. Out: tokens and reports, and what is held next.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int

from gpt4moe.config.engine import EngineConfig
from gpt4moe.infer.decode_weights import DecoderWeights
from gpt4moe.infer.decoder import Decoder, DecodeReport
from gpt4moe.infer.engine import draws
from gpt4moe.infer.engine import media as seen
from gpt4moe.infer.engine.draws import Drawn, SlotMemory
from gpt4moe.infer.engine.inputs import StepInputs
from gpt4moe.infer.pages import Pages
from gpt4moe.infer.sampling import draw, filtered_logits
from gpt4moe.infer.speculative import PROPOSES
from gpt4moe.model.cross_attention import Media
from gpt4moe.types import Array

SCORED_TOKENS = 64  # of a prompt, whose logits are held at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probability of the token after each of a prompt's, and of the likeliest ones."""

    logprobs_BT: Float32[Array, "B T"]
    top_ids_BTJ: Int[Array, "B T J"]
    top_logprobs_BTJ: Float32[Array, "B T J"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOut:
    """drawn: the rows' tokens; reports: of every stage; scores: of a chunk of prompts, None of others."""

    drawn: Drawn
    reports: tuple[DecodeReport, ...]
    scores: Scores | None

    @property
    def load_LE(self) -> Int[np.ndarray, "L E"]:
        """Choices of each expert in every layer with experts, on the host."""
        return np.concatenate([np.asarray(report.load_LE) for report in self.reports])

    @property
    def choices_LBTK(self) -> Int[np.ndarray, "L B T K"]:
        """Where tokens went, on the host."""
        return np.concatenate([np.asarray(report.choices.expert_ids_BTK) for report in self.reports])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """What lies on the device between steps: pages of the model and of the one that proposes, what is known of slots.

    media: the images of the row in each slot, None for a text model.
    """

    pages: Pages
    draft_pages: Pages | None
    memory: SlotMemory
    media: Media | None


@dataclasses.dataclass(frozen=True)
class Steps:
    """The functions of the programs; weights come as `leaves` of `tree`, a pair of the model's and the draft's.

    draft: a model that proposes tokens and reads what the model reads, or None.
    """

    decoder: Decoder
    draft: Decoder | None
    config: EngineConfig
    tree: jax.tree_util.PyTreeDef

    def look(self, leaves: list[Array], media: Media, slot: Array, pixels: Array, valid: Array) -> Media:
        """Puts what the model needs of the pictures of a row into its slot; donate the media."""
        weights, _ = self._weights(leaves)
        return seen.look(self.decoder, weights, media, slot, pixels, valid)

    def decode(self, leaves: list[Array], held: Held, inputs: StepInputs, x_BTD: Array | None) -> tuple[StepOut, Held]:
        """A token for every row of the slots that are decoded together."""
        weights, _ = self._weights(leaves)
        x_BTD, pages, report = self._read(weights, held, inputs, x_BTD, in_slots=True)
        drawn, memory = self._draw(weights, x_BTD, held.memory, inputs)
        return _out(drawn, report), _held(held, pages, held.draft_pages, memory)

    def prefill(self, leaves: list[Array], held: Held, inputs: StepInputs, x_BTD: Array | None) -> tuple[StepOut, Held]:
        """A chunk of prompts is read, by the draft too; a token for every row whose prompt ends with it."""
        weights, draft_weights = self._weights(leaves)
        x_BTD, pages, report = self._read(weights, held, inputs, x_BTD, in_slots=False)
        drawn, memory = self._draw(weights, x_BTD, held.memory, inputs)
        draft_pages = held.draft_pages
        if self.draft is not None:
            tokens = inputs.tokens_BT, inputs.positions_BT, inputs.valid_BT
            _, draft_pages, _ = self.draft.forward(draft_weights, *tokens, draft_pages, inputs.table_BX)
        return _out(drawn, report, self._scores(weights, x_BTD, inputs)), _held(held, pages, draft_pages, memory)

    def verify(self, leaves: list[Array], held: Held, inputs: StepInputs, x_BTD: Array | None) -> tuple[StepOut, Held]:
        """The proposals to every row are judged in one pass; the draft makes them where there is one."""
        weights, draft_weights = self._weights(leaves)
        draft_pages, proposer_BTV = held.draft_pages, None
        if self.draft is not None:
            tokens_BT, proposer_BTV, draft_pages = self._propose(draft_weights, held.draft_pages, inputs)
            inputs = dataclasses.replace(inputs, tokens_BT=tokens_BT)
        x_BTD, pages, report = self._read(weights, held, inputs, x_BTD, in_slots=True)
        # What stands in the place after the t-th token is the next one; after the last there is no proposal.
        proposed_BT = jnp.pad(inputs.tokens_BT[:, 1:], ((0, 0), (0, 1)))
        proposed = draws.Proposed(proposed_BT, inputs.num_proposed_B, proposer_BTV)
        logits_BTV = self.decoder.logits(weights, x_BTD)
        drawn, memory = draws.judge_rows(logits_BTV, proposed, inputs.asked, held.memory, self.config.max_logprobs)
        return _out(drawn, report), _held(held, pages, draft_pages, memory)

    def _weights(self, leaves: list[Array]) -> tuple[DecoderWeights, DecoderWeights | None]:
        """Those of the model, as they lie on a device, and those of the draft."""
        weights, draft_weights = jax.tree.unflatten(self.tree, leaves)
        return self.decoder.shards.local(weights), draft_weights

    def _read(
        self, weights: DecoderWeights, held: Held, inputs: StepInputs, x_BTD: Array | None, *, in_slots: bool
    ) -> tuple[Array, Pages, DecodeReport]:
        tokens = (inputs.tokens_BT, inputs.positions_BT, inputs.valid_BT)
        given = {"x_BTD": x_BTD, "replay_ids_BTLK": inputs.replay_ids_BTLK, "with_choices": True}
        media = seen.in_sight(held.media, inputs, in_slots=in_slots)
        return self.decoder.forward(weights, *tokens, held.pages, inputs.table_BX, media=media, **given)

    def _draw(
        self, weights: DecoderWeights, x_BTD: Array, memory: SlotMemory, inputs: StepInputs
    ) -> tuple[Drawn, SlotMemory]:
        last_BD = x_BTD[jnp.arange(len(x_BTD)), inputs.last_B]
        logits_BV = self.decoder.logits(weights, last_BD)
        return draws.draw_rows(logits_BV, inputs.asked, memory, self.config.max_logprobs)

    def _propose(self, weights: DecoderWeights, pages: Pages, inputs: StepInputs) -> tuple[Array, Array, Pages]:
        """The rows' tokens with the draft's proposals behind the first, and the logits that each was drawn from.

        The draft reads its last proposal too: where all of them stand, its pages have a token as the model's have.
        """
        length, settings = inputs.tokens_BT.shape[1], inputs.settings
        keys_BT = draws.place_keys(settings, length)
        tokens, kept = [inputs.tokens_BT[:, 0]], []
        for place in range(length):
            token_B1, valid_B1 = tokens[place][:, None], inputs.valid_BT[:, place, None]
            given = token_B1, inputs.positions_BT[:, place, None], valid_B1, pages, inputs.table_BX
            x_B1D, pages, _ = self.draft.forward(weights, *given)
            logits_BV = self.draft.logits(weights, x_B1D[:, 0])
            kept_BV = filtered_logits(logits_BV, settings.params)
            drawn_B = draw(kept_BV, jax.vmap(jax.random.fold_in, (0, None))(keys_BT[:, place], PROPOSES))
            greedy_B = jnp.argmax(logits_BV, axis=-1)
            tokens.append(jnp.where(settings.params.temperature_B > 0, drawn_B, greedy_B).astype(jnp.int32))
            kept.append(kept_BV)
        return jnp.stack(tokens[:length], axis=1), jnp.stack(kept, axis=1), pages

    def _scores(self, weights: DecoderWeights, x_BTD: Array, inputs: StepInputs) -> Scores:
        """Of a few tokens at a time: logits of all would be the largest array of the program."""
        rows, length, dim = x_BTD.shape
        block = math.gcd(SCORED_TOKENS, rows * length)
        wants_BT = inputs.valid_BT & inputs.scored_B[:, None]
        wants_top_BT = wants_BT & inputs.settings.wants_top_B[:, None]

        def of_block(given: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array]:
            x_UD, *asked = given
            return draws.report_logprobs(self.decoder.logits(weights, x_UD), *asked, self.config.max_logprobs)

        def computed() -> tuple[Array, ...]:
            x_GUD = x_BTD.reshape(-1, block, dim)
            asked = [leaf.reshape(-1, block) for leaf in (inputs.next_BT, wants_BT, wants_top_BT)]
            return jax.lax.map(of_block, (x_GUD, *asked))

        def nothing() -> tuple[Array, ...]:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(computed))

        scored = jax.lax.cond(jnp.any(wants_BT), computed, nothing)
        return Scores(*(leaf.reshape(rows, length, *leaf.shape[2:]) for leaf in scored))


def _held(held: Held, pages: Pages, draft_pages: Pages | None, memory: SlotMemory) -> Held:
    return dataclasses.replace(held, pages=pages, draft_pages=draft_pages, memory=memory)


def _out(drawn: Drawn, report: DecodeReport, scores: Scores | None = None) -> StepOut:
    return StepOut(drawn, (report,), scores)
