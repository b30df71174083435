"""Deterministic mode: a request gives the same tokens, to the last bit of their log-probabilities, in any company."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.infer.engine.request import EngineRequest

from .models import make_decoder

CONTEXT = 128


def request_of(generator):
    """A random request: half of them begin as all others do, so that they share pages."""
    length = int(generator.integers(1, 90))
    ids = np.random.default_rng(7).integers(16, 272, 60)[:length].tolist() if generator.integers(2) else []
    ids += generator.integers(16, 272, length - len(ids)).tolist()
    sampling = SamplingConfig(
        temperature=float(generator.choice([0.0, 0.7, 2.0])),
        top_p=float(generator.choice([0.5, 1.0])),
        max_new_tokens=int(generator.integers(1, 30)),
        seed=int(generator.integers(1000)),
        presence_penalty=float(generator.choice([0.0, 1.0])),
        logprobs=int(generator.integers(3)),
        ignore_end_of_text=True,
    )
    return EngineRequest(ids, sampling)


@pytest.fixture(scope="module")
def decoder():
    return make_decoder(byte_tokenizer().vocab_size, CONTEXT)


@pytest.fixture(scope="module")
def engine(decoder):
    config = EngineConfig(slots=4, page_size=8, num_pages=40, prefill_chunk=32, deterministic=True)
    return Engine(decoder, byte_tokenizer(), config)


def test_the_same_request_gives_the_same_tokens_whatever_else_is_in_the_batch(engine):
    assert [str(shape) for shape in engine.warm_up()] == [
        "decode, rows=4 tokens=1 pages=16",
        "prefill, rows=1 tokens=32 pages=16",
    ]
    generator = np.random.default_rng(0)
    requests = [request_of(generator) for _ in range(6)]
    alone = [engine.submit(request).result()[0] for request in requests]
    for _ in range(6):
        for _ in range(int(generator.integers(1, 8))):
            engine.submit(request_of(generator))
        for _ in range(int(generator.integers(0, 6))):
            engine.step()
        again = []
        for request in requests:
            again.append(engine.submit(request))
            engine.step()
        for before, handle in zip(alone, again, strict=True):
            (made,) = handle.result()
            assert made.token_ids == before.token_ids
            assert made.logprobs == before.logprobs
    metrics = engine.metrics()
    assert metrics.cached_prompt_tokens > 0 and metrics.preemptions == 0


def test_tokens_that_were_drawn_are_read_again_by_a_row_that_has_them_in_its_prompt(engine):
    """They were read one by one; a row of its own reads them in chunks, and rounded otherwise."""
    ids, asked = (
        np.random.default_rng(3).integers(16, 272, 70),
        SamplingConfig(max_new_tokens=30, ignore_end_of_text=True),
    )
    (made,) = engine.submit(EngineRequest(ids, asked)).result()
    (again,) = engine.submit(EngineRequest([*ids, *made.token_ids], asked)).result()
    assert (made.prompt.num_cached, again.prompt.num_cached) == (0, 64)


def test_it_is_refused_where_rounding_would_break_it(decoder):
    rounded = dataclasses.replace(decoder, dtype=jnp.dtype("bfloat16"))
    with pytest.raises(CallerError, match="deterministic=True needs float32, not bfloat16; load the decoder in"):
        Engine(rounded, byte_tokenizer(), EngineConfig(deterministic=True))
    with pytest.raises(
        CallerError, match=r"slots=16 times draft_tokens \+ 1 \(4\) must be below 64 where deterministic"
    ):
        Engine(decoder, byte_tokenizer(), EngineConfig(slots=16, draft_tokens=3, deterministic=True))
