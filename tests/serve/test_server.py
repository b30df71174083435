"""A server that is told to end: how long it waits, for whom, and when it waits no longer."""

import asyncio
import signal

import pytest

from gpt4moe.config.engine import EngineConfig
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.infer.engine.request import EngineRequest
from gpt4moe.serve.server import FLUSH_SECONDS, DrainingServer


@pytest.fixture
def own_engine(decoder, tokenizer):
    """One to be closed; nothing is compiled, as it takes no step."""
    return Engine(decoder, tokenizer, EngineConfig(slots=1, page_size=16, prefill_chunk=64))


@pytest.fixture
def draining(make_service, own_engine):
    """Makes a server that has heard SIGTERM while a request runs, its service, and what it has said."""

    def make(seconds):
        told, service = [], make_service(engine=own_engine, drain_seconds=seconds)
        server = DrainingServer(service, told.append)
        service.active = 1
        assert not is_over(server)
        server.handle_exit(signal.SIGTERM, None)
        assert service.draining
        return server, service, told

    return make


def is_over(server):
    """Whether the server stops at its next tick."""
    return asyncio.run(server.on_tick(1))


def test_it_waits_for_what_runs_and_no_longer(draining, own_engine):
    seconds = 60 * FLUSH_SECONDS
    server, service, told = draining(seconds)
    assert told == [f"SIGTERM: no new requests; 1 running ones have {seconds} s to end"]
    assert not is_over(server) and own_engine.accepting
    service.active = 0
    assert is_over(server) and own_engine.accepting


def test_what_has_not_ended_in_time_is_ended(draining, own_engine):
    handle = own_engine.submit(EngineRequest([0]))
    server, _, _ = draining(1e-9)
    assert is_over(server) and not own_engine.accepting
    assert handle.result()[0].finish_reason == "cancelled"


def test_a_second_signal_hurries(draining, own_engine):
    handle = own_engine.submit(EngineRequest([0]))
    server, _, told = draining(60 * FLUSH_SECONDS)
    assert not is_over(server) and not handle.done
    server.handle_exit(signal.SIGINT, None)
    assert told[1] == "SIGINT: no new requests; 1 running ones have 0 s to end"
    assert is_over(server) and handle.result()[0].finish_reason == "cancelled"
