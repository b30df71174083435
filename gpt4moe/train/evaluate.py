"""Held-out loss: parameters and a token store in, nats a token and bits a byte of every source out.

Always dropless: what a token costs depends neither on its batch nor on capacity.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from gpt4moe import checkpoint
from gpt4moe.config.check import require
from gpt4moe.config.run import RunConfig
from gpt4moe.data import pipeline
from gpt4moe.data.store import TokenStore
from gpt4moe.model.cross_attention import Media
from gpt4moe.model.layout import ONE_DEVICE, Layout
from gpt4moe.model.transformer import Transformer
from gpt4moe.parallel.sharding import batch_sharding, by_row
from gpt4moe.train.loss import look
from gpt4moe.train.metrics import write_atomically
from gpt4moe.train.state import model_definition, run_layout
from gpt4moe.types import Array, Batch


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Held-out results of one source.

    loss: nats a target, the end of every document included. bits_per_byte: the same nats over the bytes of the text,
    which does not depend on the tokenizer. unigram_*: what token frequencies of the training text alone would reach.
    loss_without_image: the loss where no token sees an image; None of a source that has none.
    """

    loss: float
    bits_per_byte: float
    unigram_loss: float
    unigram_bits_per_byte: float
    tokens: int
    loss_without_image: float | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results by source, in the store's order; a source without held-out text is not in it.

    `unseen` are sources that are not trained on.
    """

    sets: Mapping[str, EvalResult]
    unseen: frozenset[str] = frozenset()

    @property
    def mean_loss(self) -> float:
        """Nats a target over all sources that are trained on; not a number where nothing is held out."""
        seen = [result for source, result in self.sets.items() if source not in self.unseen]
        tokens = sum(result.tokens for result in seen)
        nats = sum(result.loss * result.tokens for result in seen)
        return nats / tokens if tokens else math.nan

    def row(self) -> dict[str, float]:
        """The keys of `metrics.jsonl`: `eval/<source>/<field of EvalResult>`."""
        return {
            f"eval/{source}/{field}": value
            for source, result in self.sets.items()
            for field, value in _fields(result).items()
        }


def evaluate(run: RunConfig, store: TokenStore, params: nnx.State) -> Evaluation:
    """The held-out text of every source under `params`, which may lie on one device or over a mesh."""
    where = _batch_sharding(run, params)
    layout = _layout(run, where)
    definition = model_definition(run.model, layout)
    rows = -(-run.microbatch_rows // layout.row_multiple) * layout.row_multiple
    batches = pipeline.held_out_batches(store, run.data, rows=rows)
    sums_of = _compiled_sums(_everywhere(where))
    sums = [(source, sums_of(definition, params, _place(batch, where))) for source, batch in batches]
    totals = {source: np.zeros(3) for source, _ in sums}
    for source, of_batch in jax.device_get(sums):
        totals[source] += of_batch
    unseen = frozenset(source.name for source in run.data.sources if not source.is_trained)
    return Evaluation({source: _result(store, source, *total) for source, total in totals.items()}, unseen)


def evaluate_trained(model: Transformer, run: RunConfig, workdir: epath.PathLike, *, step: int) -> Evaluation:
    """The held-out results of the `model` restored from `step`, on the text that was held out of its training.

    Kept with `write_evaluation`. Raises `CallerError` where the tokens are gone and the sources have changed.
    """
    workdir = epath.Path(workdir)
    evaluation = evaluate(run, trained_store(run, workdir, step), nnx.split(model)[1])
    write_evaluation(workdir, evaluation, step=step)
    return evaluation


def write_evaluation(workdir: epath.Path, evaluation: Evaluation, *, step: int) -> None:
    """Leaves the results of `step` in `evaluation.json`, where the report finds them."""
    document = {"step": step, "sets": to_document(evaluation)}
    write_atomically(workdir / "evaluation.json", json.dumps(document, indent=1) + "\n")


def add_read(workdir: epath.PathLike, read: Mapping[str, Mapping], *, step: int) -> None:
    """Adds `read`, how well the images of a source are read, to its results in `evaluation.json` if they are of `step`.

    Values are the fields of `gpt4moe.infer.transcribe.Transcription`.
    """
    path = epath.Path(workdir) / "evaluation.json"
    document = json.loads(path.read_text()) if path.exists() else {"step": None}
    if read and document["step"] == step:
        for source, result in read.items():
            document["sets"][source]["read"] = dict(result)
        write_atomically(path, json.dumps(document, indent=1) + "\n")


def trained_store(run: RunConfig, workdir: epath.PathLike, step: int) -> TokenStore:
    """The token store that the run was trained on, which needs no sources; made again where it is gone.

    Sources that have changed would give another split or tokenizer, under which the model's results mean nothing.
    """
    directory = run.data.store or epath.Path(workdir) / "data"
    content_hash = checkpoint.restore_progress(workdir, step)["store"]
    if content_hash is None:  # imported weights, which were trained on nothing of ours
        return pipeline.open_store(run.data, directory)
    kept = pipeline.reopen_store(run.data, directory, content_hash)
    if kept:
        return kept
    store = pipeline.open_store(run.data, directory)
    same = store.content_hash == content_hash
    require(
        same, "data", str(directory), "was made of other text than the model's", "restore the sources it was trained on"
    )
    return store


def to_document(evaluation: Evaluation | None) -> dict[str, dict]:
    """What `--json` prints: fields by source, null for what is not finite; empty where nothing was evaluated."""
    sets = evaluation.sets if evaluation else {}
    return {
        source: {name: value if math.isfinite(value) else None for name, value in _fields(result).items()}
        for source, result in sets.items()
    }


def _fields(result: EvalResult) -> dict[str, float]:
    """The results that there are."""
    return {name: value for name, value in dataclasses.asdict(result).items() if value is not None}


def format_evaluation(evaluation: Evaluation | None) -> str:
    """The table that a run ends with."""
    if not evaluation or not evaluation.sets:
        return "no held-out text"
    width = max(len("held out"), *map(len, evaluation.sets))
    lines = [f"{'held out':{width}}      nats  unigram    bits/byte  unigram       tokens"]
    for source, result in evaluation.sets.items():
        nats = f"{result.loss:8.3f} {result.unigram_loss:8.3f}"
        bits = f"{result.bits_per_byte:8.3f} {result.unigram_bits_per_byte:8.3f}"
        blind = result.loss_without_image
        without = "" if blind is None else f"  without images {blind:.3f} nats"
        lines.append(f"{source:{width}}  {nats}     {bits} {result.tokens:12,d}{without}")
    return "\n".join(lines)


@functools.cache
def _compiled_sums(where: Sharding) -> Callable[[nnx.GraphDef, nnx.State, Batch], Array]:
    """`_sums` with its result at `where`, which every process must be able to read."""
    return jax.jit(_sums, static_argnums=0, out_shardings=where)


def _sums(definition: nnx.GraphDef, params: nnx.State, batch: Batch) -> Array:
    """[3] float32: nats over the targets of a batch, their number, and the nats where no token sees an image."""
    model = nnx.merge(definition, params)

    def nats(media: Media | None) -> Array:
        x_BTD, _ = model(batch.tokens, batch.positions, batch.segment_ids, dropless=True, media=media)
        return jnp.sum(model.layout.cross_entropy(x_BTD, model.unembedding(), batch.targets) * batch.loss_weights)

    media = look(model, batch)
    seeing = nats(media)
    # With the images taken away but not the adapter, whose feed-forward may learn without looking.
    blind = seeing
    if media is not None:
        unseen = dataclasses.replace(media, image_index_BT=jnp.full_like(media.image_index_BT, -1))
        blind = jax.lax.cond(jnp.any(batch.image_index >= 0), lambda: nats(unseen), lambda: seeing)
    return jnp.stack([seeing, jnp.sum(batch.loss_weights), blind])


def _result(store: TokenStore, source: str, nats: float, targets: float, blind: float) -> EvalResult:
    expected = store.num_targets(source, "held_out")
    assert round(targets) == expected, f"{targets} of {expected} held-out targets of {source} were evaluated"
    num_bytes = store.held_out_bytes(source)
    return EvalResult(
        loss=float(nats / targets),
        bits_per_byte=float(nats / math.log(2) / num_bytes) if num_bytes else math.nan,
        unigram_loss=store.unigram_nats(source),
        unigram_bits_per_byte=store.unigram_bits_per_byte(source),
        tokens=expected,
        loss_without_image=float(blind / targets) if store.images(source, "held_out") is not None else None,
    )


def _batch_sharding(run: RunConfig, params: nnx.State) -> Sharding:
    """Rows over the mesh that the parameters lie on, or the device that holds them."""
    where = jax.tree.leaves(params)[0].sharding
    return batch_sharding(where.mesh, run.rules) if isinstance(where, NamedSharding) else where


def _layout(run: RunConfig, where: Sharding) -> Layout:
    """That of training, but with room for every choice at every device."""
    if not isinstance(where, NamedSharding):
        return ONE_DEVICE
    roomy = dataclasses.replace(run.mesh, expert_bucket_factor=None)
    return run_layout(dataclasses.replace(run, mesh=roomy), where.mesh)


def _everywhere(rows: Sharding) -> Sharding:
    """A whole copy on every device that `rows` has a part on."""
    return NamedSharding(rows.mesh, PartitionSpec()) if isinstance(rows, NamedSharding) else rows


def _place(batch: Batch, where: Sharding) -> Batch:
    """`batch`, which every host holds whole, on the devices: tokens at `where`, images with their rows."""

    def place(path: tuple, leaf: np.ndarray) -> jax.Array:
        of_image = path[0].name in ("images", "image_valid") and isinstance(where, NamedSharding)
        over = by_row(where) if of_image else where
        return jax.make_array_from_callback(leaf.shape, over, leaf.__getitem__)

    return jax.tree_util.tree_map_with_path(place, batch)
