"""Where a model looks while it reads: a trained run and its held-out images in, texts and maps of attention out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt4moe.analysis.text_pieces import pieces
from gpt4moe.config.check import require
from gpt4moe.infer.decode_loop import Pictures
from gpt4moe.infer.generate import MIN_LENGTH
from gpt4moe.infer.pictures import Picture, fitted_picture, stack_pictures
from gpt4moe.infer.trained import Trained
from gpt4moe.infer.transcribe import held_out_images, read
from gpt4moe.train.evaluate import trained_store
from gpt4moe.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """A held-out image of a source, the text that stands there, and what the model read, greedily.

    tokens: the first ones that it read, as text; maps: theirs, as `attention_maps` gives them; None with a resampler.
    """

    source: str
    picture: Picture
    text: str
    read: str
    tokens: tuple[str, ...]
    maps: np.ndarray | None


def read_held_out(trained: Trained, *, examples: int = 4, max_tokens: int = 12) -> list[Reading]:
    """Reads the first held-out images of every source, those that `transcribe` begins with, and looks on.

    Raises `CallerError` for a model in pipeline stages, or where the tokens are gone and the sources have changed.
    """
    config, decode, found = trained.config, trained.tokenizer.decode, []
    if config.data.images is None:
        return found
    store = trained_store(config, trained.workdir, trained.step)
    for source in store.source_names:
        prompts, references, images = held_out_images(store, source, examples)
        if not prompts:
            continue
        pictures = [fitted_picture(image, config.data.images) for image in images]
        made = read(trained, prompts, references, pictures)
        for prompt, reference, picture, ids in zip(prompts, references, pictures, made, strict=True):
            first = ids[:max_tokens]
            shown = pieces(np.array(first, np.int32), np.arange(len(first)), trained.tokenizer)
            tokens = tuple(piece.text for piece in shown for _ in range(piece.count))
            maps = None if config.model.vision.resampler else attention_maps(trained, picture, prompt, first)
            found.append(Reading(source, picture, decode(reference), decode(ids), tokens, maps))
    return found


def attention_maps(
    trained: Trained, picture: Picture, prompt_ids: Sequence[int], token_ids: Sequence[int]
) -> np.ndarray:
    """Returns what each of `token_ids` was read from: [tokens, frames, rows, columns] of patches, float32.

    The attention of the token before it, in one pass over all: the mean over the heads and blocks of cross-attention.
    `prompt_ids` hold one image token, that of `picture`. A map sums to 1 less what the encoder's class token and
    registers get; frames that are not there, and tokens that see no image, have 0. Raises `CallerError` for a model
    without images, with a resampler (it attends to latents, which lie nowhere) or in pipeline stages, and for more
    tokens than its context holds.
    """
    model, vision, ids = trained.model, trained.config.model.vision, [*prompt_ids, *token_ids[:-1]]
    _check(trained, prompt_ids, len(ids))
    rows, context = model.layout.row_multiple, trained.config.model.context_length
    length = min(max(1 << (len(ids) - 1).bit_length(), MIN_LENGTH), context)  # few shapes, few programs
    tokens_BT = np.zeros((rows, length), np.int32)
    tokens_BT[:, : len(prompt_ids)] = prompt_ids
    # Before what was written is there: an image token among it stands for no picture and hides none.
    pictures = stack_pictures([[picture]] * rows, tokens_BT, trained.tokenizer.image)
    tokens_BT[:, : len(ids)] = ids
    mean_TS = np.asarray(_mean_weights(*nnx.split(model), tokens_BT, np.int32(len(ids)), pictures))
    start, shape, encoder = len(prompt_ids) - 1, (len(token_ids), len(picture.valid)), vision.encoder
    by_feature = mean_TS[start : start + len(token_ids)].reshape(*shape, encoder.num_features)
    return by_feature[..., encoder.num_leading :].reshape(*shape, *encoder.grid)


def _check(trained: Trained, prompt_ids: Sequence[int], length: int) -> None:
    model, vision = trained.config.model, trained.config.model.vision
    has_patches = vision is not None and vision.resampler is None
    mend = "give a run that reads images without a resampler"
    require(has_patches, "vision", "resampler" if vision else None, "has no attention to patches", mend)
    staged = trained.model.layout.slots is not None
    require(not staged, "--mesh", "stage", "keeps what tokens look at to its stages", "use other axes")
    images, context = list(prompt_ids).count(trained.tokenizer.image), model.context_length
    require(images == 1, "prompt_ids", list(prompt_ids)[:8], f"hold {images} image tokens instead of 1")
    require(length <= context, "token_ids", length, f"and prompt must not be above context_length ({context})")


@functools.partial(jax.jit, static_argnums=0)
def _mean_weights(
    definition: nnx.GraphDef, params: nnx.State, tokens_BT: Array, length: Array, pictures: Pictures
) -> Array:
    """The weights [T, S] of the first row, the mean over blocks and heads."""
    model = nnx.merge(definition, params)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    segments_BT = (positions_BT < length).astype(jnp.int32)
    media = model.look(*vars(pictures).values())
    given = {"dropless": True, "media": media, "with_cross_weights": True}
    return jnp.mean(model(tokens_BT, positions_BT, segments_BT, **given)[1].cross_weights_LBTNS[:, 0], axis=(0, 2))
