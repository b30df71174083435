"""The beginning of a run in its work directory: everything checked, data and state as they were left or new.

What can be refused is refused before anything is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Callable

import jax
from etils import epath
from jax.sharding import Mesh

from gpt4moe import checkpoint
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.data import pipeline
from gpt4moe.data.image_bytes import format_image_bytes
from gpt4moe.data.store import TOKENIZER_FILE
from gpt4moe.model import grouped_matmul, routers
from gpt4moe.parallel import multihost, sharding
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.train import adapter, feed, metrics, resume, schedule, trace, upcycle
from gpt4moe.train import state as train_state
from gpt4moe.train.console import say
from gpt4moe.train.state import TrainState
from gpt4moe.types import Batch


@dataclasses.dataclass(frozen=True)
class Position:
    """Where the run stands: the device state, and on the host the steps and tokens behind it."""

    state: TrainState
    step: int = 0
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Beginning:
    """A run that may begin: its configuration has been held against the devices, the data and what was saved.

    abstract, batch: shapes and layout of state and microbatches. slots: which superblock each slot of the parameter
    stacks holds, None for all in order. progress: the record of the checkpoint to go on from, None without one.
    """

    run: RunConfig
    workdir: epath.Path
    mesh: Mesh
    abstract: TrainState
    batch: Batch
    slots: tuple[int, ...] | None
    progress: dict | None
    store: pipeline.TokenStore
    rows: pipeline.TrainRows


def begin(
    run: RunConfig, workdir: epath.Path, config_text: str, *, allow_change: bool, progress: Callable[[str], None] | None
) -> Beginning:
    """Returns the beginning of `run`, its work directory made and described.

    Raises `CallerError` where the configuration does not fit the devices, the data or what the work directory holds.
    """
    run = resume.inherit_tokenizer(run)
    mesh = make_mesh(run.mesh)
    run.check_sizes(dict(mesh.shape))
    grouped_matmul.require_platform(run.model.moe.grouped_product, mesh.devices.flat[0].platform)
    abstract = train_state.abstract_state(run, mesh)
    trace.require_one_process(run)
    batch = feed.abstract_microbatches(run, sharding.batch_sharding(mesh, run.rules))
    _require_one_trainer(workdir, config_text)
    slots = train_state.run_layout(run, mesh).slots
    saved = resume.saved_progress(run, workdir, abstract, allow_change=allow_change, layer_order=slots)
    with multihost.first_process_first("tokens"):
        store = _open_store(run, workdir, saved, progress)
        rows = _rows(run, store, saved, multihost.row_group(batch.tokens), allow_change)
    _require_recorded_tokens(run, rows, saved)
    multihost.mark("the work directory")
    _describe(workdir, config_text, store)
    _require_shared(workdir)
    return Beginning(run, workdir, mesh, abstract, batch, slots, saved, store, rows)


def first_position(start: Beginning) -> Position:
    """Returns the newest checkpoint's position, or step 0 with fresh parameters or those of `init_from`.

    Parts of an adapter for images that `init_from` lacks begin fresh.
    """
    run, abstract, slots, progress = start.run, start.abstract, start.slots, start.progress
    if progress:
        step = progress["step"]
        return Position(checkpoint.restore(start.workdir, step, abstract, layer_order=slots), step, progress["tokens"])
    state = train_state.create_state(run, abstract)
    if run.train.init_from is None:
        return Position(state)
    source, step = run.train.init_from, checkpoint.latest_step(run.train.init_from)
    dense, new = upcycle.dense_source(run, step), adapter.new_parts(source, step, abstract.params)
    if dense:
        params = upcycle.restore_upcycled(run, dense, step, adapter.without(state.params, new), start.mesh)
    else:
        wanted = {"params": adapter.without(abstract.params, new)}
        params = checkpoint.restore(source, step, wanted, layer_order=slots)["params"]
    return Position(dataclasses.replace(state, params=adapter.with_parts(params, new, state.params)))


def not_causal(moe: MoeConfig) -> str | None:
    """How later tokens of a row reach earlier ones in training, None where they do not."""
    if routers.is_among(moe.router, routers.NON_CAUSAL):
        sees = f"the router {moe.router.__name__} looks at later tokens of a row in training"
        return f"{sees}, so that its training loss is not that of a language model"
    if moe.capacity_factor is None or (moe.experts_per_token == 1 and moe.drop_priority == "position"):
        return None
    return f"with capacity_factor={moe.capacity_factor:g} a later token may take an earlier one's place in training"


def say_what_begins(start: Beginning) -> None:
    """Prints what is read, and whether it lasts."""
    run, store, rows = start.run, start.store, start.rows
    for name, packing in rows.packing().items():
        tokens = f"{store.num_tokens(name, 'train'):,} tokens in {packing['rows']:,} rows, {packing['fill']:.1%} full"
        say(f"source {name}: {tokens}, {packing['split_documents']:,} documents longer than a row")
    if run.model.vision:
        for line in format_image_bytes(rows.image_bytes(run.model.vision.encoder.patch)):
            say(line)
    planned, there = schedule.planned_tokens(run.train), rows.total_tokens()
    if there is not None and there < planned:
        say(
            f"the sources end after {there:,} tokens, before the {planned:,} that the learning rate is planned for: "
            "raise max_epochs or lower TOKEN_BUDGET"
        )
    source = run.train.init_from
    if source and not start.progress:
        step = checkpoint.latest_step(source)
        dense, moe = upcycle.dense_source(run, step), run.model.moe
        as_experts = f", its feed-forward of {dense.moe.hidden_dim:,} as {moe.num_experts} experts" if dense else ""
        new = " and ".join(adapter.new_parts(source, step, start.abstract.params))
        say(f"parameters are those of step {step:,} of {source}{as_experts}{f'; fresh are {new}' if new else ''}")
    if start.progress:
        say(f"going on from step {start.progress['step']} of {start.workdir}")
    why = None if run.train.replay_routing else not_causal(run.model.moe)
    if why:
        say(f"NOT CAUSAL: {why}; evaluation and decoding route token by token and drop nothing")
    say("compiling the training step")


def _require_one_trainer(workdir: epath.Path, config_text: str) -> None:
    """Raises `CallerError` where another run trains in `workdir`, or processes of this one differ in what they see."""
    metrics.refuse_second_trainer(workdir)
    multihost.require_same("configuration", hashlib.blake2b(config_text.encode(), digest_size=8).hexdigest())
    multihost.require_same("workdir", os.fspath(workdir))
    multihost.require_same("saved steps", checkpoint.saved_steps(workdir))


def _require_shared(workdir: epath.Path) -> None:
    """Raises `CallerError` where the work directory of this process is not that of process 0 but has the same name."""
    mark = workdir / ".job"
    if jax.process_count() == 1:
        return
    if jax.process_index() == 0:
        mark.write_text(secrets.token_hex())
    multihost.wait_for_all("work directory")
    there = mark.read_text() if mark.exists() else None
    multihost.require_same("disk of the workdir", there)


def _open_store(
    run: RunConfig, workdir: epath.Path, progress: dict | None, say: Callable[[str], None] | None
) -> pipeline.TokenStore:
    """The tokens that the run began with, even where its sources have changed or gone since; else newly prepared."""
    directory = run.data.store or workdir / "data"
    changed = resume.differences(progress["settings"], run) if progress else []
    same_data = progress and not any(change.startswith("data.") for change in changed)
    kept = pipeline.reopen_store(run.data, directory, progress["store"]) if same_data else None
    return kept or pipeline.open_store(run.data, directory, progress=say)


def _rows(
    run: RunConfig, store: pipeline.TokenStore, progress: dict | None, group: multihost.RowGroup, allow_change: bool
) -> pipeline.TrainRows:
    """The rows that this process supplies, from where the checkpoint stood."""
    hosts = {"num_hosts": group.count, "host": group.index}
    rows = pipeline.TrainRows(store, run.data, microbatch_rows=run.microbatch_rows, **hosts)
    if progress:
        rows.set_state(progress["data"], allow_change=allow_change)
    multihost.require_same("order of rows", rows.get_state()["order"])
    return rows


def _require_recorded_tokens(run: RunConfig, rows: pipeline.TrainRows, progress: dict | None) -> None:
    """Raises `CallerError` where a replay's next record is of other tokens, before anything is compiled."""
    step, tokens = (progress["step"], progress["tokens"]) if progress else (0, 0)
    record = trace.replayed(run, step + 1) if run.train.replay_routing else None
    if record is None:
        return
    state, wanted = rows.get_state(), schedule.batch_tokens_at(run.train.ramp, tokens)
    count = wanted // (run.microbatch_rows * run.data.sequence_length)
    record.on([batch.tokens for _, batch in zip(range(count), rows, strict=False)], run.train.replay_routing)
    rows.set_state(state)


def _describe(workdir: epath.Path, config_text: str, store: pipeline.TokenStore) -> None:
    """Writes what makes the work directory readable on its own: configuration, tokenizer, and where it was made."""
    workdir.mkdir(parents=True, exist_ok=True)
    metrics.write_atomically(workdir / "config.gin", config_text)
    metrics.write_atomically(workdir / TOKENIZER_FILE, store.tokenizer.serialized)
    metrics.write_atomically(workdir / "environment.json", json.dumps(metrics.environment(), indent=2) + "\n")
