"""The compiled decode step: pages written in place, temporaries that do not grow with the pages."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gpt4moe.infer.decoder import Decoder
from gpt4moe.model.transformer import Transformer
from tests.infer.test_decoder import TINY

NUM_PAGES, PAGE_SIZE, SEEN_PAGES = 512, 16, 2


def compiled(dtype, rows, length):
    """A call of `length` tokens of each row that sees two pages of 512."""
    config = dataclasses.replace(TINY, compute_dtype=dtype)
    decoder = Decoder.of(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    pages = jax.eval_shape(lambda: decoder.init_pages(NUM_PAGES, PAGE_SIZE))
    tokens_BT, table_BX = (jax.ShapeDtypeStruct((rows, size), jnp.int32) for size in (length, SEEN_PAGES))
    valid_BT = jax.ShapeDtypeStruct((rows, length), bool)
    step = jax.jit(decoder.forward, donate_argnums=4)
    return step.lower(decoder.weights, tokens_BT, tokens_BT, valid_BT, pages, table_BX).compile(), pages


@pytest.mark.parametrize(("dtype", "rows", "length"), [("float32", 4, 1), ("bfloat16", 1, 1), ("bfloat16", 1, 8)])
def test_pages_are_written_in_place(dtype, rows, length):
    program, pages = compiled(dtype, rows, length)
    shape = ",".join(map(str, pages.keys[0].shape))
    made = re.findall(rf"= (\w+)\[{shape}\]\S* (\S+?)\(", program.as_text())
    in_place = {"parameter", "scatter", "dynamic-update-slice", "fusion", "get-tuple-element", "bitcast"}
    assert {operation for _, operation in made} <= in_place
    assert {dtype for dtype, _ in made} == {"f32" if dtype == "float32" else "u16"}  # nothing converts them whole
    one_layer = pages.keys[0].size * pages.keys[0].dtype.itemsize
    assert program.memory_analysis().temp_size_in_bytes < one_layer / 4
    assert program.memory_analysis().alias_size_in_bytes >= 2 * len(pages.keys) * one_layer
