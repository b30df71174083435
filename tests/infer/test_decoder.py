"""The decoder equals the model: chunks of prompts and single tokens over pages, rows at different positions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.vision import CrossAttentionConfig, EncoderConfig, ResamplerConfig, VisionConfig
from gpt4moe.infer.decoder import Decoder
from gpt4moe.model import routers
from gpt4moe.model.transformer import Transformer
from tests.model.slow import relative_difference
from tests.model.test_transformer import TINY

LENGTH, PAGE_SIZE = 11, 4
DENSE_BETWEEN = dataclasses.replace(
    TINY, num_layers=6, moe_every=2, leading_dense_layers=2, dense_hidden_dim=10, tie_embeddings=False,
    attention=AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=6),
    moe=MoeConfig(4, 2, 8, gated=False, router=routers.hashed),
)  # fmt: skip
GROUPS = {"num_groups": 2, "groups_per_token": 1, "gate_scale": 2.5, "bias_rate": 0.1}
IMAGES = VisionConfig(
    EncoderConfig(height=8, width=12, patch_size=4, dim=8, num_layers=1, num_heads=2, hidden_dim=16),
    CrossAttentionConfig(every=2, num_heads=2, head_dim=8, hidden_dim=24, gate_init=0.5),
    ResamplerConfig(num_latents=3, num_layers=1, num_heads=2, hidden_dim=16),
)
VARIANTS = {
    "grouped heads": TINY,
    "dense between, multi-query, hashed": DENSE_BETWEEN,
    "multi-head, bias": dataclasses.replace(
        TINY, attention=AttentionConfig(4, 4), moe=MoeConfig(4, 1, 8, router=routers.sigmoid_group_limited, **GROUPS,
                                                             normalize_gates=False)
    ),
    "images": dataclasses.replace(TINY, num_layers=4, vision=IMAGES),
}  # fmt: skip


@functools.cache
def _model(config):
    def made():
        model = Transformer(config, rngs=nnx.Rngs(0))
        if model.blocks.moe.router_bias is not None:
            bias = model.blocks.moe.router_bias
            bias.set_value(jax.random.normal(jax.random.key(5), bias[...].shape))
        return model

    return nnx.jit(made)()


def _tokens(rows, length=LENGTH, seed=1):
    return np.asarray(jax.random.randint(jax.random.key(seed), (rows, length), 0, TINY.vocab_size), np.int32)


def _pictures(rows):
    """Two images a row, the second one seen from the fourth token on; the last row has but one."""
    pixels = jax.random.uniform(jax.random.key(2), (rows, 2, 8, 12, 3))
    valid = np.ones((rows, 2), bool)
    valid[-1, 1] = False
    index = np.tile(np.where(np.arange(LENGTH) < 2, -1, np.where(np.arange(LENGTH) < 4, 0, 1)), (rows, 1))
    return pixels, valid, np.minimum(index, valid.sum(1, keepdims=True) - 1), np.minimum(index, 0)


@nnx.jit
def _whole(model, tokens, pictures, replay=None):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    given = {"media": None if pictures is None else model.look(*pictures), "replay_ids_BTLK": replay}
    x, out = model(tokens, positions, jnp.ones_like(tokens), dropless=True, with_choices=True, **given)
    return model.logits(x), out.moe.choices


class _Rows:
    """What an engine does, for a test: calls of one shape, each with the next tokens of some rows."""

    def __init__(self, decoder, tokens, pictures=None):
        self.decoder, self.tokens, self.done = decoder, tokens, np.zeros(len(tokens), int)
        pages_of_row = -(-tokens.shape[1] // PAGE_SIZE)
        num_pages = len(tokens) * pages_of_row + 3
        self.table = (
            np.random.default_rng(0).permutation(num_pages)[: len(tokens) * pages_of_row].reshape(len(tokens), -1)
        )
        self.pages = jax.tree.map(lambda leaf: leaf + 7, decoder.init_pages(num_pages, PAGE_SIZE))
        self.media = None if pictures is None else jax.jit(decoder.look)(decoder.weights, *pictures)
        self.forward = jax.jit(decoder.forward, static_argnames="with_choices", donate_argnums=4)
        self.logits = np.full((*tokens.shape, decoder.config.vocab_size), np.nan, np.float32)
        self.choices = None

    def step(self, length, counts, replay=None):
        """The next `counts` tokens of each row in a call of `length`."""
        rows = range(len(self.tokens))
        at = self.done[:, None] + np.arange(length)
        valid = np.arange(length) < np.array(counts)[:, None]
        clipped = np.minimum(at, self.tokens.shape[1] - 1)
        given = np.take_along_axis(self.tokens, clipped, 1)
        media = self.media
        if media is not None:
            index, first = (np.take_along_axis(np.asarray(of), clipped, 1) for of in
                            (media.image_index_BT, media.first_image_BT))  # fmt: skip
            media = dataclasses.replace(media, image_index_BT=index, first_image_BT=first)
        if replay is not None:
            replay = np.take_along_axis(replay, clipped[:, :, None, None], 1)
        x, self.pages, report = self.forward(
            self.decoder.weights, given, at, valid, self.pages, self.table, media=media, replay_ids_BTLK=replay,
            with_choices=True,
        )  # fmt: skip
        logits, ids = self.decoder.logits(self.decoder.weights, x), np.asarray(report.choices.expert_ids_BTK)
        if self.choices is None:
            self.choices = np.full((len(ids), *self.tokens.shape, ids.shape[-1]), -2)
        np.testing.assert_array_equal(report.load_LE, [np.bincount(layer[layer >= 0], minlength=
                                      self.decoder.config.moe.num_experts) for layer in ids])  # fmt: skip
        for row in rows:
            span = slice(self.done[row], self.done[row] + counts[row])
            self.logits[row, span] = logits[row, : counts[row]]
            self.choices[:, row, span] = ids[:, row, : counts[row]]
        self.done += counts

    def all(self, replay=None):
        """Chunks of prompts, then single tokens, rows at different positions throughout."""
        for counts in ([5, 2, 0], [3, 5, 4]):
            self.step(5, counts, replay)
        while (self.done < self.tokens.shape[1]).any():
            self.step(1, (self.done < self.tokens.shape[1]).astype(int), replay)
        return self


def test_experts_in_a_stack_equal_experts_apart():
    """As on an accelerator: a token through `visit_own`, a chunk through blocks of sorted rows."""
    model, tokens = _model(TINY), _tokens(1)
    want, _ = _whole(model, tokens, None)
    rows = _Rows(Decoder.of(model, product="reduction"), tokens)
    rows.step(5, [5])
    for _ in range(LENGTH - 5):
        rows.step(1, [1])
    assert relative_difference(rows.logits, want) < 1e-5


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_chunks_and_single_tokens_equal_the_whole_text(config):
    model, tokens = _model(config), _tokens(3)
    pictures = _pictures(3) if config.vision else None
    want, choices = _whole(model, tokens, pictures)
    rows = _Rows(Decoder.of(model), tokens, pictures).all()
    assert relative_difference(rows.logits, want) < 1e-5
    np.testing.assert_array_equal(rows.choices, choices.expert_ids_BTK)


def test_a_replay_goes_where_it_is_told_and_a_text_of_a_model_with_images_needs_none():
    model, tokens = _model(VARIANTS["images"]), _tokens(3)
    told = np.tile(np.array([3, 1]), (3, LENGTH, 4, 1))
    told[:, :, 2, 1] = -1
    rows = _Rows(Decoder.of(model), tokens).all(told)
    np.testing.assert_array_equal(rows.choices, np.moveaxis(told, 2, 0))
    want, _ = _whole(model, tokens, None, told)
    assert relative_difference(rows.logits, want) < 1e-5
