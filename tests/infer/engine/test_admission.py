"""How many pages memory has room for."""

import dataclasses

import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.config.engine import EngineConfig
from gpt4moe.infer.engine import admission

from .models import LAYERS, make_decoder


@pytest.fixture(scope="module")
def decoder():
    return make_decoder(64, 32)


def test_memory_is_that_of_keys_and_values_of_the_model_and_of_what_proposes(decoder):
    head_dim = decoder.config.head_dim
    of_page = 2 * 8 * LAYERS * head_dim * 4  # keys and values of 8 tokens, one head, float32
    config = EngineConfig(page_size=8, cache_bytes=10 * of_page + 1)
    assert admission.num_pages(decoder, config, 32) == 10
    assert admission.num_pages(decoder, config, 32, draft=decoder) == 5
    with pytest.raises(CallerError, match="gives 3 pages, fewer than a row of max_length=32 needs"):
        admission.num_pages(decoder, dataclasses.replace(config, cache_bytes=7 * of_page), 32, draft=decoder)
