"""Where tokens lie in pages, and that those which lie nowhere are written nowhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4moe.infer.paged_attention import attend
from gpt4moe.infer.pages import init_pages, places, read, write

PAGES, SIZE = 4, 2
TABLE_BX = np.array([[3, 1], [0, -1]])


def test_tokens_lie_in_their_tables_pages_and_others_nowhere():
    """Past its table, before it, without a page, not valid: a token is on page 4, which there is not."""
    pages = init_pages(1, (PAGES, SIZE, 1, 1), jnp.float32)
    positions_BT = np.array([[0, 3, 4, 7], [1, 2, -1, 0]])
    valid_BT = np.array([[True] * 4, [True, True, True, False]])
    at = jax.jit(places)(pages, TABLE_BX, positions_BT, valid_BT)
    assert at.page_BT.tolist() == [[3, 1, PAGES, PAGES], [0, PAGES, PAGES, PAGES]]
    assert at.place_BT.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]


def test_what_is_written_is_read_and_what_lies_nowhere_changes_nothing():
    pages = init_pages(1, (PAGES, SIZE, 1, 1), jnp.float32)
    positions_BT, valid_BT = np.array([[1, 2, 3, 4], [0, 1, 2, 3]]), np.ones((2, 4), bool)
    new_BTMH = jnp.arange(1.0, 9).reshape(2, 4, 1, 1)
    layer = write(pages.keys[0], new_BTMH, places(pages, TABLE_BX, positions_BT, valid_BT))
    assert layer[..., 0, 0].tolist() == [[5, 6], [2, 3], [0, 0], [0, 1]]
    assert read(layer, TABLE_BX[:1])[0, :, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_not_finite_stays_in_the_row_that_it_is_of(dtype):
    """The next row on a page gives no weight to what it has not written over, but 0 times infinity is no number."""
    pages = init_pages(1, (2, 4, 1, 8), dtype)
    lost_BTMH = jnp.full((1, 1, 1, 8), jnp.nan, dtype).at[..., 0].set(jnp.inf)
    at = places(pages, np.array([[1]]), np.array([[3]]), np.ones((1, 1), bool))
    seen = read(write(pages.values[0], lost_BTMH, at), np.array([[1]]))
    y_BTNH = attend(jnp.ones((1, 1, 1, 8), dtype), seen, seen, np.array([[0]]), 16)
    assert np.isfinite(np.asarray(y_BTNH, np.float32)).all()
