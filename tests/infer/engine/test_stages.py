"""Decoding over meshes of stages, experts and parts of heads: token for token what one device decodes."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest

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
from gpt4moe.infer.engine.compilation import forbid_compilation
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.infer.engine.request import EngineRequest

from .models import sharpened

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
    num_layers=5,
    leading_dense_layers=1,
    moe_every=2,
    dense_hidden_dim=64,
    attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=6, qk_norm=True),
    moe=dataclasses.replace(PLAIN.moe, shared_hidden_dim=48, bias_rate=0.1),
)


def requests(model):
    """Greedy and drawn continuations, with what penalties remember, and one whose experts are forced."""
    asked = {"max_new_tokens": 14, "ignore_end_of_text": True, "logprobs": 2}
    settings = [
        SamplingConfig(temperature=0.0, **asked),
        SamplingConfig(temperature=0.7, seed=3, repetition_penalty=1.2, **asked),
    ]
    drawn = [EngineRequest(ids, each, with_expert_ids=True) for ids in PROMPTS for each in settings]
    shape = (len(PROMPTS[0]), model.num_moe_layers, 1)
    first_TL1 = np.random.default_rng(0).integers(model.moe.num_experts, size=shape)
    forced_TLK = np.concatenate([first_TL1, (first_TL1 + 1) % model.moe.num_experts], axis=-1)
    return [*drawn, EngineRequest(PROMPTS[0], settings[0], with_expert_ids=True, replay_ids_TLK=forced_TLK)]


def served(engine):
    with forbid_compilation():
        handles = [engine.submit(request) for request in requests(engine.decoder.config)]
        return [handle.result()[0] for handle in handles]


@functools.cache
def decoder_of(name, **form):
    return Decoder.of(sharpened({"plain": PLAIN, "manifold": MANIFOLD}[name]), **form)


@functools.cache
def alone(name, draft_tokens, **form):
    """What one device decodes."""
    return served(engine_of(decoder_of(name, **form), draft_tokens))


def engine_of(decoder, draft_tokens):
    engine = Engine(decoder, byte_tokenizer(), dataclasses.replace(CONFIG, draft_tokens=draft_tokens))
    engine.warm_up()
    return engine


def over(decoder, axes, stage_layers=None):
    mesh = MeshConfig(tuple(axes.items()), stage_layers=stage_layers)
    return stages.cut(decoder, mesh, jax.devices()[: math.prod(axes.values())])


CASES = {
    "four parts of heads": ("manifold", {}, 0, {"tensor": 4}, None),
    "experts in a stack": ("plain", {"product": "reduction"}, 0, {"expert": 2, "tensor": 2}, None),
    "integers": ("plain", {"quantize": "int8"}, 0, {"expert": 2, "tensor": 2}, None),
    "proposals judged by the last of uneven stages": ("plain", {}, 3, {"stage": 2}, (1, 2)),
    "all at once": ("manifold", {}, 0, {"stage": 2, "expert": 2, "tensor": 2}, None),
}


@functools.cache
def engine_over(case):
    name, form, draft_tokens, axes, stage_layers = CASES[case]
    return engine_of(over(decoder_of(name, **form), axes, stage_layers), draft_tokens)


@pytest.mark.parametrize("case", CASES)
def test_every_mesh_decodes_what_one_device_does(case):
    name, form, draft_tokens, *_ = CASES[case]
    for one, other in zip(served(engine_over(case)), alone(name, draft_tokens, **form), strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_array_equal(one.expert_ids_TLK, other.expert_ids_TLK)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_a_fault_of_a_stage_ends_what_runs_and_the_next_is_served():
    engine = engine_over("proposals judged by the last of uneven stages")
    request = requests(PLAIN)[0]
    (before,) = engine.submit(request).result()
    (relay,) = engine.programs.relays
    for leaf in jax.tree.leaves(relay.pages):
        leaf.delete()
    (ended,) = engine.submit(request).result()
    assert ended.finish_reason == "error" and "deleted" in ended.error
    (after,) = engine.submit(request).result()
    assert after.error is None and after.token_ids == before.token_ids


def test_each_device_holds_its_part_and_a_stage_no_layer_of_another():
    first, last = over(decoder_of("manifold"), {"stage": 2, "expert": 2, "tensor": 2})
    assert (len(first.weights.layers), len(last.weights.layers), last.moe_layers_before) == (3, 2, 1)
    assert first.weights.unembedding_DV is None and last.weights.embedding_VD is None
    devices = [set(jax.tree.leaves(stage.weights)[0].devices()) for stage in (first, last)]
    assert len(devices[0] | devices[1]) == 8

    def shard_sizes(matrix):
        return {shard.data.size for shard in matrix.values_JI.addressable_shards}

    layer = last.weights.layers[-1]
    dim, hidden, head_dim = MANIFOLD.model_dim, MANIFOLD.moe.hidden_dim, MANIFOLD.head_dim
    assert shard_sizes(layer.attention.in_DJ) == {dim * (4 + 1 + 1) * head_dim}
    assert len(layer.feed_forward.experts) == 2, "of four"
    assert shard_sizes(layer.feed_forward.experts[0].down_FD) == {dim * hidden // 2}
    assert shard_sizes(layer.feed_forward.shared.down_FD) == {dim * MANIFOLD.moe.shared_hidden_dim // 4}
    assert shard_sizes(last.weights.unembedding_DV) == {dim * MANIFOLD.vocab_size // 2}


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"data": 2}, "data=2 must be 1 where tokens are served; use stage, expert, tensor"),
        ({"context": 2}, "context=2 must be 1 where tokens are served; use stage, expert, tensor"),
        ({"tensor": 8}, "tensor=8 must divide the attention heads (4)"),
        ({"expert": 8}, "expert=8 must divide the experts (4)"),
        ({"stage": 4}, "stage=4 needs"),
    ],
)
def test_a_mesh_that_the_model_does_not_divide_over_is_refused(axes, said):
    with pytest.raises(CallerError, match=re.escape(said)):
        over(decoder_of("plain"), axes)


def test_slots_must_make_a_group_for_each_stage():
    laid_out = over(decoder_of("plain"), {"stage": 3})
    with pytest.raises(CallerError, match=re.escape("slots=4 must be a multiple of the pipeline's 3 stages")):
        Engine(laid_out, byte_tokenizer(), CONFIG)
