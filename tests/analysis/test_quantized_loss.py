"""Held-out loss as it is decoded: packed rows taken apart cost what they cost packed; quantising costs a little."""

import numpy as np
import pytest
from flax import nnx

from gpt4moe.analysis.quantized_loss import format_losses, quantized_losses
from gpt4moe.model.vocabulary import cross_entropy
from gpt4moe.types import Batch
from tests.infer.test_decoder import TINY, _model

SEGMENTS = np.array([[1] * 9 + [2] * 20 + [0] * 3, [1] * 17 + [2] * 2 + [3] * 13])


def _batch():
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, TINY.vocab_size, SEGMENTS.shape).astype(np.int32)
    begins = np.diff(SEGMENTS, axis=1, prepend=0) != 0
    positions = np.arange(SEGMENTS.shape[1]) - np.maximum.accumulate(
        np.where(begins, np.arange(SEGMENTS.shape[1]), 0), axis=1
    )
    weights = ((SEGMENTS > 0) & (draw.random(SEGMENTS.shape) < 0.9)).astype(np.float32)
    return Batch(tokens, np.roll(tokens, -1, 1), weights, positions, SEGMENTS, np.zeros_like(tokens))


@nnx.jit
def _packed_nats(model, batch):
    x_BTD, _ = model(batch.tokens, batch.positions, batch.segment_ids, dropless=True)
    return (cross_entropy(x_BTD, model.unembedding(), batch.targets) * batch.loss_weights).sum()


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_loss_is_that_of_packed_rows_and_a_little_more_in_few_bits(quantize):
    model, batch = _model(TINY), _batch()
    want = float(_packed_nats(model, batch)) / batch.loss_weights.sum()
    loss = quantized_losses(model, [("text", batch)], quantize)["text"]
    assert abs(loss.loss - loss.difference - want) < 1e-5
    assert 1e-6 < abs(loss.difference) < 0.05
    assert format_losses({"text": loss}).startswith(f"text: {loss.loss:.4f} nats in {quantize}, ")
