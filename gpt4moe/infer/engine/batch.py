"""Rows of the schedule as the arrays of a step, and what a step gave as tokens of the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.infer.engine.draws import row_settings
from gpt4moe.infer.engine.inputs import StepInputs, StepShape, blank_inputs, filler_settings
from gpt4moe.infer.engine.row import NewToken, Row, Top
from gpt4moe.infer.engine.steps import Scores, StepOut


class Batches:
    """Makes inputs of rows; keeps what the row of each slot asks for in a table, whose last entry asks nothing."""

    def __init__(self, config: EngineConfig, model: ModelConfig):
        self._config, self._model = config, model
        self._settings = filler_settings(config.slots + 1, model.vocab_size)

    def enter(self, row: Row) -> None:
        """A row has got a slot."""
        draw = row.request.draw + row.index
        settings = row_settings([row.sampling], [draw], [0], [False], self._model.vocab_size)
        for table, value in zip(jax.tree.leaves(self._settings), jax.tree.leaves(settings), strict=True):
            table[row.slot] = value[0]

    def prefill(self, chosen: Sequence[tuple[Row, int]], shape: StepShape) -> StepInputs:
        """The next tokens of some rows' prompts, row by row in any order of slots."""
        slots = [row.slot for row, _ in chosen] + [self._config.slots] * (shape.rows - len(chosen))
        inputs = self._blank(shape, np.array(slots, np.int32))
        for place, (row, length) in enumerate(chosen):
            self._fill(inputs, place, row, length)
            following = row.ids[row.num_read + 1 : row.num_read + length + 1]
            inputs.next_BT[place, : len(following)] = following
            inputs.scored_B[place] = row.prompt is not None and row.prompt.scores
        return inputs

    def decode(
        self,
        placed: Sequence[tuple[int, Row]],
        shape: StepShape,
        num_proposed: Mapping[Row, int],
        proposed: Mapping[Row, list[int]],
    ) -> StepInputs:
        """The last token of every row, each in its place, and behind it what is proposed to the row.

        num_proposed: how many tokens, of the rows with any; proposed: those that are known already.
        """
        slots = np.full(shape.rows, self._config.slots, np.int32)
        for place, row in placed:
            slots[place] = row.slot
        inputs = self._blank(shape, slots)
        for place, row in placed:
            number = num_proposed.get(row, 0)
            self._fill(inputs, place, row, 1, ahead=number)
            inputs.valid_BT[place, 1 : 1 + number] = True
            inputs.num_proposed_B[place] = number
            known = proposed.get(row, [])[:number]  # of those that are known, there may be no page for all
            inputs.tokens_BT[place, 1 : 1 + len(known)] = known
        return inputs

    def _blank(self, shape: StepShape, slot_B: np.ndarray) -> StepInputs:
        settings = jax.tree.map(lambda table: table[slot_B], self._settings)
        blank = blank_inputs(self._config, self._model, shape, settings)
        return dataclasses.replace(blank, slot_B=slot_B)

    def _fill(self, inputs: StepInputs, place: int, row: Row, length: int, ahead: int = 0) -> None:
        """The next tokens of a row; `ahead` are proposed to come after them."""
        start, stop = row.num_read, row.num_read + length
        inputs.tokens_BT[place, :length] = row.ids[start:stop]
        inputs.positions_BT[place] = np.arange(start, start + inputs.positions_BT.shape[1])
        inputs.valid_BT[place, :length] = True
        inputs.table_BX[place, : len(row.pages)] = row.pages
        inputs.last_B[place] = length - 1
        inputs.drawing_B[place] = stop == len(row.ids)
        inputs.settings.num_drawn_B[place] = row.num_new
        if row.image_index_T is not None:
            index_T = row.seen_at(start, inputs.positions_BT.shape[1])
            inputs.image_index_BT[place] = index_T
            sees_all = self._model.vision.cross_attention.sees == "all"
            inputs.first_image_BT[place] = np.minimum(index_T, 0) if sees_all else index_T
        if row.constraint is not None and inputs.drawing_B[place]:
            inputs.settings.constrained_B[place] = True
            inputs.allowed_BW[place] = row.constraint.mask_W()
        replayed = row.replayed(start, stop + ahead)
        if replayed is not None:
            inputs.replay_ids_BTLK[place, : len(replayed)] = replayed


def new_tokens(out: StepOut, places: Sequence[tuple[int, Row]], last_B: np.ndarray) -> list[list[NewToken]]:
    """The tokens that a step drew for these rows, each at its place in the batch."""
    rows = [row for _, row in places]
    ids_BT, num_B = np.asarray(out.drawn.ids_BT), np.asarray(out.drawn.num_B)
    logprobs_BT = np.asarray(out.drawn.logprobs_BT) if any(row.sampling.logprobs is not None for row in rows) else None
    top = None
    if any(row.sampling.logprobs for row in rows):
        top = np.asarray(out.drawn.top_ids_BTJ), np.asarray(out.drawn.top_logprobs_BTJ)
    choices = np.asarray(out.choices_LBTK) if any(row.request.with_expert_ids for row in rows) else None

    def token(place: int, row: Row, index: int) -> NewToken:
        asked = row.sampling.logprobs
        return NewToken(
            id=int(ids_BT[place, index]),
            logprob=None if asked is None else float(logprobs_BT[place, index]),
            top=_pairs(top[0][place, index], top[1][place, index], asked) if asked else None,
            experts_LK=choices[:, place, last_B[place] + index] if row.request.with_expert_ids else None,
        )

    return [[token(place, row, index) for index in range(num_B[place])] for place, row in places]


def record_prompts(out: StepOut, chosen: Sequence[tuple[int, Row, int]]) -> None:
    """Gives rows what they want to know of their prompts; chosen: place in the batch, row, tokens that were read."""
    asking = [item for item in chosen if item[1].prompt is not None and item[1].prompt.wanted]
    if not asking:
        return
    choices, scores = np.asarray(out.choices_LBTK), jax.tree.map(np.asarray, out.scores)
    for place, row, length in asking:
        start = row.num_read
        # A row is behind its prompt, and nothing of it told yet, while its first tokens are half a character.
        length = max(min(length, row.num_prompt - start), 0)
        # After the last token of a prompt comes one that is not the prompt's.
        of_prompt = max(min(length, row.num_prompt - 1 - start), 0)
        scored = of_prompt if row.prompt.scores and scores is not None else 0
        logprobs, top = _scores_of(scores, place, scored, row.sampling.logprobs or 0)
        row.prompt.add(start, logprobs, top, choices[:, place, :length].swapaxes(0, 1) if row.prompt.experts else None)


def _scores_of(scores: Scores | None, place: int, length: int, num_top: int) -> tuple[list[float], list[Top]]:
    if length == 0:
        return [], []
    top = []
    if num_top:
        of_place = zip(scores.top_ids_BTJ[place, :length], scores.top_logprobs_BTJ[place, :length], strict=True)
        top = [_pairs(ids, logprobs, num_top) for ids, logprobs in of_place]
    return scores.logprobs_BT[place, :length].tolist(), top


def _pairs(ids_J: np.ndarray, logprobs_J: np.ndarray, num_top: int) -> Top:
    return tuple(zip(ids_J[:num_top].tolist(), logprobs_J[:num_top].tolist(), strict=True))
