"""The dimension key and the structs that cross folders.

A letter means one thing everywhere; a tensor's name ends in its dimensions and einsum strings use the same letters:

    B rows   T tokens of a row (queries)   U flattened tokens (B*T, or one routing group's)   S keys   D model
    F expert hidden   V vocabulary   N query heads   M key/value heads   H head dim   E experts   K experts per token
    C capacity   G routing groups   L layers   I images   P patches   R resampler latents
    W microbatches of a pass   Y, Z devices along an axis, as senders and as receivers
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

Array = jax.Array | np.ndarray  # on the device, on the host


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows. Segment 0 is padding; segments count from 1 in every row and positions restart in each.

    tokens, targets, positions, segment_ids, source_ids: [B, T] int32; loss_weights: [B, T] float32, 0 where the
    target is not to be learned (padding). replay_ids: [B, T, L, K] int32, expert choices to force on the layers with
    experts, -1 for none; None where the router chooses.

    Where the model reads images: images [B, I, height, width, 3] uint8, or [B, I, frames, height, width, 3] for clips
    and tiled pages; image_valid [B, I] bool, or [B, I, frames]; image_index [B, T] int32, the latest image of its
    segment that a token sees, -1 for none; first_image [B, T] int32, the first one of its segment, -1 where image_index
    is. A token of `<|image|>` sees its own image.
    """

    tokens: Int[Array, "... B T"]
    targets: Int[Array, "... B T"]
    loss_weights: Float[Array, "... B T"]
    positions: Int[Array, "... B T"]
    segment_ids: Int[Array, "... B T"]
    source_ids: Int[Array, "... B T"]
    replay_ids: Int[Array, "... B T L K"] | None = None
    images: UInt8[Array, "... B I *frames height width 3"] | None = None
    image_valid: Bool[Array, "... B I *frames"] | None = None
    image_index: Int[Array, "... B T"] | None = None
    first_image: Int[Array, "... B T"] | None = None
