"""What the host tells the device about a step: shapes that are known beforehand, arrays that fill one of them."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt32

from gpt4moe.config.engine import MIN_CHUNK, EngineConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.decoder import FREE
from gpt4moe.infer.engine.draws import MASK_BITS, Asked, RowSettings, row_settings
from gpt4moe.types import Array

MIN_VISIBLE = 128  # tokens; a program for fewer would be no faster
PREFILL_STEP, DECODE_STEP = 4, 2  # from one length in sight, or of a chunk, to the next


@dataclasses.dataclass(frozen=True, order=True)
class StepShape:
    """Rows of a step, tokens of each, and pages of their tables; what is done with them."""

    kind: Literal["decode", "verify", "prefill"]
    rows: int
    length: int
    pages: int

    def __str__(self) -> str:
        return f"{self.kind}, rows={self.rows} tokens={self.length} pages={self.pages}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """B rows of T tokens, as `Decoder.forward` takes them.

    slot_B: each row's slot, past the last for a row that fills up; last_B: the place in T of the token after which one
    is drawn, where drawing_B. settings, allowed_BW: see `draws.Asked`. next_BT: the token after each one of a prompt,
    whose log-probability is wanted where scored_B. Of a step that verifies, num_proposed_B tokens of each row after the
    first are proposals. replay_ids_BTLK: experts to force, None where the engine forces none. image_index_BT,
    first_image_BT: the last and the first picture that each token sees, -1 for none; None for a text model.
    """

    tokens_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    valid_BT: Bool[Array, "B T"]
    table_BX: Int[Array, "B X"]
    slot_B: Int[Array, " B"]
    last_B: Int[Array, " B"]
    drawing_B: Bool[Array, " B"]
    settings: RowSettings
    allowed_BW: UInt32[Array, "B W"]
    next_BT: Int[Array, "B T"]
    scored_B: Bool[Array, " B"]
    num_proposed_B: Int[Array, " B"]
    replay_ids_BTLK: Int[Array, "B T L K"] | None
    image_index_BT: Int[Array, "B T"] | None
    first_image_BT: Int[Array, "B T"] | None

    @property
    def asked(self) -> Asked:
        """What the drawing of tokens needs to know."""
        return Asked(self.settings, self.slot_B, self.drawing_B, self.allowed_BW)


def chunk_tokens(config: EngineConfig, max_length: int) -> int:
    """The most tokens of a prompt that are read at once."""
    return min(config.prefill_chunk, max(MIN_CHUNK, 1 << (max_length - 1).bit_length()))


def decode_shapes(config: EngineConfig, max_length: int, slots: int) -> list[StepShape]:
    """Shapes of a step of so many slots, by pages in sight."""
    return [StepShape("decode", slots, 1, pages) for pages in _pages(config, max_length, DECODE_STEP)]


def verify_shapes(config: EngineConfig, max_length: int, slots: int) -> list[StepShape]:
    """Shapes of a step of so many slots that judges proposals; none where there are no proposals."""
    length, pages = config.draft_tokens + 1, _pages(config, max_length, DECODE_STEP)
    return [StepShape("verify", slots, length, number) for number in pages] if length > 1 else []


def prefill_shapes(config: EngineConfig, max_length: int) -> list[StepShape]:
    """Shapes of a chunk of one prompt, and of as many short ones as make up a chunk; one alone where deterministic."""
    chunk = chunk_tokens(config, max_length)
    lengths = [chunk]
    while not config.deterministic and lengths[-1] // PREFILL_STEP >= MIN_CHUNK:
        lengths.append(lengths[-1] // PREFILL_STEP)
    shapes = set()
    for length in lengths:
        for rows in {1, min(config.slots, chunk // length)}:
            for pages in _pages(config, max_length, PREFILL_STEP):
                if pages * config.page_size >= min(length, max_length):
                    shapes.add(StepShape("prefill", rows, length, pages))
    return sorted(shapes)


def _pages(config: EngineConfig, max_length: int, step: int) -> list[int]:
    """Numbers of pages in a table, up to those of the longest row; that one alone where deterministic."""
    most = -(-max_length // config.page_size)
    pages = [] if config.deterministic else [-(-MIN_VISIBLE // config.page_size)]
    while pages and pages[-1] * step < most:
        pages.append(pages[-1] * step)
    # One that is nearly as long as the longest would save nothing.
    return [*(number for number in pages if 3 * number <= 2 * most), most]


def smallest(shapes: list[StepShape], rows: int, length: int, pages: int) -> StepShape:
    """The smallest of the shapes that holds so much."""
    return min(
        (shape for shape in shapes if shape.rows >= rows and shape.length >= length and shape.pages >= pages),
        key=lambda shape: (shape.rows * shape.length, shape.pages),
    )


def filler_settings(rows: int, vocab_size: int) -> RowSettings:
    """Settings of rows that only fill up."""
    nothing = [0] * rows
    return row_settings([SamplingConfig(temperature=0.0)] * rows, nothing, nothing, [False] * rows, vocab_size)


def blank_inputs(config: EngineConfig, model: ModelConfig, shape: StepShape, settings: RowSettings) -> StepInputs:
    """Inputs of rows that only fill up, to be written into."""
    rows, length = shape.rows, shape.length
    routed = (rows, length, model.num_moe_layers, model.moe.experts_per_token)
    return StepInputs(
        tokens_BT=np.zeros((rows, length), np.int32),
        positions_BT=np.zeros((rows, length), np.int32),
        valid_BT=np.zeros((rows, length), bool),
        table_BX=np.full((rows, shape.pages), -1, np.int32),
        slot_B=np.full(rows, config.slots, np.int32),
        last_B=np.zeros(rows, np.int32),
        drawing_B=np.zeros(rows, bool),
        settings=settings,
        allowed_BW=np.zeros((rows, -(-model.vocab_size // MASK_BITS)), np.uint32),
        next_BT=np.zeros((rows, length), np.int32),
        scored_B=np.zeros(rows, bool),
        num_proposed_B=np.zeros(rows, np.int32),
        replay_ids_BTLK=np.full(routed, FREE, np.int32) if config.replay else None,
        image_index_BT=np.full((rows, length), -1, np.int32) if model.vision else None,
        first_image_BT=np.full((rows, length), -1, np.int32) if model.vision else None,
    )
