"""The compiled programs of the engine, and what lies on the device between their runs.

In: a decoder and the engine's sizes. Out: `Programs`, which runs a step on the pages and on the memory of the slots.
Each program has one shape, all of them are known beforehand, and none is compiled twice.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int

from gpt4moe.config.engine import EngineConfig
from gpt4moe.infer.decode_weights import DecoderWeights
from gpt4moe.infer.decoder import Decoder, DecodeReport
from gpt4moe.infer.engine import draws
from gpt4moe.infer.engine.draws import Drawn, SlotMemory
from gpt4moe.infer.engine.inputs import (
    StepInputs,
    StepShape,
    blank_inputs,
    decode_shapes,
    filler_settings,
    prefill_shapes,
    verify_shapes,
)
from gpt4moe.infer.engine.media import in_sight, init_media, look, stacked
from gpt4moe.infer.engine.relay import Relay
from gpt4moe.infer.pages import Pages
from gpt4moe.infer.pictures import Picture
from gpt4moe.infer.sampling import draw, filtered_logits
from gpt4moe.infer.shards import EVERYWHERE, PAGES
from gpt4moe.infer.speculative import PROPOSES
from gpt4moe.model.cross_attention import Media
from gpt4moe.types import Array

SCORED_TOKENS = 64  # of a prompt, whose logits are held at once
COMPILED = "/jax/core/compile/backend_compile_duration"


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


class Programs:
    """`step` runs a program on what is `held`, which it replaces; `num_late` were compiled after the warm-up.

    stages: the decoders of the pipeline's stages, mostly one; those before the last are `relays`, and the slots are
    decoded in as many groups of `slots_together`. draft: a model with the same vocabulary that proposes tokens. It
    reads what the model reads, into pages of its own that stand where the model's do.
    """

    def __init__(
        self,
        stages: Sequence[Decoder],
        config: EngineConfig,
        num_pages: int,
        max_length: int,
        draft: Decoder | None = None,
    ):
        *before, decoder = stages
        self.decoder, self.draft, self.config, self.num_pages = decoder, draft, config, num_pages
        self.slots_together = config.slots // len(stages)
        self.decode_shapes = [] if self._always_verifies() else decode_shapes(config, max_length, self.slots_together)
        self.verify_shapes = verify_shapes(config, max_length, self.slots_together)
        self.prefill_shapes = prefill_shapes(config, max_length)
        self.relays = [Relay(stage, num_pages, config.page_size) for stage in before]
        self.seconds: dict[StepShape, float] = {}
        self.num_late, self._warm = 0, False
        self._compiled: dict[StepShape, Callable] = {}
        # A flat list: the smaller the tree, the less every call spends on it.
        shards = decoder.shards
        weights = decoder.weights, None if draft is None else shards.put(draft.weights)
        self._leaves, self._tree = jax.tree.flatten(weights)
        leaves, held = shards.specs(self._leaves), Held(PAGES, EVERYWHERE, EVERYWHERE, EVERYWHERE)
        specs = (leaves, held, EVERYWHERE, EVERYWHERE), (EVERYWHERE, held)
        steps = {"decode": self._decoded, "verify": self._verified, "prefill": self._prefilled}
        self._steps = {kind: jax.jit(shards.island(step, *specs), donate_argnums=1) for kind, step in steps.items()}
        self._remember = jax.jit(shards.island(draws.remember, EVERYWHERE, EVERYWHERE), donate_argnums=0)
        looked = shards.island(self._looked, (leaves, *(EVERYWHERE,) * 4), EVERYWHERE)
        self._look = jax.jit(looked, donate_argnums=1)
        self.reset()

    def reset(self) -> None:
        """Empties pages and memory: at the beginning, and where a fault has cost them."""
        self.held = None  # so that there is room: the next are as large
        sizes, slots = (self.num_pages, self.config.page_size), self.config.slots
        decoder, made = self.decoder, self.decoder.shards.made
        draft_pages = None if self.draft is None else made(lambda: self.draft.init_pages(*sizes))
        memory = made(lambda: draws.init_memory(slots, decoder.config.vocab_size))
        media = made(lambda: init_media(decoder, self.config))
        self.held = Held(made(lambda: decoder.init_pages(*sizes), PAGES), draft_pages, memory, media)
        for relay in self.relays:
            relay.reset()

    def warm_up(self, progress: Callable[[str], None] | None = None) -> dict[StepShape, float]:
        """Compiles every program that is not yet, telling each and its seconds; returns the seconds of all."""
        say = progress or (lambda line: None)
        shapes = (*self.decode_shapes, *self.verify_shapes, *self.prefill_shapes)
        wanted = [shape for shape in shapes if shape not in self._compiled]
        say(f"compiling {len(wanted)} programs")
        # XLA compiles without the interpreter's lock: while one program is compiled the next is traced.
        with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for number, shape in enumerate(pool.map(self._compile, wanted), start=1):
                say(f"{number:3} of {len(wanted)}: {shape}, {self.seconds[shape]:.1f} s")
        vocab_size = self.decoder.config.vocab_size
        nothing = SlotMemory(*(np.zeros(vocab_size, leaf.dtype) for leaf in jax.tree.leaves(self.held.memory)))
        self.remember(0, nothing)
        if self.held.media is not None:
            say("compiling what looks at pictures")
            self.look(0, ())
        self._warm = True
        return {shape: self.seconds[shape] for shape in shapes}

    def step(self, shape: StepShape, inputs: StepInputs) -> StepOut:
        """Runs the program of a shape; the result may still be on its way when this returns."""
        if shape not in self._compiled:
            self.num_late += self._warm
            self._compile(shape)
        x_BTD, reports = None, []
        for relay in self.relays:
            x_BTD, report = relay(shape, inputs, x_BTD)
            reports.append(report)
        out, self.held = self._compiled[shape](self._leaves, self.held, inputs, self.decoder.shards.put(x_BTD))
        return dataclasses.replace(out, reports=(*reports, *out.reports))

    def remember(self, slot: int, row: SlotMemory) -> None:
        """Puts what penalties and bias need to know of a row into its slot."""
        memory = self._remember(self.held.memory, np.int32(slot), row)
        self.held = dataclasses.replace(self.held, memory=memory)

    def look(self, slot: int, pictures: Sequence[Picture]) -> None:
        """Looks at the pictures of the row that has entered a slot."""
        pixels, valid = stacked(pictures, self.decoder.config, self.config)
        media = self._look(self._leaves, self.held.media, np.int32(slot), pixels, valid)
        self.held = dataclasses.replace(self.held, media=media)

    def text(self, shape: StepShape) -> str:
        """The compiled program of a shape, for those who read what XLA made of it."""
        return self._compiled[shape].as_text()

    def _always_verifies(self) -> bool:
        """Where a model proposes, and where there may be only one lowering."""
        return self.config.draft_tokens > 0 and (self.draft is not None or self.config.deterministic)

    def _compile(self, shape: StepShape) -> StepShape:
        started = time.perf_counter()
        model = self.decoder.config
        inputs = blank_inputs(self.config, model, shape, filler_settings(shape.rows, model.vocab_size))
        for relay in self.relays:
            relay.compile(shape, inputs)
        given = self.decoder.shards.abstract((self._leaves, self.held, inputs))
        x_BTD = self.decoder.abstract_residual(shape.rows, shape.length)
        self._compiled[shape] = self._steps[shape.kind].lower(*given, x_BTD).compile()
        self.seconds[shape] = time.perf_counter() - started
        return shape

    def _looked(self, leaves: list[Array], media: Media, slot: Array, pixels: Array, valid: Array) -> Media:
        weights, _ = self._weights(leaves)
        return look(self.decoder, weights, media, slot, pixels, valid)

    def _weights(self, leaves: list[Array]) -> tuple[DecoderWeights, DecoderWeights | None]:
        """Those of the model, as they lie on a device, and those of the draft."""
        weights, draft_weights = jax.tree.unflatten(self._tree, leaves)
        return self.decoder.shards.local(weights), draft_weights

    def _decoded(
        self, leaves: list[Array], held: Held, inputs: StepInputs, x_BTD: Array | None
    ) -> tuple[StepOut, Held]:
        weights, _ = self._weights(leaves)
        x_BTD, pages, report = self._read(weights, held, inputs, x_BTD, in_slots=True)
        drawn, memory = self._draw(weights, x_BTD, held.memory, inputs)
        return _out(drawn, report), _held(held, pages, held.draft_pages, memory)

    def _prefilled(
        self, leaves: list[Array], held: Held, inputs: StepInputs, x_BTD: Array | None
    ) -> tuple[StepOut, Held]:
        weights, draft_weights = self._weights(leaves)
        x_BTD, pages, report = self._read(weights, held, inputs, x_BTD, in_slots=False)
        drawn, memory = self._draw(weights, x_BTD, held.memory, inputs)
        draft_pages = held.draft_pages
        if self.draft is not None:
            tokens = inputs.tokens_BT, inputs.positions_BT, inputs.valid_BT
            _, draft_pages, _ = self.draft.forward(draft_weights, *tokens, draft_pages, inputs.table_BX)
        return _out(drawn, report, self._scores(weights, x_BTD, inputs)), _held(held, pages, draft_pages, memory)

    def _verified(
        self, leaves: list[Array], held: Held, inputs: StepInputs, x_BTD: Array | None
    ) -> tuple[StepOut, Held]:
        weights, draft_weights = self._weights(leaves)
        draft_pages, proposer_BTV = held.draft_pages, None
        if self.draft is not None:
            tokens_BT, proposer_BTV, draft_pages = self._propose(draft_weights, held.draft_pages, inputs)
            inputs = dataclasses.replace(inputs, tokens_BT=tokens_BT)
        x_BTD, pages, report = self._read(weights, held, inputs, x_BTD, in_slots=True)
        # What stands in the place after the t-th token is the next one; after the last there is no proposal.
        proposed_BT = jnp.pad(inputs.tokens_BT[:, 1:], ((0, 0), (0, 1)))
        drawn, memory = draws.judge_rows(
            self.decoder.logits(weights, x_BTD),
            proposed_BT,
            inputs.num_proposed_B,
            proposer_BTV,
            inputs.settings,
            held.memory,
            inputs.slot_B,
            inputs.drawing_B,
            inputs.allowed_BW,
            self.config.max_logprobs,
        )
        return _out(drawn, report), _held(held, pages, draft_pages, memory)

    def _read(
        self, weights: DecoderWeights, held: Held, inputs: StepInputs, x_BTD: Array | None, *, in_slots: bool
    ) -> tuple[Array, Pages, DecodeReport]:
        tokens = (inputs.tokens_BT, inputs.positions_BT, inputs.valid_BT)
        given = {"x_BTD": x_BTD, "replay_ids_BTLK": inputs.replay_ids_BTLK, "with_choices": True}
        media = in_sight(held.media, inputs, in_slots=in_slots)
        return self.decoder.forward(weights, *tokens, held.pages, inputs.table_BX, media=media, **given)

    def _draw(
        self, weights: DecoderWeights, x_BTD: Array, memory: SlotMemory, inputs: StepInputs
    ) -> tuple[Drawn, SlotMemory]:
        last_BD = x_BTD[jnp.arange(len(x_BTD)), inputs.last_B]
        return draws.draw_rows(
            self.decoder.logits(weights, last_BD),
            inputs.settings,
            memory,
            inputs.slot_B,
            inputs.drawing_B,
            inputs.allowed_BW,
            self.config.max_logprobs,
        )

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


@contextlib.contextmanager
def forbid_compilation() -> Iterator[None]:
    """A `with` block in which XLA compiles nothing: raises `AssertionError` at its end where it did, by any thread."""
    seconds = []

    def heard(event: str, duration: float, **_: object) -> None:
        if event == COMPILED:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    if seconds:
        raise AssertionError(f"{len(seconds)} programs were compiled, in {sum(seconds):.1f} s")


def keep_programs(folder: str | os.PathLike) -> None:
    """Keeps compiled programs in a folder, small ones too, where the next process finds them."""
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
