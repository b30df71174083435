"""How many pages memory has room for, and how many tokens a request may get, to the last place of the context."""

import dataclasses

import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.engine import admission
from gpt4moe.infer.engine.request import EngineRequest

from .models import LAYERS, make_config, make_decoder

LENGTH = 32  # of prompt and continuation


@pytest.fixture(scope="module")
def decoder():
    return make_decoder(64, LENGTH)


def test_memory_is_that_of_keys_and_values_of_the_model_and_of_what_proposes(decoder):
    head_dim = decoder.config.head_dim
    of_page = 2 * 8 * LAYERS * head_dim * 4  # keys and values of 8 tokens, one head, float32
    config = EngineConfig(page_size=8, cache_bytes=10 * of_page + 1)
    assert admission.num_pages(decoder, config, LENGTH) == 10
    assert admission.num_pages(decoder, config, LENGTH, draft=decoder) == 5
    with pytest.raises(CallerError, match="gives 3 pages, fewer than a row of max_length=32 needs"):
        admission.num_pages(decoder, dataclasses.replace(config, cache_bytes=7 * of_page), LENGTH, draft=decoder)


def most_new(num_prompt, max_new_tokens):
    request = EngineRequest([1] * num_prompt, SamplingConfig(max_new_tokens=max_new_tokens))
    return admission.check(request, make_config(64, 48), EngineConfig(), LENGTH, None)


def test_a_continuation_goes_to_the_last_place_and_no_further():
    assert [most_new(20, asked) for asked in (1, 11, 12, 13, 99)] == [1, 11, 12, 12, 12]
    assert [most_new(num_prompt, 99) for num_prompt in (LENGTH - 2, LENGTH - 1)] == [2, 1]
    with pytest.raises(CallerError, match="prompt tokens=32 must be shorter than the 32 tokens"):
        most_new(LENGTH, 1)
