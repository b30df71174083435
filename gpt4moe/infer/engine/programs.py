"""The compiled programs of the engine, and what lies on the device between their runs.

In: a decoder, the engine's sizes, the functions of `steps`. Out: `Programs`, which runs a step on the pages and on the
memory of the slots. Each program has one shape, all of them are known beforehand, and none is compiled twice.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from gpt4moe.config.engine import EngineConfig
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.engine import draws
from gpt4moe.infer.engine.draws import SlotMemory
from gpt4moe.infer.engine.inputs import (
    StepInputs,
    StepShape,
    blank_inputs,
    decode_shapes,
    filler_settings,
    prefill_shapes,
    verify_shapes,
)
from gpt4moe.infer.engine.media import init_media, stacked
from gpt4moe.infer.engine.relay import Relay
from gpt4moe.infer.engine.steps import Held, StepOut, Steps
from gpt4moe.infer.pictures import Picture
from gpt4moe.infer.shards import EVERYWHERE, PAGES


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
        self._leaves, tree = jax.tree.flatten(weights)
        steps = Steps(decoder, draft, config, tree)
        leaves, held = shards.specs(self._leaves), Held(PAGES, EVERYWHERE, EVERYWHERE, EVERYWHERE)
        specs = (leaves, held, EVERYWHERE, EVERYWHERE), (EVERYWHERE, held)
        by_kind = {"decode": steps.decode, "verify": steps.verify, "prefill": steps.prefill}
        self._steps = {kind: jax.jit(shards.island(step, *specs), donate_argnums=1) for kind, step in by_kind.items()}
        self._remember = jax.jit(shards.island(draws.remember, EVERYWHERE, EVERYWHERE), donate_argnums=0)
        looked = shards.island(steps.look, (leaves, *(EVERYWHERE,) * 4), EVERYWHERE)
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
