"""What quantised weights cost: held-out loss of a model as it is decoded, with its own weights and with quantised ones.

In: a model and batches of packed held-out text. Out: nats a target of every source, and by how much they are more than
those of the weights that are not quantised, which go through the same programs. A packed row is taken apart: each of
its texts is a prompt of its own, as the decoder knows no segments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt4moe.config.run import RunConfig
from gpt4moe.data.pipeline import held_out_batches
from gpt4moe.infer.decode_weights import DecoderWeights
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.trained import Trained
from gpt4moe.model.transformer import Transformer
from gpt4moe.train.evaluate import trained_store
from gpt4moe.types import Array, Batch

# Tokens of one call, texts of one length bucket at a time.
CALL_TOKENS, SHORTEST = 4096, 16


@dataclasses.dataclass(frozen=True)
class QuantizedLoss:
    """loss: nats a target with quantised weights; difference: how much more than without, in the same dtype."""

    quantize: str
    loss: float
    difference: float


@dataclasses.dataclass(frozen=True)
class _Text:
    """tokens, targets, weights: [T] each."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def add_quantized(
    document: dict[str, dict], trained: Trained, run: RunConfig, quantize: str, progress: Callable[[str], None]
) -> str:
    """Adds to the results by source of `trained` what quantising costs, under `quantized`; returns it as lines."""
    progress(f"computing the loss of held-out text with weights in {quantize}")
    store = trained_store(run, trained.workdir, trained.step)
    losses = quantized_losses(trained.model, held_out_batches(store, run.data, rows=1), quantize)
    for source, loss in losses.items():
        document[source] |= {"quantized": dataclasses.asdict(loss)}
    return format_losses(losses)


def quantized_losses(
    model: Transformer, batches: Iterable[tuple[str, Batch]], quantize: str
) -> dict[str, QuantizedLoss]:
    """Returns the loss of every source of `batches`, whose images it does not look at."""
    decoders = [Decoder.of(model), Decoder.of(model, quantize=quantize)]
    programs = [jax.jit(functools.partial(_nats, decoder)) for decoder in decoders]
    texts: dict[str, list[_Text]] = {}
    for source, batch in batches:
        texts.setdefault(source, []).extend(_texts(batch))
    results = {}
    for source, of_source in texts.items():
        targets = sum(float(text.weights.sum()) for text in of_source)
        plain, quantised = (
            _total(program, decoder.weights, of_source) / targets
            for program, decoder in zip(programs, decoders, strict=True)
        )
        results[source] = QuantizedLoss(quantize, quantised, quantised - plain)
    return results


def format_losses(losses: dict[str, QuantizedLoss]) -> str:
    """A line a source, for reading."""
    return "\n".join(
        f"{source}: {loss.loss:.4f} nats in {loss.quantize}, {round(loss.difference, 4) + 0.0:+.4f} by quantising"
        for source, loss in losses.items()
    )


def _texts(batch: Batch) -> list[_Text]:
    """The segments of every row."""
    found = []
    for row, segments in enumerate(np.asarray(batch.segment_ids)):
        for segment in range(1, int(segments.max(initial=0)) + 1):
            of_row = (np.asarray(part)[row] for part in (batch.tokens, batch.targets, batch.loss_weights))
            found.append(_Text(*(part[segments == segment] for part in of_row)))
    return found


def _total(program: Callable, weights: DecoderWeights, texts: Sequence[_Text]) -> float:
    """Nats of all texts."""
    buckets: dict[int, list[_Text]] = {}
    for text in texts:
        length = max(SHORTEST, 1 << (len(text.tokens) - 1).bit_length())
        buckets.setdefault(length, []).append(text)
    total = 0.0
    for length, of_length in sorted(buckets.items()):
        rows = max(1, CALL_TOKENS // length)
        for start in range(0, len(of_length), rows):
            total += float(program(weights, *_stacked(of_length[start : start + rows], rows, length)))
    return total


def _stacked(texts: Sequence[_Text], rows: int, length: int) -> tuple[np.ndarray, ...]:
    """(tokens, targets, weights) [rows, length], filled up with nothing, and how long each is."""
    stacked = [np.zeros((rows, length), kind) for kind in (np.int32, np.int32, np.float32)]
    for row, text in enumerate(texts):
        for whole, part in zip(stacked, vars(text).values(), strict=True):
            whole[row, : len(part)] = part
    return *stacked, np.array([len(text.tokens) for text in texts] + [0] * (rows - len(texts)), np.int32)


def _nats(
    decoder: Decoder, weights: DecoderWeights, tokens_BT: Array, targets_BT: Array, weights_BT: Array, lengths_B: Array
) -> Array:
    rows, length = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(length), tokens_BT.shape)
    pages, table_BX = decoder.init_pages(rows, length), jnp.arange(rows)[:, None]
    valid_BT = positions_BT < lengths_B[:, None]
    x_BTD, _, _ = decoder.forward(weights, tokens_BT, positions_BT, valid_BT, pages, table_BX)

    def of_row(row: tuple) -> Array:
        x_TD, targets_T, weights_T = row
        log_probabilities_TV = jax.nn.log_softmax(decoder.logits(weights, x_TD), axis=-1)
        return -jnp.sum(jnp.take_along_axis(log_probabilities_TV, targets_T[:, None], 1)[:, 0] * weights_T)

    return jnp.sum(jax.lax.map(of_row, (x_BTD, targets_BT, weights_BT)))
