"""What the encoder's features spell: the transcript of an image by connectionist temporal classification.

In: a batch with images, and logits of every feature over the ids of letters and a blank. Out: nats, to be
differentiated. Cross-attention learns where to look only once features tell letters apart, and they learn that only
once it looks there. This sums over all ways of laying the letters along the features instead (Graves et al. 2006), as
speech recognisers do beside attention (Watanabe et al. 2017).
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Float32, Int

from gpt4moe.types import Array, Batch


def spelling_nats(
    logits_BIRV: Float[Array, "B I R V"], valid_BIR: Bool[Array, "B I R"], batch: Batch
) -> Float32[Array, ""]:
    """Returns the sum over images of -log P(transcript | features), the features in reading order.

    The last class is the blank. Of images without text behind them, with more of it than the features can spell, or
    with an id beyond the classes, there is nothing.
    """
    rows, images, _, classes = logits_BIRV.shape
    letters_BIN, counts_BI = transcripts(batch.tokens, batch.image_index, images)
    written_BIN = jnp.arange(letters_BIN.shape[-1]) < counts_BI[..., None]
    known_BI = jnp.all((letters_BIN < classes - 1) | ~written_BIN, axis=-1)
    doubled_BI = jnp.sum((letters_BIN[..., 1:] == letters_BIN[..., :-1]) & written_BIN[..., 1:], axis=-1)
    needed_BI = counts_BI + doubled_BI  # between two equal letters stands a blank
    spelled_BI = known_BI & (counts_BI > 0) & (needed_BI <= jnp.sum(valid_BIR, axis=-1))
    labels_BIN = jnp.where(written_BIN & spelled_BI[..., None], letters_BIN, 0)
    flat = (rows * images, -1)
    nats = optax.ctc_loss(
        logits_BIRV.astype(jnp.float32).reshape(*flat, classes),
        1.0 - valid_BIR.reshape(flat),
        labels_BIN.reshape(flat),
        1.0 - written_BIN.reshape(flat),
        blank_id=classes - 1,
    )
    return jnp.sum(jnp.where(spelled_BI.ravel(), nats, 0.0))


def transcripts(
    tokens_BT: Int[Array, "B T"], image_index_BT: Int[Array, "B T"], num_images: int
) -> tuple[Int[Array, "B I N"], Int[Array, "B I"]]:
    """Returns the ids between each image and the next one or the end of its document, [B, I, T - 1], and how many.

    What stands beyond that number is of no meaning.
    """
    length = tokens_BT.shape[1]
    sees_BIT = image_index_BT[:, None] == jnp.arange(num_images)[None, :, None]
    first_BI = jnp.argmax(sees_BIT, axis=-1) + 1  # behind the token of the image itself
    at_BIN = jnp.minimum(first_BI[..., None] + jnp.arange(length - 1), length - 1)
    letters_BIN = jnp.take_along_axis(tokens_BT[:, None], at_BIN, axis=-1)
    return letters_BIN, jnp.maximum(jnp.sum(sees_BIT, axis=-1) - 1, 0)
