"""What comes in broken, too large, too often or without a key is refused in OpenAI's form, and nothing else happens."""

import asyncio
import json

import httpx2
import jax
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.engine.request import EngineRequest
from gpt4moe.serve.app import make_app

from .caller import Caller
from .conftest import ENGINE, MODEL

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
SMALL = {"model": MODEL, "prompt": "a", "max_tokens": 1}


def refused(response, status, said, code=None):
    error = response.json()["error"]
    assert (response.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert said in error["message"] and "\n" not in error["message"]
    assert code is None or error["code"] == code
    return error


@pytest.mark.parametrize("path", [COMPLETE, CHAT])
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe{}", b'{"model": "\xff"}', b'{"model": "\\ud800"}', b"\x00" * 9,
        b"[" * 100_000, b'{"prompt":' * 50_000, b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"model": NaN}',
        b'{"model": "tiny", "prompt": "a", "messages": "a", "temperature": 1e999}', b'{"a": ' + b"9" * 9999 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_bodies_that_are_not_requests(post, path, body):
    response = post(path, body)
    refused(response, 400, "")


WRONG = {
    "prompt": [{}, 1.5, True, None, [], [[]], [1.5], [["a"]], [-1], [10**12], [None], ["a", 1], [300]],
    "temperature": ["1", -1, 1000, True, []],
    "max_tokens": [-1, 1.5, "1", True, 2**40],
    "n": [0, -1, 129, 17, 1.0, "2"],
    "stop": ["", [""], [1], ["a"] * 17, {}],
    "logit_bias": [[], {"a": 1}, {"1": "x"}, {"1": 101}, {"999": 1}, {"-1": 1}],
    "seed": ["1", 2**63, 1.5],
    "logprobs": [-1, 21, True, "3"],
    "stream": ["true", 1],
    "top_p": [0, 1.1],
    "min_p": [-0.1],
    "repetition_penalty": [0],
    "deadline_seconds": [0, -1, 1e9],
    "best_of": [2],
    "suffix": ["x"],
    "stream_options": [{"x": 1}, []],
    "unknown": [1],
}


@pytest.mark.parametrize("field", WRONG)
def test_fields_of_wrong_types_and_values(post, field):
    for value in WRONG[field]:
        error = refused(post(COMPLETE, json.dumps(SMALL | {field: value})), 400, "")
        assert field in f"{error['param']} {error['message']}" or error["param"] == "token id", (value, error)


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"store": True}, "store", "unsupported parameter: store"),
        ({"metadata": {"a": "b"}}, "metadata", "unsupported parameter: metadata"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
        ({"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"temperature": "1"}, "temperature", "a valid number"),
    ],
    ids=str,
)
def test_the_field_at_fault_is_told_once_and_why(post, given, param, said):
    error = refused(post(COMPLETE, json.dumps(SMALL | given)), 400, said)
    assert error["param"] == param


def test_a_schema_that_is_large_or_cannot_be_followed(post):
    def asked(schema):
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "response_format": wanted}
        return refused(post(CHAT, json.dumps(body)), 400, "")

    large = {"type": "object", "properties": {f"name{index}": {"type": "string"} for index in range(3000)}}
    assert "characters, at most 50000" in asked(large)["message"]
    assert "nothing can begin" in asked({"$ref": "#"})["message"]


def test_other_ways_of_asking(url, post):
    refused(post(COMPLETE, json.dumps(SMALL), headers={"Content-Type": "text/plain"}), 415, "must be application/json")
    refused(post(COMPLETE, json.dumps(SMALL | {"model": "no"})), 404, "does not exist", "model_not_found")
    refused(post(COMPLETE, json.dumps(SMALL | {"prompt": "x" * 300})), 400, "too many", "context_length_exceeded")
    refused(post(COMPLETE, json.dumps(SMALL | {"prompt": [1] * 256})), 400, "at most 255", "context_length_exceeded")
    refused(post(COMPLETE, json.dumps(SMALL | {"prompt": ["a"] * 17})), 400, "may be 16", "too_many_choices")
    refused(post("/v1/nothing", "{}"), 404, "Not Found")
    refused(post("/nothing", "{}"), 404, "Not Found")
    refused(post("/v1/models", "{}"), 405, "Method Not Allowed")


def test_large_and_slow_bodies(make_service):
    with TestClient(make_app(make_service(max_body_bytes=100, body_seconds=0.05))) as caller:
        json_type = {"Content-Type": "application/json"}
        refused(caller.post(COMPLETE, content=b" " * 101, headers=json_type), 413, "at most 100 bytes")

        def parts():  # of a body that does not say how long it is
            yield from [b" " * 60] * 2

        refused(caller.post(COMPLETE, content=parts(), headers=json_type), 413, "at most 100 bytes")
        assert caller.post(COMPLETE, json=SMALL).status_code == 200
    caller = Caller(make_app(make_service(body_seconds=0.05)), COMPLETE, [{"body": b"{", "more_body": True}])
    asyncio.run(caller.call())
    assert caller.sent[0]["status"] == 408


def test_the_key_is_wanted_below_v1_alone(make_service, listening):
    with (
        listening(make_service(api_key="s€cret")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
    ):
        for given in ({}, {"Authorization": "Bearer s"}, {"Authorization": "Basic s€cret".encode()}):
            with TestClient(make_app(make_service(api_key="s€cret"))) as caller:
                response = caller.get("/v1/models", headers=given)
                assert refused(response, 401, "API key", "invalid_api_key")["type"] == "authentication_error"
                assert response.headers["www-authenticate"] == "Bearer"
                assert [caller.get(path).status_code for path in ("/", "/healthz", "/metrics")] == [200, 200, 200]
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        sent = {"Authorization": "Bearer s€cret".encode()}
        assert httpx2.get(f"{url}/v1/models", headers=sent).status_code == 200
    ascii_key = make_app(make_service(api_key="key"))
    with TestClient(ascii_key) as caller:
        assert caller.get("/v1/models", headers={"Authorization": "Bearer key"}).status_code == 200


def test_a_full_queue_says_when_to_try_again(make_service, stepper, tokenizer):
    """What is taken stays, and the next is refused, whole."""
    endless = SamplingConfig(max_new_tokens=100, ignore_end_of_text=True)
    with TestClient(make_app(make_service())) as caller, stepper.still() as engine:
        taken = [engine.submit(EngineRequest([tokenizer.end_of_text], endless)) for _ in range(15)]
        response = caller.post(COMPLETE, json=SMALL | {"prompt": ["a", "b"]})
        assert refused(response, 429, "the queue is full", "queue_full")["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
        assert engine.metrics().queued == 16  # of the two prompts one found room
        engine.step()
        assert engine.metrics().queued + engine.metrics().running == 15  # and gave it back
        for handle in taken:
            handle.cancel()


def test_too_many_at_a_time_and_a_server_that_is_ending(make_service):
    service = make_service(max_concurrent=2)
    with TestClient(make_app(service)) as caller:
        service.active = 2
        response = caller.post(COMPLETE, json=SMALL)
        refused(response, 429, "the most at a time", "too_many_requests")
        assert response.headers["retry-after"] == "1"
        service.active = 0
        assert caller.post(COMPLETE, json=SMALL).status_code == 200 and service.active == 0
        service.draining = True
        response = caller.post(COMPLETE, json=SMALL)
        refused(response, 503, "shutting down", "shutting_down")
        assert response.headers["retry-after"] and caller.get("/healthz").status_code == 503


def test_the_metrics_are_those_of_the_engine(make_service, engine):
    with TestClient(make_app(make_service())) as caller:
        before = _samples(caller)
        assert caller.post(COMPLETE, json=SMALL | {"max_tokens": 5, "ignore_eos": True}).status_code == 200
        assert caller.post(COMPLETE, json=SMALL | {"model": "no"}).status_code == 404
        after = _samples(caller)
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert gained["gpt4moe_new_tokens_total"] == 5 and gained["gpt4moe_prompt_tokens_total"] == 2
    assert gained["gpt4moe_time_to_first_token_seconds_count"] == 1
    assert gained["gpt4moe_inter_token_seconds_bucket", "+Inf"] == 4
    assert gained["gpt4moe_finished_total", "length"] == 1
    assert sum(value for name, value in gained.items() if name[0] == "gpt4moe_expert_tokens_total") == 6 * 2 * 2
    assert after["gpt4moe_http_responses_total", COMPLETE, "404"] == 1
    assert after["gpt4moe_slots"] == ENGINE.slots and after["gpt4moe_late_compilations_total"] == 0
    assert engine.metrics().pages_used == 0


def test_a_fault_of_the_server_is_told_and_counted(make_service, monkeypatch):
    service = make_service()

    def fail(request):
        raise ZeroDivisionError

    monkeypatch.setattr(service.engine, "submit", fail)
    with TestClient(make_app(service), raise_server_exceptions=False) as caller:
        before = _samples(caller)
        refused(caller.post(COMPLETE, json=SMALL), 500, "its log says how", "internal_error")
        stream = caller.post(COMPLETE, json=SMALL | {"stream": True})  # which has not begun
        refused(stream, 500, "its log says how", "internal_error")
        after = _samples(caller)
    answered = ("gpt4moe_http_responses_total", COMPLETE, "500")
    assert after[answered] - before.get(answered, 0) == 2


def test_a_stream_that_fails_on_its_way_tells_the_error_and_ends(make_service, stepper, caplog):
    body = json.dumps(SMALL | {"max_tokens": 50, "ignore_eos": True, "stream": True}).encode()
    caller = Caller(make_app(make_service()), COMPLETE, [{"body": body}])
    with stepper.still() as engine:
        asyncio.run(_fail_on_its_way(engine, caller))
    start, *parts = caller.sent
    *events, nothing = b"".join(part["body"] for part in parts).decode().split("\n\n")
    assert start["status"] == 200 and nothing == "" and parts[-1].get("more_body", False) is False
    *told, error, end = [event.removeprefix("data: ") for event in events]
    assert len(told) >= 2 and all("choices" in json.loads(event) for event in told) and end == "[DONE]"
    error = json.loads(error)["error"]
    assert (error["type"], error["code"]) == ("server_error", "model_error") and "deleted" in error["message"]
    assert "a stream failed" in caplog.text


async def _fail_on_its_way(engine, caller):
    call = asyncio.create_task(caller.call())
    while not engine.metrics().queued:
        await asyncio.sleep(0.001)
    while len(caller.sent) < 3:  # the start of the answer and two of its events
        engine.step()
        await asyncio.sleep(0)
    for leaf in jax.tree.leaves(engine.programs.held):
        leaf.delete()
    engine.step()
    await asyncio.wait_for(call, 60)


def _samples(caller):
    response = caller.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(response.text) for sample in family.samples]
    return {
        (sample.name, *sample.labels.values()) if sample.labels else sample.name: sample.value for sample in samples
    }
