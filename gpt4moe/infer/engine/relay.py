"""A pipeline stage before the last as the engine runs it: tokens or a residual stream in, the residual stream out.

Calls return before the device is done, so that the rows of several steps are in several stages at once.
"""

from __future__ import annotations

import jax
from jaxtyping import Float

from gpt4moe.infer.decoder import Decoder, DecodeReport
from gpt4moe.infer.engine.inputs import StepInputs, StepShape
from gpt4moe.infer.pages import Pages
from gpt4moe.infer.shards import EVERYWHERE, PAGES
from gpt4moe.types import Array


class Relay:
    """The programs of a stage, by shape, and the `pages` of its layers, which every call replaces."""

    def __init__(self, decoder: Decoder, num_pages: int, page_size: int):
        self._decoder, self._sizes = decoder, (num_pages, page_size)
        self._leaves, self._tree = jax.tree.flatten(decoder.weights)
        shards = decoder.shards
        specs = {"in_specs": (shards.specs(self._leaves), PAGES, EVERYWHERE, EVERYWHERE)}
        step = shards.island(self._read, **specs, out_specs=(EVERYWHERE, PAGES, EVERYWHERE))
        self._step = jax.jit(step, donate_argnums=1)
        self._compiled: dict[StepShape, jax.stages.Compiled] = {}
        self.reset()

    def reset(self) -> None:
        """Empties the pages."""
        self.pages = None  # so that there is room: the next are as large
        self.pages = self._decoder.shards.made(lambda: self._decoder.init_pages(*self._sizes), PAGES)

    def compile(self, shape: StepShape, inputs: StepInputs) -> None:
        """Compiles the program of a shape, which has such inputs."""
        given = self._decoder.shards.abstract((self._leaves, self.pages, _tokens(inputs)))
        x_BTD = self._decoder.abstract_residual(shape.rows, shape.length)
        self._compiled[shape] = self._step.lower(*given, x_BTD).compile()

    def __call__(
        self, shape: StepShape, inputs: StepInputs, x_BTD: Float[Array, "B T D"] | None
    ) -> tuple[Float[Array, "B T D"], DecodeReport]:
        """Reads tokens into the pages; returns the residual stream for the next stage and where tokens went."""
        given = self._leaves, self.pages, _tokens(inputs), self._decoder.shards.put(x_BTD)
        x_BTD, self.pages, report = self._compiled[shape](*given)
        return x_BTD, report

    def _read(self, leaves: list[Array], pages: Pages, tokens: tuple, x_BTD: Array | None) -> tuple:
        weights = self._decoder.shards.local(jax.tree.unflatten(self._tree, leaves))
        *of_rows, table_BX, replay_ids_BTLK = tokens
        given = {"x_BTD": x_BTD, "replay_ids_BTLK": replay_ids_BTLK, "with_choices": True}
        return self._decoder.forward(weights, *of_rows, pages, table_BX, **given)


def _tokens(inputs: StepInputs) -> tuple:
    """What reading needs of a step's inputs."""
    return inputs.tokens_BT, inputs.positions_BT, inputs.valid_BT, inputs.table_BX, inputs.replay_ids_BTLK
