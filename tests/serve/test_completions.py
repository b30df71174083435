"""/v1/completions by OpenAI's own client: texts, scores, draws, streams, what ends them."""

import numpy as np
import openai
import pytest

from gpt4moe.config.engine import EngineConfig
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.serve.prompts import sampling_of
from gpt4moe.serve.requests import CompletionRequest

from .conftest import MODEL

PLAIN = {"model": MODEL, "temperature": 0, "max_tokens": 8}


def complete(client, prompt, **given):
    known = {name: given.pop(name) for name in list(given) if name in ("top_k", "stop_token_ids", "ignore_eos")}
    extra = {name: given.pop(name) for name in ("expert_ids", "return_token_ids", "deadline_seconds") if name in given}
    return client.completions.create(prompt=prompt, extra_body=known | extra, **PLAIN | given)


def test_texts_and_token_ids_give_the_same_with_usage(client, tokenizer):
    ids = [tokenizer.end_of_text, *tokenizer.encode("def f(")]
    by_text, by_ids = complete(client, "def f("), complete(client, ids)
    assert by_text.choices[0].text == by_ids.choices[0].text != ""
    assert (by_text.usage.prompt_tokens, by_text.usage.completion_tokens) == (len(ids), 8)
    assert by_text.choices[0].finish_reason == "length" and by_text.object == "text_completion"


def test_prompts_and_n_are_choices_in_order(client):
    alone = [complete(client, prompt).choices[0].text for prompt in ("a", "xyz")]
    both = complete(client, ["a", "xyz"], n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert both.usage.completion_tokens == 32


def test_a_seed_fixes_draws_and_the_n_differ(client):
    first, again = (complete(client, "ab", temperature=1.5, seed=-3, n=3) for _ in range(2))
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert len({choice.text for choice in first.choices}) == 3
    twice = complete(client, ["ab", "ab"], temperature=1.5, seed=-3)
    assert [choice.text for choice in twice.choices] == [choice.text for choice in first.choices[:2]]
    drawn = {complete(client, "ab", temperature=1.5).choices[0].text for _ in range(3)}
    assert len(drawn) > 1


def test_an_echo_scores_a_text_as_it_was_drawn(client, tokenizer):
    """A continuation, and its text scored again with nothing drawn, have the same log-probabilities."""
    made = complete(client, "ab", logprobs=2, return_token_ids=True).choices[0]
    ids = [*made.prompt_token_ids, *made.token_ids]
    scored = complete(client, ids, echo=True, max_tokens=0, logprobs=2)
    said = scored.choices[0].logprobs
    assert scored.usage.completion_tokens == 0 and len(said.tokens) == len(ids) and said.token_logprobs[0] is None
    np.testing.assert_allclose(said.token_logprobs[3:], made.logprobs.token_logprobs, atol=1e-5)
    assert said.tokens[3:] == made.logprobs.tokens
    for top, logprob in zip(said.top_logprobs[3:], said.token_logprobs[3:], strict=True):
        assert len(top) == 2 and max(top.values()) == pytest.approx(logprob, abs=1e-5)  # it was drawn greedily
    forced = complete(client, "ab", logprobs=1, logit_bias={"77": 100}, max_tokens=1).choices[0].logprobs
    (top,) = forced.top_logprobs
    assert len(top) == 2 and top[forced.tokens[0]] == forced.token_logprobs[0] == min(top.values())
    by_text = complete(client, "ab", echo=True, max_tokens=0, logprobs=0).choices[0]
    assert by_text.text == "ab" and by_text.logprobs.tokens == ["a", "b"] and by_text.logprobs.text_offset == [0, 1]
    np.testing.assert_allclose(by_text.logprobs.token_logprobs, said.token_logprobs[1:3], atol=1e-5)


@pytest.mark.parametrize("given", [{}, {"n": 2, "echo": True, "logprobs": 1, "expert_ids": True}])
def test_a_stream_joined_is_the_whole_answer(client, given):
    given = {"temperature": 1.2, "seed": 5, "max_tokens": 20} | given
    whole = complete(client, ["abc", "x" * 70], **given)
    chunks = list(complete(client, ["abc", "x" * 70], stream=True, stream_options={"include_usage": True}, **given))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert "".join(part.text for part in mine) == choice.text
        assert [part.finish_reason for part in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        if given.get("logprobs"):
            for name in ("tokens", "token_logprobs", "text_offset"):
                joined = [value for part in mine for value in getattr(part.logprobs, name)]
                assert joined == getattr(choice.logprobs, name)
            assert [row for part in mine for row in part.expert_ids] == choice.expert_ids
            assert mine[0].prompt_expert_ids == choice.prompt_expert_ids


def test_characters_are_never_cut(client):
    """A random model over bytes writes broken ones all the time; each chunk is text by itself."""
    whole = complete(client, "é", max_tokens=60, temperature=1.5, seed=1).choices[0].text
    parts = [
        chunk.choices[0].text for chunk in complete(client, "é", max_tokens=60, temperature=1.5, seed=1, stream=True)
    ]
    assert "".join(parts) == whole and any(ord(character) > 127 for character in whole) and len(parts) > 10


def test_what_ends_a_continuation(client):
    text = complete(client, "abc", max_tokens=16).choices[0].text
    stop = text[4:6]
    made = complete(client, "abc", max_tokens=16, stop=["never", stop]).choices[0]
    assert (made.text, made.finish_reason) == (text[: text.index(stop)], "stop")
    forced = complete(client, "abc", logit_bias={"77": 100}, stop_token_ids=[77]).choices[0]
    assert forced.finish_reason == "stop"
    late = complete(client, "abc", max_tokens=200, ignore_eos=True, deadline_seconds=1e-6).choices[0]
    assert late.finish_reason == "deadline"


def test_sampling_settings_reach_the_engine(client):
    """Some seen in what is drawn, all in what the engine is told."""
    given = {"logit_bias": {"77": 100, "78": 100}, "return_token_ids": True}
    assert len(set(complete(client, "ab", **given).choices[0].token_ids)) == 1
    assert set(complete(client, "ab", frequency_penalty=2, **given).choices[0].token_ids) == {77, 78}
    greedy = complete(client, "ab").choices[0].text
    assert complete(client, "ab", temperature=5, seed=1, top_k=1).choices[0].text == greedy
    asked = {
        **{"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "n": 2, "stop": "x", "seed": 2**32 + 7},
        **{"presence_penalty": 0.3, "frequency_penalty": 0.2, "repetition_penalty": 1.1, "logit_bias": {"5": -1}},
        **{"stop_token_ids": [9], "ignore_eos": True},
    }
    told = sampling_of(CompletionRequest(model=MODEL, **asked), max_new_tokens=3)
    same = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    )
    assert {name: getattr(told, name) for name in same} == {name: asked[name] for name in same}
    assert (told.stop, told.stop_ids, told.ignore_end_of_text) == (("x",), (9,), True)
    assert (told.logit_bias, told.seed, told.max_new_tokens) == (((5, -1.0),), 7, 3)


def test_experts_of_every_token(client, decoder):
    """Those of the pass that a token was drawn from: the last of the prompt's are the first of the continuation's."""
    made = complete(client, "abc", expert_ids=True, return_token_ids=True).choices[0]
    experts, moe = np.array(made.expert_ids), decoder.config.moe
    per_token = (decoder.config.num_moe_layers, moe.experts_per_token)
    assert experts.shape == (8, *per_token) and experts.max() < moe.num_experts
    assert np.array(made.prompt_expert_ids).shape == (4, *per_token)
    assert made.prompt_expert_ids[-1] == made.expert_ids[0]
    read = complete(client, [*made.prompt_token_ids, *made.token_ids], expert_ids=True).choices[0]
    assert np.sort(read.prompt_expert_ids[3:-1]).tolist() == np.sort(made.expert_ids).tolist()
    assert "expert_ids" not in complete(client, "abc").choices[0].to_dict()


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert model.id == MODEL == client.models.retrieve(MODEL).id and model.max_model_len == 256


def test_usage_says_which_tokens_of_prompts_were_there_already(make_service, listening, decoder, tokenizer):
    """Pages of 16: two of them hold the beginning of the long prompts, once one of these was read."""
    engine = Engine(decoder, tokenizer, EngineConfig(slots=1, page_size=16, prefill_chunk=64, max_length=64))
    engine.run_in_thread()
    long, given = "x" * 40, {"model": MODEL, "max_tokens": 2, "temperature": 0}
    with listening(make_service(engine=engine)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:

        def cached(answer):
            return answer.usage.prompt_tokens_details.cached_tokens

        assert cached(client.completions.create(prompt=long, **given)) == 0
        assert cached(client.completions.create(prompt=[long, "y", long + "z"], n=2, **given)) == 64
        chunks = client.completions.create(prompt=long, stream=True, stream_options={"include_usage": True}, **given)
        assert cached(list(chunks)[-1]) == 32
        read_anew = client.completions.create(prompt=long, echo=True, logprobs=0, **given)
        assert cached(read_anew) == 0 and read_anew.usage.prompt_tokens == 41
        turns = [{"role": "user", "content": "hm"}]
        counted = [cached(client.chat.completions.create(messages=turns, **given)) for _ in range(2)]
        assert counted == [0, 16]
    engine.close()
