"""What an encoder that learned to spell reads by itself: pictures in, ids out, without the decoder."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int, UInt8

from gpt4moe.config.check import require
from gpt4moe.infer.batches import batches
from gpt4moe.infer.pictures import Picture
from gpt4moe.model.transformer import Transformer
from gpt4moe.types import Array

ROWS = 8


def spell(model: Transformer, pictures: Sequence[Picture]) -> list[list[int]]:
    """Returns the ids that the features of each picture spell, in reading order, each feature its likeliest one.

    What follows itself without a blank between is one id (best path decoding, Graves et al. 2006). It cannot lose its
    place, as a decoder may on a long page, nor does it know how words are spelled. Raises `CallerError` for a model
    that has no `SpellingConfig`.
    """
    vision = model.config.vision
    spells = vision is not None and vision.spelling is not None
    require(spells, "vision.spelling", None, "must be set for an encoder to spell", "train with SPELLING")
    graph, parameters = nnx.split((model.vision_encoder, model.spelling))
    made: list[list[int]] = []
    for rows in batches(len(pictures), ROWS):
        ids_BFP = np.asarray(_likeliest(graph, parameters, np.stack([pictures[row].pixels for row in rows])))
        pairs = zip(ids_BFP, rows, strict=True)
        made += [_collapsed(ids_FP[pictures[row].valid], vision.spelling.num_ids) for ids_FP, row in pairs]
    return made[: len(pictures)]


@functools.partial(jax.jit, static_argnums=0)
def _likeliest(
    graph: nnx.GraphDef, parameters: nnx.State, images: UInt8[Array, "B F height width 3"]
) -> Int[Array, "B F P"]:
    encoder, spelling = nnx.merge(graph, parameters)
    clips = images if encoder.config.max_frames > 1 else images[:, 0]
    return jnp.argmax(spelling(encoder(clips)), axis=-1).reshape(*images.shape[:2], -1)


def _collapsed(ids_FP: np.ndarray, blank: int) -> list[int]:
    path = ids_FP.reshape(-1)
    return path[(path != blank) & (path != np.concatenate([[blank], path[:-1]]))].tolist()
