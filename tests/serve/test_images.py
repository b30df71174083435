"""Images of chats reach the model: what it says of one is what the engine says of its pixels, and of no other."""

import base64
import dataclasses

import jax
import pytest
from flax import nnx
from starlette.testclient import TestClient

from gpt4moe.config.data import ImageConfig
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.infer.engine.request import EngineRequest
from gpt4moe.infer.pictures import fitted_picture
from gpt4moe.model.transformer import Transformer
from gpt4moe.serve.app import make_app
from tests.data.image_documents import picture
from tests.infer.engine.models import make_config
from tests.infer.engine.test_images import VISION

from .conftest import MODEL

IMAGES = ImageConfig(height=8, width=12, per_row=2)


@pytest.fixture(scope="module")
def caller(tokenizer, make_service):
    model = dataclasses.replace(make_config(tokenizer.vocab_size, 64), vision=VISION)
    config = EngineConfig(slots=2, page_size=8, prefill_chunk=64, max_pictures=2, deterministic=True)
    engine = Engine(Decoder.of(_sharp(model)), tokenizer, config)
    engine.run_in_thread()
    with TestClient(make_app(make_service(engine=engine, images=IMAGES))) as caller:
        caller.engine = engine
        yield caller
    engine.close()


def _sharp(config):
    """A random model whose matrices are large enough for what it sees to matter."""
    definition = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]
    params = jax.jit(lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(0)))[1])()
    return nnx.merge(definition, jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 2 else leaf, params))


def said_of(caller, *files):
    images = [{"type": "image_url", "image_url": {"url": _data_url(file)}} for file in files]
    turns = [{"role": "user", "content": [*images, {"type": "text", "text": "?"}]}]
    return caller.post(
        "/v1/chat/completions", json={"model": MODEL, "messages": turns, "max_tokens": 8, "temperature": 0}
    )


def _data_url(file):
    return "data:image/png;base64," + base64.b64encode(file).decode()


def test_a_chat_sees_its_own_images(caller, tokenizer):
    files = [picture(red, size=(12, 8)) for red in (0, 120, 255)]
    said = [said_of(caller, file).json()["choices"][0]["message"]["content"] for file in files]
    ids = [tokenizer.end_of_text, *tokenizer.encode("### User\n"), tokenizer.image]
    ids += tokenizer.encode("?\n\n### Assistant\n")
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=8, stop=("\n### ",))
    for file, text in zip(files, said, strict=True):
        request = EngineRequest(ids, greedy, pictures=(fitted_picture(file, IMAGES),))
        assert caller.engine.submit(request).result()[0].text == text
    assert len(set(said)) > 1
    refused = said_of(caller, *files)
    assert refused.status_code == 400 and "messages hold more than 2 images" in refused.json()["error"]["message"]
    broken = said_of(caller, b"GIF89a").json()["error"]
    assert broken["code"] == "invalid_image" and "cannot be decoded" in broken["message"]
