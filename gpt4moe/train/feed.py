"""Draws whole batches from the data pipeline and puts them on the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gpt4moe.config.data import ImageConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.sharding import by_row
from gpt4moe.train import trace
from gpt4moe.types import Batch

if TYPE_CHECKING:
    from gpt4moe.data.pipeline import TrainRows

# Gives the choices to force on the tokens of microbatches.
Replay = Callable[[list[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One batch on the devices: microbatches [microbatches, B, T] of which the first `num_microbatches` are filled.

    tokens: how many; tokens_crc: checksum of those of this process.
    """

    microbatches: Batch
    num_microbatches: int
    tokens: int
    tokens_crc: int


def microbatch_room(run: RunConfig) -> int:
    """Microbatches of the largest batch of the ramp."""
    return run.train.ramp[-1][1] // (run.microbatch_rows * run.data.sequence_length)


def abstract_microbatches(run: RunConfig, rows: NamedSharding) -> Batch:
    """Shapes, dtypes and layout of what `draw` gives; `rows` is the layout of [B, T]."""
    shape = (microbatch_room(run), run.microbatch_rows, run.data.sequence_length)
    where = NamedSharding(rows.mesh, PartitionSpec(None, *rows.spec))
    names = ("tokens", "targets", "loss_weights", "positions", "segment_ids", "source_ids")
    dtypes = dict.fromkeys(names, np.int32) | {"loss_weights": np.float32}
    leaves = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, dtype in dtypes.items()}
    if run.train.replay_routing:
        choices = (*shape, run.model.num_moe_layers, trace.recorded_width(run))
        leaves["replay_ids"] = jax.ShapeDtypeStruct(choices, np.int32, sharding=where)
    if run.data.images is not None:
        leaves |= _abstract_images(run.data.images, shape, where)
    return Batch(**leaves)


def _abstract_images(config: ImageConfig, shape: tuple[int, ...], where: NamedSharding) -> dict:
    """The image fields of a batch of `shape` [microbatches, B, T]; images follow their rows and are whole elsewhere."""
    frames = (config.frames,) if config.frames > 1 else ()
    valid = (*shape[:2], config.per_row, *frames)
    pixels = (*valid, config.height, config.width, 3)
    seen = jax.ShapeDtypeStruct(shape, np.int32, sharding=where)
    return {
        "images": jax.ShapeDtypeStruct(pixels, np.uint8, sharding=by_row(where)),
        "image_valid": jax.ShapeDtypeStruct(valid, np.bool_, sharding=by_row(where)),
        "image_index": seen,
        "first_image": seen,
    }


def draw(rows: TrainRows, batch_tokens: int, abstract: Batch, replay: Replay | None = None) -> Drawn | None:
    """The next batch of `batch_tokens`, or what the data still has of it; None where the data is exhausted.

    `replay` gives the expert choices to force on its microbatches' tokens.
    """
    room, microbatch_rows, length = abstract.tokens.shape
    wanted = batch_tokens // (microbatch_rows * length)
    drawn = [microbatch for _, microbatch in zip(range(wanted), rows, strict=False)]
    if not drawn:
        return None
    if abstract.images is not None:
        rows.look_ahead(wanted)  # decoded while this batch trains
    tokens_BT = [microbatch.tokens for microbatch in drawn]
    if replay is not None:
        drawn = [dataclasses.replace(part, replay_ids=ids) for part, ids in zip(drawn, replay(tokens_BT), strict=True)]

    def place(leaf: jax.ShapeDtypeStruct, *parts: np.ndarray) -> jax.Array:
        buffer = np.zeros((room, *parts[0].shape), leaf.dtype)
        np.stack(parts, out=buffer[: len(parts)])
        return jax.make_array_from_process_local_data(leaf.sharding, buffer, leaf.shape)

    num_tokens = len(drawn) * microbatch_rows * length
    return Drawn(jax.tree.map(place, abstract, *drawn), len(drawn), num_tokens, trace.checksum(tokens_BT))
