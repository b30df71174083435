"""Generation over a mesh: token for token that of one device, stages of unequal depth included."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.rules import ShardingRules
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer.generate import generate
from gpt4moe.model.transformer import Transformer
from gpt4moe.parallel.layout import make_layout
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.parallel.sharding import state_shardings

PROMPTS = ["tree", "0123", "The quick brown fox"]
SAMPLING = SamplingConfig(temperature=0.0, max_new_tokens=8)
TOKENIZER = byte_tokenizer()
CONFIG = ModelConfig(
    num_layers=7,
    model_dim=16,
    vocab_size=TOKENIZER.vocab_size + TOKENIZER.vocab_size % 2,
    context_length=40,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    moe=MoeConfig(4, 2, hidden_dim=16, capacity_factor=1.0),
    moe_every=2,
    leading_dense_layers=1,
    dense_hidden_dim=16,
    compute_dtype="float32",
)
MESHES = {
    "TP2": MeshConfig({"tensor": 2}),
    "EP4": MeshConfig({"expert": 4}),
    "PP3": MeshConfig({"stage": 3}),
    "PP2 uneven": MeshConfig({"stage": 2}, stage_layers=(1, 2)),
    "TP2 x PP2 uneven x EP2": MeshConfig({"tensor": 2, "stage": 2, "expert": 2}, stage_layers=(1, 2)),
    "a training mesh": MeshConfig({"context": 2, "data": 2, "tensor": 2}, sequence_parallel=True, zero1=True),
}


@functools.cache
def generations(name):
    config = MESHES[name].for_generation() if name else MeshConfig()
    mesh = make_mesh(config, jax.devices()[: int(np.prod([size for _, size in config.axes], dtype=int))])
    layout = make_layout(CONFIG, config, ShardingRules(), mesh)

    def create():
        params = nnx.split(Transformer(CONFIG, rngs=nnx.Rngs(0), layout=layout))[1]
        # Matrices as drawn give nearly the same logits after any text; larger ones make the text matter.
        return jax.tree.map(lambda leaf: leaf * 2 if leaf.ndim > 2 else leaf, params)

    shardings = state_shardings(jax.eval_shape(create), mesh, ShardingRules())
    definition = nnx.split(nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0), layout=layout)))[0]
    model = nnx.merge(definition, jax.jit(create, out_shardings=shardings)())
    return generate(model, TOKENIZER, PROMPTS, SAMPLING)[0]


@pytest.mark.parametrize("name", MESHES)
def test_tokens_are_those_of_one_device(name):
    for got, want in zip(generations(name), generations(None), strict=True):
        assert got.token_ids == want.token_ids
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)


def test_the_text_matters():
    assert len({generation.token_ids for generation in generations(None)}) == len(PROMPTS)
