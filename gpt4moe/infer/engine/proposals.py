"""Which tokens are proposed to which rows, before the model judges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpt4moe.config.engine import EngineConfig
from gpt4moe.infer.engine.draws import counts_tokens
from gpt4moe.infer.engine.row import Row


class Proposals:
    """Looked up in each row's own text, or left to a model that draws them on the device (`by_model`)."""

    def __init__(self, config: EngineConfig, *, by_model: bool):
        self._most, self._by_model = config.draft_tokens, by_model

    def of(self, rows: Sequence[Row]) -> dict[Row, list[int]]:
        """The tokens that are looked up, of the rows that have any."""
        if self._most == 0 or self._by_model:
            return {}
        proposed = {row: row.lookup.propose(row.ids, self._room(row)) for row in rows if self._room(row) > 0}
        return {row: tokens for row, tokens in proposed.items() if tokens}

    def number(self, row: Row, proposed: Mapping[Row, list[int]]) -> int:
        """How many tokens are proposed to a row."""
        return self._room(row) if self._by_model else len(proposed.get(row, ()))

    def _room(self, row: Row) -> int:
        """Not beyond the row's end; none where what a token is depends on those drawn right before it."""
        if counts_tokens(row.sampling) or row.sampling.json_schema is not None:
            return 0
        return max(min(self._most, row.max_new - row.num_new - 1), 0)
