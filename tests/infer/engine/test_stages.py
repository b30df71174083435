"""Decoding over meshes of stages, experts and parts of heads: token for token what one device decodes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.check import CallerError
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer import stages
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.infer.engine.programs import forbid_compilation
from gpt4moe.infer.engine.request import EngineRequest
from gpt4moe.model.transformer import Transformer

CONTEXT = 128
CONFIG = EngineConfig(slots=4, page_size=8, num_pages=40, prefill_chunk=32, replay=True)
PROMPTS = [[0, 80, 81, 82] * 6, [0], list(range(20, 90)), [0, 99, 98, 99, 98, 99], [5, 5, 5]]
PLAIN = ModelConfig(
    num_layers=3,
    model_dim=32,
    vocab_size=byte_tokenizer().vocab_size,
    context_length=CONTEXT,
    attention=AttentionConfig(num_heads=4, num_kv_heads=1),
    moe=MoeConfig(num_experts=4, experts_per_token=2, hidden_dim=32),
    compute_dtype="float32",
)
# Dense layers before and between those with experts, a shared expert, key/value heads that two devices share or hold.
MANIFOLD = dataclasses.replace(
    PLAIN,
    num_layers=7,
    leading_dense_layers=1,
    moe_every=2,
    dense_hidden_dim=64,
    attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=6, qk_norm=True),
    moe=dataclasses.replace(PLAIN.moe, shared_hidden_dim=48, bias_rate=0.1),
)


def make_decoder(config, **given):
    graphdef, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    # Matrices as drawn give nearly the same logits after any text; larger ones make the text matter.
    larger = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 2 else leaf, state)
    return Decoder.of(nnx.merge(graphdef, larger), **given)


def requests():
    """Greedy and drawn continuations, with what penalties remember and experts that are forced."""
    asked = {"max_new_tokens": 14, "ignore_end_of_text": True, "logprobs": 2}
    settings = [
        SamplingConfig(temperature=0.0, **asked),
        SamplingConfig(temperature=0.7, seed=3, repetition_penalty=1.2, **asked),
    ]
    return [EngineRequest(ids, each, with_expert_ids=True) for ids in PROMPTS for each in settings]


def served(engine):
    with forbid_compilation():
        handles = [engine.submit(request) for request in requests()]
        return [handle.result()[0] for handle in handles]


@pytest.fixture(scope="module", params=["plain", "manifold"])
def model(request):
    return {"plain": PLAIN, "manifold": MANIFOLD}[request.param]


@pytest.fixture(scope="module")
def decoder(model):
    return make_decoder(model)


@pytest.fixture(scope="module")
def alone(decoder):
    engine = Engine(decoder, byte_tokenizer(), CONFIG)
    engine.warm_up()
    return served(engine)


def agree(made, expected):
    for one, other in zip(made, expected, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_array_equal(one.expert_ids_TLK, other.expert_ids_TLK)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("axes", "stage_layers"),
    [
        ({"tensor": 2}, None),
        ({"tensor": 4}, None),
        ({"expert": 4}, None),
        ({"stage": 2}, (1, 2)),
        ({"stage": 2, "expert": 2, "tensor": 2}, (2, 1)),
    ],
    ids=["heads in two", "a head each", "an expert each", "uneven stages", "all"],
)
def test_every_mesh_decodes_what_one_device_does(decoder, alone, axes, stage_layers):
    mesh = MeshConfig(tuple(axes.items()), stage_layers=stage_layers)
    laid_out = stages.cut(decoder, mesh, jax.devices()[: np.prod(list(axes.values()))])
    engine = Engine(laid_out, byte_tokenizer(), CONFIG)
    engine.warm_up()
    agree(served(engine), alone)
