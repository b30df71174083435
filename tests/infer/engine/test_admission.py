"""How many tokens a request may get, to the last place of the context."""

import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.engine import admission
from gpt4moe.infer.engine.request import EngineRequest

from .models import make_config

LENGTH = 32  # of prompt and continuation


def most_new(num_prompt, max_new_tokens):
    request = EngineRequest([1] * num_prompt, SamplingConfig(max_new_tokens=max_new_tokens))
    return admission.check(request, make_config(64, 48), EngineConfig(), LENGTH, None)


def test_a_continuation_goes_to_the_last_place_and_no_further():
    assert [most_new(20, asked) for asked in (1, 11, 12, 13, 99)] == [1, 11, 12, 12, 12]
    assert [most_new(num_prompt, 99) for num_prompt in (LENGTH - 2, LENGTH - 1)] == [2, 1]
    with pytest.raises(CallerError, match="prompt tokens=32 must be shorter than the 32 tokens"):
        most_new(LENGTH, 1)
