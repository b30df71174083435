"""A caller that goes away, in a stream or before it, has left its slot within two steps; an engine that ends."""

import asyncio
import concurrent.futures
import json
import time

import httpx2
import jax
import pytest
from starlette.testclient import TestClient

from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.serve import ServeConfig
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.serve import server
from gpt4moe.serve.app import make_app

from .caller import Caller
from .conftest import MODEL

ENDLESS = {"model": MODEL, "max_tokens": 200, "ignore_eos": True}
ASKED = {
    "/v1/completions": {"prompt": ["a", "b"]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "n": 2},
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ASKED)
def test_a_slot_is_free_within_two_steps(make_service, stepper, path, stream):
    service = make_service()
    with stepper.still() as engine:
        asyncio.run(_leave(engine, service, path, json.dumps(ENDLESS | ASKED[path] | {"stream": stream}).encode()))
        cancelled = engine.metrics().finished["cancelled"]
    assert service.active == 0 and cancelled >= 2


async def _leave(engine, service, path, body):
    caller = Caller(make_app(service), path, [{"body": body}])
    call = asyncio.create_task(caller.call())
    while engine.metrics().queued < 2:
        await asyncio.sleep(0.001)
    for _ in range(20):
        engine.step()
        await asyncio.sleep(0)
    assert engine.metrics().running == 2 and not call.done()
    caller.gone.set()
    await call
    steps = 0
    while engine.metrics().running or engine.metrics().pages_used:
        engine.step()
        steps += 1
    assert steps <= 2


def test_a_connection_that_breaks_is_noticed(url, client, engine):
    """Over a real socket, in the middle of a stream that would go on."""
    before = engine.metrics()
    stream = client.completions.create(
        model=MODEL, prompt="a", max_tokens=250, stream=True, n=4, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    with httpx2.Client(base_url=url) as session, pytest.raises(httpx2.ReadTimeout):
        session.post("/v1/completions", json=ENDLESS | {"prompt": ["b"] * 8, "max_tokens": 250}, timeout=0.05)
    deadline = time.monotonic() + 60
    while (engine.metrics().running or engine.metrics().queued) and time.monotonic() < deadline:
        time.sleep(0.01)
    after = engine.metrics()
    assert after.pages_used == 0 and after.finished["cancelled"] > before.finished["cancelled"]
    assert after.finished["length"] - before.finished["length"] < 12


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_whose_engine_cannot_go_on_tells_its_callers_and_ends(decoder, tokenizer, make_service, monkeypatch):
    engine = Engine(decoder, tokenizer, EngineConfig(slots=1, page_size=16, prefill_chunk=64))

    def no_room():
        raise MemoryError("no room for pages")

    monkeypatch.setattr(engine.programs, "reset", no_room)
    for leaf in jax.tree.leaves(engine.programs.held):
        leaf.delete()
    service = make_service(engine=engine)
    with server.bind(ServeConfig(port=0)) as bound, concurrent.futures.ThreadPoolExecutor() as callers:
        asked = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 4}
        url = f"{server.address(bound)}/v1/completions"
        bound.listen()
        answer = callers.submit(httpx2.post, url, json=asked, timeout=60)
        server.serve(service, bound, print)
    assert answer.result().status_code == 500
    assert "no room for pages" in engine.fault and not engine.accepting
    service.draining = False  # an application in another server knows by the engine alone
    with TestClient(make_app(service)) as client:
        assert client.get("/healthz").status_code == 503
