"""Files of requests: every line answered in its order, every mistake told with its file and line."""

import json

import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.infer.generate import generate
from gpt4moe.infer.requests import read_requests, run_requests, write_lines
from tests.infer.engine.models import make_model

CONTEXT = 64
DEFAULTS = SamplingConfig(temperature=0.8, max_new_tokens=6, seed=3)


@pytest.fixture(scope="module")
def model():
    return make_model(byte_tokenizer().vocab_size, CONTEXT)


@pytest.fixture(scope="module")
def engine(model):
    config = EngineConfig(slots=4, page_size=16, prefill_chunk=16, max_queue=2)
    return Engine(Decoder.of(model), byte_tokenizer(), config)


def written(tmp_path, *lines):
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return str(path)


def test_continuations_are_those_of_generate_line_by_line(model, engine, tmp_path):
    prompts = ["def f(", "", "ü", "a" * 40, "return", "x", "yz", "if"]
    path = written(tmp_path, *({"prompt": prompt, "id": index} for index, prompt in enumerate(prompts)))
    told = []
    write_lines(run_requests(engine, read_requests(path, DEFAULTS), progress=told.append), str(tmp_path / "out.jsonl"))
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [document["id"] for document in made] == list(range(8))
    expected, _ = generate(model, byte_tokenizer(), prompts, DEFAULTS)
    for document, generation in zip(made, expected, strict=True):
        (continuation,) = document["continuations"]
        assert tuple(continuation["token_ids"]) == generation.token_ids
        assert (continuation["text"], document["prompt"]) == (generation.text, generation.prompt)
        assert continuation["finish_reason"] == generation.finish_reason
    assert told[-1].startswith("8 of 8 requests done")


def test_a_line_has_settings_of_its_own_and_may_ask_for_more(engine, tmp_path):
    asked = {"n": 2, "logprobs": 1, "prompt_logprobs": True, "max_new_tokens": 3, "logit_bias": {"70": 1000}}
    path = written(tmp_path, {"prompt": "ab"} | asked, b"", {"prompt": "c", "temperature": 0})
    first, second = run_requests(engine, read_requests(path, DEFAULTS))
    assert [c["token_ids"] for c in first["continuations"]] == [(70, 70, 70)] * 2
    assert len(first["prompt_logprobs"]) == first["num_prompt_tokens"] - 1 == 2
    assert [len(top) for top in first["continuations"][0]["top_logprobs"]] == [1, 1, 1]
    assert len(second["continuations"]) == 1 and "logprobs" not in second["continuations"][0]


BAD = [
    (b"{", "is not JSON"),
    (b"[1]", "must be a JSON object, not list"),
    (b'{"prompt": "\xff"}', "is not JSON"),
    ({"text": "a"}, "has no key 'text'; there are"),
    ({"prompt": "a", "temprature": 1}, "has no key 'temprature'; there are temperature"),
    ({"prompt": 3}, "prompt=3 must be text"),
    ({"prompt": "a", "temperature": -1}, "temperature=-1 must be a number of at least 0"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "a token id of logit_bias='x' must be an integer"),
    ({"prompt": "a", "logit_bias": {"²": 1}}, "a token id of logit_bias='²' must be an integer"),
    ({"prompt": "a", "priority": 0.5}, "priority=0.5 must be an integer"),
    ({"prompt": "a" * 64}, "prompt tokens=65 must be shorter than the 64 tokens"),
    ({"prompt": "a", "json_schema": '{"type": "foo"}'}, 'json_schema=\'{"type": "foo"}\' cannot be followed'),
    ({"prompt": "a", "logprobs": 50}, "logprobs=50 must be at most 20"),
    ({"prompt": "a", "images": ["cat.png"]}, "images='cat.png' but the run was trained without images"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=str)
def test_a_bad_line_is_told_by_file_and_line_before_any_is_served(engine, tmp_path, line, message):
    path, before = written(tmp_path, {"prompt": "fine"}, line), engine.metrics().submitted
    with pytest.raises(CallerError) as refused:
        list(run_requests(engine, read_requests(path, DEFAULTS)))
    assert str(refused.value).startswith(f"{path}:2: {message}") and "\n" not in str(refused.value)
    assert engine.metrics().submitted == before


def test_what_generate_does_not_read_it_refuses(model):
    with pytest.raises(CallerError, match=r"stop=\('x',\) is read by the engine alone; leave it out"):
        generate(model, byte_tokenizer(), ["a"], SamplingConfig(stop=("x",)))
