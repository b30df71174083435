"""Where tokens went: a model and text in, the experts and gates of every token at every layer out, as numpy.

The choices are what the model itself reports of a pass (`TransformerOut.moe.choices`), dropless as in evaluation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from gpt4moe.config.check import require
from gpt4moe.config.data import DataConfig
from gpt4moe.config.rules import ShardingRules
from gpt4moe.data.pipeline import held_out_of_source
from gpt4moe.data.store import TokenStore
from gpt4moe.model.moe import Choices
from gpt4moe.model.transformer import Transformer
from gpt4moe.parallel.sharding import batch_sharding
from gpt4moe.types import Array, Batch


@dataclasses.dataclass(frozen=True, eq=False)
class Capture:
    """The choices of U tokens in the order of their text, padding left out.

    token_ids, source_ids, positions (in their segment, the restart of which is position 0): [U] int32.
    expert_ids: [L, U, K] int32, the one of the largest gate first, -1 for none; gates: float32, 0 for none.
    """

    token_ids_U: np.ndarray
    source_ids_U: np.ndarray
    positions_U: np.ndarray
    expert_ids_LUK: np.ndarray
    gates_LUK: np.ndarray
    num_experts: int

    @property
    def choices_per_token(self) -> float:
        """Experts of a token, the mean over tokens and layers."""
        return float((self.expert_ids_LUK >= 0).sum() / (self.expert_ids_LUK[..., 0].size or 1))

    def part(self, chosen_U: np.ndarray) -> Capture:
        """The tokens that a mask [U] or a list of places chooses."""
        by_token = (self.token_ids_U[chosen_U], self.source_ids_U[chosen_U], self.positions_U[chosen_U])
        return Capture(*by_token, self.expert_ids_LUK[:, chosen_U], self.gates_LUK[:, chosen_U], self.num_experts)


def capture(model: Transformer, batches: Iterable[Batch], rules: ShardingRules | None = None) -> Capture:
    """The choices for every token of numpy `batches` (at least one), under a model on one device or over a mesh.

    All batches have one shape, of which the rows divide by `model.layout.row_multiple`: one program serves all.
    Raises `CallerError` for a model in pipeline stages, which report no choices.
    """
    staged = model.layout.slots is not None
    require(not staged, "--mesh", "stage", "keeps the choices of tokens to its stages", "use other axes")
    definition, params = nnx.split(model)
    where = jax.tree.leaves(params)[0].sharding
    if isinstance(where, NamedSharding):
        where = batch_sharding(where.mesh, rules or ShardingRules())
    parts = []
    for batch in batches:
        placed = jax.device_put((batch.tokens, batch.positions, batch.segment_ids), where)
        choices = jax.device_get(_choices(definition, params, *placed))
        real_BT = np.asarray(batch.segment_ids) > 0
        by_token = [np.asarray(field)[real_BT] for field in (batch.tokens, batch.source_ids, batch.positions)]
        parts.append((*by_token, choices.expert_ids_BTK[:, real_BT], choices.gates_BTK[:, real_BT]))
    columns = list(zip(*parts, strict=True))
    by_token = [np.concatenate(column) for column in columns[:3]]
    expert_ids_LUK, gates_LUK = (np.concatenate(column, axis=1) for column in columns[3:])
    order_LUK = np.argsort(np.where(expert_ids_LUK < 0, np.inf, -gates_LUK), axis=-1, kind="stable")
    by_layer = [np.take_along_axis(values, order_LUK, axis=-1) for values in (expert_ids_LUK, gates_LUK)]
    return Capture(*by_token, *by_layer, model.config.moe.num_experts)


def held_out_text(store: TokenStore, config: DataConfig, *, rows: int, max_tokens: int) -> Iterator[Batch]:
    """Batches of [rows, T] with the first held-out tokens of every source, at most an even share of `max_tokens`."""
    share = max(max_tokens // len(store.source_names), 1)
    for source in store.source_names:
        room = share
        for batch in held_out_of_source(store, config, source, rows=rows):
            real_BT = batch.segment_ids > 0
            kept_BT = real_BT & (np.cumsum(real_BT).reshape(real_BT.shape) <= room)
            room -= int(kept_BT.sum())
            yield dataclasses.replace(batch, segment_ids=np.where(kept_BT, batch.segment_ids, 0))
            if not room:
                break


def given_text(texts_U: Sequence[np.ndarray], *, rows: int, length: int) -> Iterator[Batch]:
    """Batches of [rows, length] with token ids of several texts; `source_ids` number the texts.

    A text longer than a row goes on in the next one, where it is read afresh, without what came before.
    """
    pieces = [
        (number, ids_U[start : start + length])
        for number, ids_U in enumerate(texts_U)
        for start in range(0, len(ids_U), length)
    ]
    for first in range(0, len(pieces), rows):
        tokens, positions, segments, sources = np.zeros((4, rows, length), np.int32)
        for row, (number, ids) in enumerate(pieces[first : first + rows]):
            filled = np.s_[row, : len(ids)]
            tokens[filled], positions[filled], segments[filled] = ids, np.arange(len(ids)), 1
            sources[row] = number
        yield Batch(tokens, tokens, np.zeros((rows, length), np.float32), positions, segments, sources)


@functools.partial(jax.jit, static_argnums=0)
def _choices(
    definition: nnx.GraphDef, params: nnx.State, tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array
) -> Choices:
    model = nnx.merge(definition, params)
    return model(tokens_BT, positions_BT, segment_ids_BT, dropless=True, with_choices=True)[1].moe.choices
