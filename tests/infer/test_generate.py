"""Generation against full recomputation: same tokens, same log-probabilities, whatever shares the batch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer.generate import generate, write_samples
from gpt4moe.model.transformer import Transformer

CONTEXT = 48
PROMPTS = ["def f(x):", "", "a", "The quick brown fox jumps over the"]
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=10)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def make_model(tokenizer, **moe):
    config = ModelConfig(
        num_layers=2,
        model_dim=32,
        vocab_size=tokenizer.vocab_size,
        context_length=CONTEXT,
        attention=AttentionConfig(num_heads=4),
        moe=MoeConfig(**{"num_experts": 4, "experts_per_token": 2, "hidden_dim": 32} | moe),
        compute_dtype="float32",
    )
    definition = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]
    params = jax.jit(lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(0)))[1])()
    # Matrices as drawn give nearly the same logits after any text; larger ones make the text matter.
    return nnx.merge(definition, jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 2 else leaf, params))


@pytest.fixture(scope="module")
def models(tokenizer):
    return {
        "capacity": make_model(tokenizer, capacity_factor=1.0),
        "shared": make_model(tokenizer, gated=False, shared_hidden_dim=16),
    }


@pytest.fixture(scope="module")
def model(models):
    return models["capacity"]


def full_logits(model):
    """A function of ids that gives the logits [T, V] after each of them, without a cache."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def logits_TV(tokens_BT, segment_ids_BT):
        whole = nnx.merge(graphdef, state)
        positions_BT = jnp.arange(CONTEXT)[None]
        x_BTD, _ = whole(tokens_BT, positions_BT, segment_ids_BT, dropless=True)
        return whole.logits(x_BTD)[0]

    def of(ids):
        tokens = np.zeros((1, CONTEXT), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(logits_TV(tokens, (np.arange(CONTEXT) < len(ids)).astype(np.int32)[None]))[: len(ids)]

    return of


def slow_greedy(logits_of, tokenizer, prompt, max_new_tokens):
    ids, new = [tokenizer.end_of_text, *tokenizer.encode(prompt)], []
    while len(new) < max_new_tokens and len(ids) < CONTEXT:
        new.append(int(logits_of(ids)[-1].argmax()))
        ids.append(new[-1])
        if new[-1] == tokenizer.end_of_text:
            break
    return new


@pytest.mark.parametrize("name", ["capacity", "shared"])
def test_greedy_with_the_cache_equals_full_recompute_token_for_token(tokenizer, models, name):
    model = models[name]
    logits_of = full_logits(model)
    generations, _ = generate(model, tokenizer, PROMPTS, GREEDY)
    expected = [slow_greedy(logits_of, tokenizer, prompt, GREEDY.max_new_tokens) for prompt in PROMPTS]
    assert [list(generation.token_ids) for generation in generations] == expected
    assert len({generation.token_ids for generation in generations}) == len(PROMPTS)  # the prompts made a difference


def test_logprobs_are_those_of_the_full_forward_pass(model, tokenizer):
    sampling = SamplingConfig(temperature=1.3, top_k=50, max_new_tokens=12, seed=1)
    logits_of = full_logits(model)
    for generation in generate(model, tokenizer, PROMPTS, sampling)[0]:
        ids = [tokenizer.end_of_text, *tokenizer.encode(generation.prompt), *generation.token_ids]
        logprobs = np.asarray(jax.nn.log_softmax(logits_of(ids)))
        first = len(ids) - len(generation.token_ids)
        expected = [logprobs[place - 1, ids[place]] for place in range(first, len(ids))]
        np.testing.assert_allclose(generation.logprobs, expected, atol=1e-4)


def test_a_prompt_is_continued_the_same_alone_and_in_company(model, tokenizer):
    sampling = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=10, seed=5)
    alone = generate(model, tokenizer, PROMPTS[:1], sampling)[0]
    together = generate(model, tokenizer, PROMPTS, sampling)[0]
    assert alone[0].token_ids == together[0].token_ids
    other_seed = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=10, seed=6)
    assert generate(model, tokenizer, PROMPTS[:1], other_seed)[0][0].token_ids != alone[0].token_ids


def test_every_step_and_row_draws_afresh(model, tokenizer):
    definition, params = nnx.split(model)
    even = nnx.merge(definition, jax.tree.map(jnp.zeros_like, params))  # every token is as likely as any other
    generations = generate(even, tokenizer, PROMPTS, SamplingConfig(max_new_tokens=12))[0]
    drawn = [token for generation in generations for token in generation.token_ids]
    assert len(set(drawn)) > 0.7 * len(drawn) > 25
    for generation in generations:
        np.testing.assert_allclose(generation.logprobs, -np.log(tokenizer.vocab_size), rtol=1e-5)


def test_generation_stops_at_end_of_text_or_at_the_limit(model, tokenizer):
    reasons = []
    for seed in range(12):
        sampling = SamplingConfig(temperature=4.0, max_new_tokens=12, seed=seed)
        generations, timing = generate(model, tokenizer, PROMPTS, sampling)
        for generation in generations:
            *before, last = generation.token_ids
            assert tokenizer.end_of_text not in before
            assert generation.finish_reason == ("stop" if last == tokenizer.end_of_text else "length")
            assert len(generation.token_ids) == len(generation.logprobs)
            assert len(generation.token_ids) == 12 or generation.finish_reason == "stop"
            assert generation.text == tokenizer.decode(generation.token_ids)  # end-of-text decodes to nothing
            reasons.append(generation.finish_reason)
        assert timing.num_new_tokens == sum(len(generation.token_ids) for generation in generations)
        assert timing.num_prompt_tokens == sum(1 + len(prompt) for prompt in PROMPTS)
    assert set(reasons) == {"stop", "length"}


def test_generation_ends_where_the_context_does(model, tokenizer):
    long, short = "y" * (CONTEXT - 4), "z"
    sampling = SamplingConfig(temperature=0, max_new_tokens=16)
    first, second, *_ = generate(model, tokenizer, [long, short, short, short], sampling)[0]
    assert first.num_prompt_tokens == CONTEXT - 3
    assert (len(first.token_ids), first.finish_reason) == (3, "length")
    assert len(second.token_ids) == 16 or second.finish_reason == "stop"


def test_prompt_longer_than_the_context_is_a_one_line_error(model, tokenizer):
    with pytest.raises(ValueError, match=r"^prompt='yyy.*\.\.\.' has 61 tokens .* context_length \(48\); shorten"):
        generate(model, tokenizer, ["ok", "y" * 60], GREEDY)


def test_no_prompts_give_no_generations(model, tokenizer):
    assert generate(model, tokenizer, [], GREEDY)[0] == []


def test_samples_are_written_for_the_report(model, tokenizer, tmp_path):
    generations = generate(model, tokenizer, PROMPTS, GREEDY)[0]
    written = json.loads(write_samples(tmp_path, generations).read_text())
    assert [sample["prompt"] for sample in written] == PROMPTS
    assert [sample["text"] for sample in written] == [generation.text for generation in generations]
