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
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int

from gpt4moe.config.engine import EngineConfig
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.engine import draws
from gpt4moe.infer.engine.draws import Drawn, SlotMemory
from gpt4moe.infer.engine.inputs import (
    StepInputs,
    StepShape,
    blank_inputs,
    decode_shapes,
    filler_settings,
    prefill_shapes,
)
from gpt4moe.infer.pages import Pages
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
    """drawn: a token a row; load_LE and choices_LBTK: the experts; scores: of a chunk of prompts, else None."""

    drawn: Drawn
    load_LE: Int[Array, "L E"]
    choices_LBTK: Int[Array, "L B T K"]
    scores: Scores | None


class Programs:
    """`step` runs a program on `pages` and `memory`, which it replaces; `num_late` were compiled after the warm-up."""

    def __init__(self, decoder: Decoder, config: EngineConfig, num_pages: int, max_length: int):
        self.decoder, self.config, self.num_pages = decoder, config, num_pages
        self.decode_shapes = decode_shapes(config, max_length)
        self.prefill_shapes = prefill_shapes(config, max_length)
        self.seconds: dict[StepShape, float] = {}
        self.num_late, self._warm = 0, False
        self._compiled: dict[StepShape, Callable] = {}
        # A flat tuple: the smaller the tree, the less every call spends on it.
        self._leaves, self._tree = jax.tree.flatten(decoder.weights)
        self._step = jax.jit(self._stepped, donate_argnums=(1, 2))
        self._remember = jax.jit(draws.remember, donate_argnums=0)
        self.reset()

    def reset(self) -> None:
        """Empties pages and memory: at the beginning, and where a fault has cost them."""
        self.pages = self.decoder.init_pages(self.num_pages, self.config.page_size)
        self.memory = draws.init_memory(self.config.slots, self.decoder.config.vocab_size)

    def warm_up(self, progress: Callable[[str], None] | None = None) -> dict[StepShape, float]:
        """Compiles every program that is not yet, telling each and its seconds; returns the seconds of all."""
        say = progress or (lambda line: None)
        wanted = [shape for shape in (*self.decode_shapes, *self.prefill_shapes) if shape not in self._compiled]
        say(f"compiling {len(wanted)} programs")
        # XLA compiles without the interpreter's lock: while one program is compiled the next is traced.
        with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for number, shape in enumerate(pool.map(self._compile, wanted), start=1):
                say(f"{number:3} of {len(wanted)}: {shape}, {self.seconds[shape]:.1f} s")
        vocab_size = self.decoder.config.vocab_size
        nothing = SlotMemory(*(np.zeros(vocab_size, leaf.dtype) for leaf in jax.tree.leaves(self.memory)))
        self.remember(0, nothing)
        self._warm = True
        return dict(self.seconds)

    def step(self, inputs: StepInputs) -> StepOut:
        """Runs the program of these shapes; the result may still be on its way when this returns."""
        shape = StepShape(*inputs.tokens_BT.shape, inputs.table_BX.shape[1])
        if shape not in self._compiled:
            self.num_late += self._warm
            self._compile(shape)
        out, self.pages, self.memory = self._compiled[shape](self._leaves, self.pages, self.memory, inputs)
        return out

    def remember(self, slot: int, row: SlotMemory) -> None:
        """Puts what penalties and bias need to know of a row into its slot."""
        self.memory = self._remember(self.memory, np.int32(slot), row)

    def lower(self, shape: StepShape) -> jax.stages.Lowered:
        """The program of a shape, before it is compiled."""
        model = self.decoder.config
        inputs = blank_inputs(self.config, model, shape, filler_settings(shape.rows, model.vocab_size))
        arguments = (self._leaves, self.pages, self.memory, inputs)
        return self._step.lower(*jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments))

    def _compile(self, shape: StepShape) -> StepShape:
        started = time.perf_counter()
        self._compiled[shape] = self.lower(shape).compile()
        self.seconds[shape] = time.perf_counter() - started
        return shape

    def _stepped(
        self, leaves: list[Array], pages: Pages, memory: SlotMemory, inputs: StepInputs
    ) -> tuple[StepOut, Pages, SlotMemory]:
        weights = jax.tree.unflatten(self._tree, leaves)
        tokens = (inputs.tokens_BT, inputs.positions_BT, inputs.valid_BT)
        given = {"replay_ids_BTLK": inputs.replay_ids_BTLK, "with_choices": True}
        x_BTD, pages, report = self.decoder.forward(weights, *tokens, pages, inputs.table_BX, **given)
        last_BD = x_BTD[jnp.arange(len(x_BTD)), inputs.last_B]
        drawn, memory = draws.draw_rows(
            self.decoder.logits(weights, last_BD),
            inputs.settings,
            memory,
            inputs.slot_B,
            inputs.drawing_B,
            inputs.allowed_BW,
            self.config.max_logprobs,
        )
        scores = None if x_BTD.shape[1] == 1 else self._scores(weights, x_BTD, inputs)
        return StepOut(drawn, report.load_LE, report.choices.expert_ids_BTK, scores), pages, memory

    def _scores(self, weights: object, x_BTD: Array, inputs: StepInputs) -> Scores:
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
