"""Speculation inside continuous batching: greedy rows are those of whole passes, and no row feels its company."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.infer.engine.request import EngineRequest

from .models import CHOICES, EXPERTS, LAYERS, FullPass, make_model

CONTEXT, TOKENS = 128, 4
CONFIG = EngineConfig(slots=3, page_size=8, num_pages=48, prefill_chunk=32, deterministic=True, draft_tokens=TOKENS)
PROMPTS = [[0, 80, 81, 82] * 6, [0], list(range(20, 70)), [0, 99, 98, 99, 98, 99]]


@pytest.fixture(scope="module")
def model():
    return make_model(byte_tokenizer().vocab_size, CONTEXT)


def nearly(decoder):
    """The same model a little off: it proposes much that stands, and some that does not."""
    generator = np.random.default_rng(0)

    def moved(leaf):
        return leaf * (1 + 0.1 * generator.normal(size=leaf.shape).astype(np.float32))

    return dataclasses.replace(decoder, weights=jax.tree.map(moved, decoder.weights))


@pytest.fixture(scope="module", params=["lookup", "model"])
def engine(request, model):
    decoder = Decoder.of(model)
    draft = nearly(decoder) if request.param == "model" else None
    return Engine(decoder, byte_tokenizer(), CONFIG, draft=draft)


def test_greedy_tokens_are_those_drawn_one_by_one_and_the_same_in_any_company(engine, model):
    assert {shape.kind for shape in engine.shapes} == {"verify", "prefill"}
    whole, generator = FullPass(model), np.random.default_rng(1)
    asked = {"max_new_tokens": 25, "ignore_end_of_text": True, "logprobs": 1}
    requests = [
        EngineRequest(ids, SamplingConfig(temperature=temperature, **asked), with_expert_ids=True)
        for ids in PROMPTS
        for temperature in (0.0, 0.8)
    ]
    alone = [engine.submit(request).result()[0] for request in requests]
    for request, made in zip(requests, alone, strict=True):
        if request.sampling.temperature == 0:
            assert list(made.token_ids) == whole.greedy(request.prompt_ids, 25, None)
        ids = [*request.prompt_ids, *made.token_ids]
        logits_TV, experts_TLK = whole(ids)
        logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV))
        places = range(len(request.prompt_ids) - 1, len(ids) - 1)
        np.testing.assert_allclose(made.logprobs, [logprobs_TV[p, ids[p + 1]] for p in places], atol=1e-5)
        assert (np.sort(made.expert_ids_TLK) == np.sort(experts_TLK[list(places)])).all()
    metrics = engine.metrics()
    assert 0 < metrics.accepted_tokens < metrics.proposed_tokens
    for index in generator.permutation(len(requests)):
        others = [engine.submit(requests[other]) for other in generator.integers(len(requests), size=3)]
        engine.step()
        assert engine.submit(requests[index]).result()[0].token_ids == alone[index].token_ids
        assert all(handle.result()[0].finish_reason == "length" for handle in others)
    assert engine.metrics().pages_used == 0


@pytest.mark.parametrize("engine", ["model"], indirect=True)
def test_what_a_model_proposes_changes_no_chance_of_a_token(engine, model):
    """Of the first token and of the first two, eight to choose from each, as many are drawn as the model says."""
    whole, temperature, num_kept, draws = FullPass(model), 0.7, 8, 900
    asked = SamplingConfig(
        temperature=temperature, top_k=num_kept, max_new_tokens=3, ignore_end_of_text=True, n=draws // 4
    )
    before, made = engine.metrics().accepted_tokens, []
    for draw in range(0, draws, asked.n):  # as many as may wait
        made += engine.submit(EngineRequest(PROMPTS[1], asked, draw=draw)).result()
    assert engine.metrics().accepted_tokens - before > draws / 4
    chances = {(): 1.0}
    for length, limit in ((1, 24.3), (2, 103.4)):  # the 0.1 % points of chi-square with 7 and 63 degrees of freedom
        chances = {
            (*ids, token): chance * share
            for ids, chance in chances.items()
            for token, share in likeliest(whole([*PROMPTS[1], *ids])[0][-1] / temperature, num_kept)
        }
        counts = collections.Counter(one.token_ids[:length] for one in made)
        assert set(counts) <= set(chances) and len(chances) == num_kept**length
        expected = {ids: draws * chance for ids, chance in chances.items()}
        assert sum((counts[ids] - number) ** 2 / number for ids, number in expected.items()) < limit


def likeliest(logits_V, number):
    """The tokens that top-k leaves, and the chance of each."""
    ids = np.argsort(-logits_V)[:number]
    weights = np.exp(logits_V[ids] - logits_V[ids[0]])
    return zip(ids.tolist(), (weights / weights.sum()).tolist(), strict=True)


@pytest.fixture(scope="module")
def short(model):
    """An engine that looks proposals up and has fewer pages than its rows would fill; it forces experts."""
    config = dataclasses.replace(CONFIG, num_pages=16, deterministic=False, replay=True)
    return Engine(Decoder.of(model), byte_tokenizer(), config)


def test_rows_short_of_pages_are_proposed_fewer_tokens_and_none_is_lost(short, model):
    whole = FullPass(model)
    asked = SamplingConfig(temperature=0.0, max_new_tokens=40, ignore_end_of_text=True)
    for _ in range(2):
        made = [handle.result()[0] for handle in [short.submit(EngineRequest(ids, asked)) for ids in PROMPTS]]
        assert [one.error for one in made] == [None] * len(PROMPTS)
        assert [list(one.token_ids) for one in made] == [whole.greedy(ids, 40, None) for ids in PROMPTS]
    metrics = short.metrics()
    assert metrics.preemptions > 0 and metrics.accepted_tokens > 0 and metrics.pages_used == 0


def test_experts_are_forced_on_proposals_too(short):
    ids = PROMPTS[0]
    asked = SamplingConfig(temperature=0.0, max_new_tokens=40, ignore_end_of_text=True)
    draw = np.random.default_rng(0).permuted(np.tile(np.arange(EXPERTS), (64, LAYERS, 1)), axis=-1)[..., :CHOICES]
    before = short.metrics().accepted_tokens
    (made,) = short.submit(EngineRequest(ids, asked, replay_ids_TLK=draw, with_expert_ids=True)).result()
    taken = np.concatenate([made.prompt.expert_ids_TLK, made.expert_ids_TLK[1:]])
    assert len(taken) == len(ids) + 39 and short.metrics().accepted_tokens > before
    assert (np.sort(taken) == np.sort(draw[: len(taken)])).all()


def test_what_counts_tokens_is_drawn_one_by_one(engine):
    before = engine.metrics().proposed_tokens
    once = SamplingConfig(temperature=0.0, presence_penalty=2000.0, logit_bias=((77, 1000.0),), max_new_tokens=8)
    (made,) = engine.submit(EngineRequest(PROMPTS[0], once)).result()
    assert made.token_ids[0] == 77 and made.token_ids.count(77) == 1
    assert engine.metrics().proposed_tokens == before


def test_a_draft_must_share_the_vocabulary_and_have_something_to_do(model):
    decoder = Decoder.of(model)
    other = dataclasses.replace(decoder, config=dataclasses.replace(decoder.config, vocab_size=999))
    with pytest.raises(CallerError, match="the draft's vocab_size=999 must be that of the model"):
        Engine(decoder, byte_tokenizer(), CONFIG, draft=other)
    with pytest.raises(CallerError, match="draft_tokens=0 leaves the draft nothing to do"):
        Engine(decoder, byte_tokenizer(), EngineConfig(), draft=decoder)
