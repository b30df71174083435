"""Keys and values of past tokens in pages: rows of any length share one memory, and a page may stand in several rows.

Who owns which page is the host's to know (the engine). Here a table says where each row's tokens lie, and compiled
programs write by scatter into pages that they are given for good (donated), so that no step copies them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from gpt4moe.config.model import ModelConfig
from gpt4moe.model.product import from_bits, to_bits
from gpt4moe.types import Array

Stored = Shaped[Array, "pages places M H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Keys (rotated) and values of every layer: [num_pages, page_size, M, H] each, an array a layer.

    The token at position p of row b lies in page table_BX[b, p // page_size] at place p % page_size. bfloat16 is kept
    as its bits, uint16: XLA:CPU converts the whole of a bfloat16 array to float32 and back to write a part of it.
    """

    keys: tuple[Stored, ...]
    values: tuple[Stored, ...]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.keys[0].shape[1]


def init_pages(num_layers: int, shape: tuple[int, int, int, int], dtype: jnp.dtype) -> Pages:
    """Returns empty pages for some layers; shape: that of an array, see `Pages`."""

    def of_layers() -> tuple[Array, ...]:
        return tuple(to_bits(jnp.zeros(shape, dtype)) for _ in range(num_layers))

    return Pages(of_layers(), of_layers())


def page_bytes(config: ModelConfig, num_kv_heads: int, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page, so many heads of keys and of values in all layers."""
    values = config.num_layers * num_kv_heads * config.head_dim
    return 2 * page_size * values * jnp.dtype(dtype).itemsize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where tokens are written, [B, T] each: page_BT past the last page where a token is not, place_BT in it."""

    page_BT: Int[Array, "B T"]
    place_BT: Int[Array, "B T"]


def places(
    pages: Pages, table_BX: Int[Array, "B X"], positions_BT: Int[Array, "B T"], valid_BT: Bool[Array, "B T"]
) -> Places:
    """Returns where each token lies; one that is not valid, or has no page (-1, or past its table), lies nowhere."""
    num_pages, page_size = pages.keys[0].shape[:2]
    index_BT, last = positions_BT // page_size, table_BX.shape[1] - 1
    page_BT = jnp.take_along_axis(table_BX, jnp.clip(index_BT, 0, last), axis=1)
    held_BT = valid_BT & (page_BT >= 0) & (index_BT >= 0) & (index_BT <= last)
    return Places(jnp.where(held_BT, page_BT, num_pages), positions_BT % page_size)


def write(layer: Stored, new_BTMH: Float[Array, "B T M H"], at: Places) -> Stored:
    """Returns one layer's keys or values with those of the tokens written, the rest as it was.

    What is not finite is written as 0: its own row is lost, but the next one on the page, which gives weight 0 to what
    it has not yet written over, is not.
    """
    new_BTMH = jnp.where(jnp.isfinite(new_BTMH), new_BTMH, 0)
    page_BT, place_BT = at.page_BT, at.place_BT
    if page_BT.size == 1:  # XLA would make a slice update of it, for which it copies the pages: a second one, dropped
        page_BT = jnp.concatenate([page_BT, jnp.full_like(page_BT, len(layer))], axis=1)
        place_BT, new_BTMH = (jnp.concatenate([x, x], axis=1) for x in (place_BT, new_BTMH))
    return layer.at[page_BT, place_BT].set(to_bits(new_BTMH), mode="drop")


def read(layer: Stored, table_BX: Int[Array, "B X"]) -> Float[Array, "B S M H"]:
    """Returns one layer's keys or values of the pages in each row's table, S = X * page_size; -1 gives any page."""
    pages_BXPMH = layer.at[jnp.maximum(table_BX, 0)].get(mode="clip")
    return from_bits(pages_BXPMH.reshape(len(table_BX), -1, *layer.shape[2:]))
