"""One engine of a tiny random model, in its deterministic mode, and a real server of it, for the tests beside this."""

import contextlib
import threading
import time

import httpx2
import openai
import pytest

from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.serve import ServeConfig
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.serve import server
from gpt4moe.serve.chat_template import find_template
from gpt4moe.serve.service import Service
from tests.infer.engine.models import make_decoder

CONTEXT = 256
MODEL = "tiny"
END = "<|endoftext|>"
ENGINE = EngineConfig(slots=4, page_size=16, prefill_chunk=64, max_queue=12, deterministic=True, prefix_caching=False)


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def decoder(tokenizer):
    return make_decoder(tokenizer.vocab_size, CONTEXT)


class Stepper:
    """The one engine, stepped by a thread; `with stepper.still() as engine` it stands still and the test steps it."""

    def __init__(self, engine):
        self.engine, self._free, self._ended = engine, threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._ended.is_set():
            with self._free:
                worked = self.engine.step()
            time.sleep(0 if worked else 0.001)

    @contextlib.contextmanager
    def still(self):
        with self._free:
            yield self.engine
            while self.engine.step():
                pass

    def end(self):
        self._ended.set()
        self._thread.join()
        self.engine.close()


@pytest.fixture(scope="session")
def stepper(decoder, tokenizer):
    engine = Engine(decoder, tokenizer, ENGINE)
    engine.warm_up()
    stepper = Stepper(engine)
    yield stepper
    stepper.end()


@pytest.fixture(scope="session")
def engine(stepper):
    return stepper.engine


@pytest.fixture(scope="session")
def make_service(engine, tokenizer):
    """A service of the engine that runs, with settings of its own."""

    def make(images=None, engine=engine, **given):
        template = find_template(None, None, END, END)
        return Service(engine, tokenizer, ServeConfig(model_name=MODEL, **given), template, images)

    return make


@pytest.fixture(scope="session")
def listening():
    """Serves a service on a free port while it lasts: `with listening(service) as url`."""

    @contextlib.contextmanager
    def listen(service):
        with server.bind(ServeConfig(port=0)) as bound:
            running = server.DrainingServer(service, print)
            thread = threading.Thread(target=running.run, args=([bound],))
            thread.start()
            try:
                while not running.started:
                    time.sleep(0.01)
                yield server.address(bound)
            finally:
                running.should_exit = True
                thread.join()

    return listen


@pytest.fixture(scope="session")
def url(make_service, listening):
    with listening(make_service()) as url:
        yield url


@pytest.fixture(scope="session")
def client(url):
    """OpenAI's own."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def post(url):
    """Sends a body as it is."""
    with httpx2.Client(base_url=url, timeout=60, headers={"Content-Type": "application/json"}) as session:
        yield lambda path, content, **given: session.post(path, content=content, **given)
