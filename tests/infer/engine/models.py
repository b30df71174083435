"""A model small enough to compile in a second, whose every token depends on the text before it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.infer.decoder import Decoder
from gpt4moe.model.transformer import Transformer

EXPERTS, CHOICES, LAYERS = 4, 2, 2


def make_config(vocab_size, context_length, dtype="float32"):
    return ModelConfig(
        num_layers=LAYERS,
        model_dim=32,
        vocab_size=vocab_size,
        context_length=context_length,
        attention=AttentionConfig(num_heads=4, num_kv_heads=1),
        moe=MoeConfig(num_experts=EXPERTS, experts_per_token=CHOICES, hidden_dim=32),
        compute_dtype=dtype,
    )


def make_model(vocab_size, context_length, dtype="float32", seed=0):
    return sharpened(make_config(vocab_size, context_length, dtype), seed)


def sharpened(config, seed=0):
    definition = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(seed))))[0]
    params = jax.jit(lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(seed)))[1])()
    # Matrices as drawn give nearly the same logits after any text; larger ones make the text matter.
    return nnx.merge(definition, jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 2 else leaf, params))


def make_decoder(vocab_size, context_length, **given):
    return Decoder.of(make_model(vocab_size, context_length, **given))


class FullPass:
    """Logits [T, V] and experts [T, L, K] of whole texts, without pages: what the engine must agree with."""

    def __init__(self, model):
        graphdef, state = nnx.split(model)
        self._length = model.config.context_length

        @jax.jit
        def run(tokens_BT, segment_ids_BT):
            whole = nnx.merge(graphdef, state)
            positions_BT = jnp.arange(self._length)[None]
            given = {"dropless": True, "with_choices": True}
            x_BTD, out = whole(tokens_BT, positions_BT, segment_ids_BT, **given)
            return whole.logits(x_BTD)[0], out.moe.choices.expert_ids_BTK[:, 0]

        self._run = run

    def __call__(self, ids):
        tokens = np.zeros((1, self._length), np.int32)
        tokens[0, : len(ids)] = ids
        logits_TV, experts_LTK = self._run(tokens, (np.arange(self._length) < len(ids)).astype(np.int32)[None])
        return np.asarray(logits_TV)[: len(ids)], np.asarray(experts_LTK).swapaxes(0, 1)[: len(ids)]

    def greedy(self, prompt_ids, max_new, end):
        new = []
        while len(new) < max_new and end not in new:
            new.append(int(self([*prompt_ids, *new])[0][-1].argmax()))
        return new
