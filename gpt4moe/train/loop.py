"""Trains a run in its work directory: restore, step, log, evaluate, save, until its end or a request to stop.

The same command in the same work directory goes on where the newest checkpoint stands, and gives bitwise the losses
of a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from gpt4moe import checkpoint
from gpt4moe.config.check import RunError
from gpt4moe.config.run import RunConfig
from gpt4moe.data import pipeline
from gpt4moe.data.store import TOKENIZER_FILE
from gpt4moe.parallel import multihost, sharding
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.train import evaluate, feed, metrics, resume, schedule
from gpt4moe.train import state as train_state
from gpt4moe.train.profile import Profile
from gpt4moe.train.recorder import Recorder, StepFacts
from gpt4moe.train.state import TrainState
from gpt4moe.train.step import make_step
from gpt4moe.train.stop import StopRequest
from gpt4moe.types import Batch

# The progress bar's pace where stderr is a file, a job's log say.
SECONDS_BETWEEN_LOG_LINES = 30


class SkipLimitError(RunError):
    """Too many steps in a row had a non-finite loss or gradient; a checkpoint of finite parameters was saved."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    step, tokens: trained in all. stopped: a signal asked for it, and the same command goes on from here.
    data_ended: every source was used up before the run's length. evaluation: what `train.evaluate` gave for the last
    step, None if stopped.
    """

    step: int
    tokens: int
    stopped: bool
    data_ended: bool
    evaluation: evaluate.Evaluation | None


@dataclasses.dataclass(frozen=True)
class Position:
    """Where the run stands: the device state, and on the host the steps and tokens behind it."""

    state: TrainState
    step: int = 0
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the loop works with, assembled once."""

    run: RunConfig
    workdir: epath.Path
    store: pipeline.TokenStore
    rows: pipeline.TrainRows
    batch: Batch
    slots: tuple[int, ...] | None  # which superblock each slot of the parameter stacks holds
    step: jax.stages.Compiled
    checkpoints: checkpoint.Checkpoints
    log: metrics.MetricsLog
    recorder: Recorder
    bar: tqdm.tqdm
    stop: StopRequest
    profile: Profile


def train(
    run: RunConfig,
    workdir: epath.PathLike,
    *,
    config_text: str,
    allow_config_change: bool = False,
    profile_steps: int = 0,
    show_progress: bool = True,
) -> TrainResult:
    """Trains `run` to its end, or until SIGINT or SIGTERM, and leaves a checkpoint of the last step.

    Args:
      run: the configuration; on resume it must agree with the checkpoint's (see `train.resume`).
      workdir: local path or object store; made once everything that can be checked without it has been.
      config_text: the operative configuration, kept in `config.gin`.
      allow_config_change: resume although settings differ.
      profile_steps: how many steps to write a profiler trace of, into `profile/`.
      show_progress: draw a progress bar on stderr.

    Raises:
      CallerError: the configuration does not fit the devices, the data or what the work directory holds.
      CheckpointError: a checkpoint could not be written; earlier ones stand.
      SkipLimitError: see there.
    """
    workdir, run = epath.Path(workdir), resume.inherit_tokenizer(run)
    mesh = make_mesh(run.mesh)
    run.check_sizes(dict(mesh.shape))
    abstract = train_state.abstract_state(run, mesh)
    batch = feed.abstract_microbatches(run, sharding.batch_sharding(mesh, run.rules))
    _require_one_trainer(workdir, config_text)
    slots = train_state.run_layout(run, mesh).slots
    progress = resume.saved_progress(run, workdir, abstract, allow_change=allow_config_change, layer_order=slots)
    with multihost.first_process_first("tokens"):
        store = _open_store(run, workdir, progress, _say if show_progress else None)
        rows = _rows(run, store, progress, multihost.row_group(batch.tokens), allow_config_change)
    _describe(workdir, config_text, store)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        at = _first_position(run, workdir, abstract, progress, slots)
        log = stack.enter_context(metrics.MetricsLog(workdir, keep_to_step=at.step))
        if show_progress:
            _say_what_begins(run, store, rows)
        step = _compile(run, len(store.source_names), abstract, batch)
        bar = stack.enter_context(_progress_bar(run, at, show_progress))
        parts = Parts(
            run=run,
            workdir=workdir,
            store=store,
            rows=rows,
            batch=batch,
            slots=slots,
            step=step,
            checkpoints=stack.enter_context(_checkpoints(run, workdir)),
            log=log,
            recorder=Recorder(run, store.source_names, log, bar, mesh),
            bar=bar,
            stop=stop,
            profile=stack.enter_context(Profile(workdir / "profile", profile_steps)),
        )
        return _steps(parts, at)


def _steps(parts: Parts, at: Position) -> TrainResult:
    """Steps until the end of the run or of the data, or a request to stop."""
    run, evaluation, data_ended = parts.run, None, False
    parts.recorder.clock.resume()
    while not (_is_finished(run, at) or parts.stop.agreed(at.step) or data_ended):
        drawn = _draw(parts, at)
        data_ended = drawn is None
        if drawn is not None:
            at = _step(parts, at, drawn)
            evaluation = _evaluate(parts, at) if _is_due(at.step, run.train.evaluate_every) else None
            if _is_due(at.step, run.train.checkpoint_every):
                _save(parts, at, evaluation)
    stopped = not (_is_finished(run, at) or data_ended)
    if evaluation is None and not stopped:
        evaluation = _evaluate(parts, at)
    _save(parts, at, evaluation)
    return TrainResult(at.step, at.tokens, stopped, data_ended, evaluation)


def _draw(parts: Parts, at: Position) -> feed.Drawn | None:
    """The next batch, with a word about sources that leave the mixture in it; None where the data has ended."""
    before = parts.rows.exhausted()
    drawn = feed.draw(parts.rows, schedule.batch_tokens_at(parts.run.train.ramp, at.tokens), parts.batch)
    for name in sorted(set(parts.rows.exhausted()) - set(before)):
        _say(f"source {name!r} has been seen max_epochs times and leaves the mixture at step {at.step + 1:,}")
    if drawn is None:
        _say(f"all sources are used up: the run ends at step {at.step:,}, {at.tokens:,} tokens")
    return drawn


def _step(parts: Parts, at: Position, drawn: feed.Drawn) -> Position:
    """Dispatches one step and writes the row of the one before it."""
    parts.profile.before_step()
    count, tokens = np.int32(drawn.num_microbatches), np.float32(at.tokens)
    state, step_metrics = parts.step(at.state, drawn.microbatches, count, tokens)
    at = Position(state, at.step + 1, at.tokens + drawn.tokens)
    parts.recorder.record(step_metrics, StepFacts(at.step, at.tokens, drawn.tokens, parts.rows.epochs()))
    parts.checkpoints.check()
    if parts.recorder.skipped_in_row >= parts.run.train.max_skipped_steps:
        _give_up(parts, at)
    return at


def _is_finished(run: RunConfig, at: Position) -> bool:
    return at.step >= run.train.steps or at.tokens >= run.train.token_budget


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _evaluate(parts: Parts, at: Position) -> evaluate.Evaluation:
    """Held-out loss of the parameters as they are, into the log and `evaluation.json`."""
    parts.recorder.flush()
    evaluation = evaluate.evaluate(parts.run, parts.store, at.state.params)
    if at.step not in parts.log.evaluated_steps:
        parts.log.write({"step": at.step, "tokens": at.tokens} | evaluation.row())
    evaluate.write_evaluation(parts.workdir, evaluation, step=at.step)
    parts.recorder.clock.resume()
    return evaluation


def _save(parts: Parts, at: Position, evaluation: evaluate.Evaluation | None) -> None:
    """Begins a checkpoint. Rows up to its step are on disk before it can be complete, so that no kill loses one."""
    parts.recorder.flush()
    parts.log.upload()
    progress = {
        "step": at.step,
        "tokens": at.tokens,
        "data": parts.rows.get_state(),
        "store": parts.store.content_hash,
        "settings": resume.settings(parts.run),
    }
    loss = math.nan if evaluation is None else evaluation.mean_loss
    parts.checkpoints.save(
        at.step, at.state, progress, held_out_loss=loss if math.isfinite(loss) else None, layer_order=parts.slots
    )
    parts.recorder.clock.resume()


def _give_up(parts: Parts, at: Position) -> NoReturn:
    """Saves the last finite parameters, with a fresh allowance of skips for whoever goes on from them."""
    state = dataclasses.replace(at.state, skipped_in_row=jnp.zeros_like(at.state.skipped_in_row))
    _save(parts, dataclasses.replace(at, state=state), None)
    parts.checkpoints.wait()
    raise SkipLimitError(
        f"the loss or gradient of the last {parts.recorder.skipped_in_row} steps was not finite "
        f"(max_skipped_steps={parts.run.train.max_skipped_steps}); step {at.step} is saved with the last finite "
        "parameters; lower LEARNING_RATE or look at the data of these steps, then resume with --allow_config_change"
    )


def _require_one_trainer(workdir: epath.Path, config_text: str) -> None:
    """Raises `CallerError` where another run trains in `workdir`, or processes of this one differ in what they see."""
    metrics.refuse_second_trainer(workdir)
    multihost.require_same("configuration", hashlib.blake2b(config_text.encode(), digest_size=8).hexdigest())
    multihost.require_same(f"steps saved in {workdir}", checkpoint.saved_steps(workdir))


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


def _first_position(
    run: RunConfig, workdir: epath.Path, abstract: TrainState, progress: dict | None, slots: tuple[int, ...] | None
) -> Position:
    """The newest checkpoint's position, or step 0 with fresh parameters or those of `init_from`."""
    if progress:
        step = progress["step"]
        return Position(checkpoint.restore(workdir, step, abstract, layer_order=slots), step, progress["tokens"])
    state = train_state.create_state(run, abstract)
    if run.train.init_from is None:
        return Position(state)
    source, params = run.train.init_from, {"params": abstract.params}
    restored = checkpoint.restore(source, checkpoint.latest_step(source), params, layer_order=slots)
    return Position(dataclasses.replace(state, params=restored["params"]))


def _checkpoints(run: RunConfig, workdir: epath.Path) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(workdir, keep_last=run.train.keep_last, keep_best=run.train.keep_best)


def _compile(run: RunConfig, num_sources: int, abstract: TrainState, batch: Batch) -> jax.stages.Compiled:
    count, tokens = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    return make_step(run, num_sources, abstract).lower(abstract, batch, count, tokens).compile()


def _describe(workdir: epath.Path, config_text: str, store: pipeline.TokenStore) -> None:
    """Writes what makes the work directory readable on its own: configuration, tokenizer, and where it was made."""
    workdir.mkdir(parents=True, exist_ok=True)
    metrics.write_atomically(workdir / "config.gin", config_text)
    metrics.write_atomically(workdir / TOKENIZER_FILE, store.tokenizer.serialized)
    metrics.write_atomically(workdir / "environment.json", json.dumps(metrics.environment(), indent=2) + "\n")


def _say_what_begins(run: RunConfig, store: pipeline.TokenStore, rows: pipeline.TrainRows) -> None:
    for name, packing in rows.packing().items():
        tokens = f"{store.num_tokens(name, 'train'):,} tokens in {packing['rows']:,} rows, {packing['fill']:.1%} full"
        _say(f"source {name}: {tokens}, {packing['split_documents']:,} documents longer than a row")
    planned, there = schedule.planned_tokens(run.train), rows.total_tokens()
    if there is not None and there < planned:
        _say(
            f"the sources end after {there:,} tokens, before the {planned:,} that the learning rate is planned for: "
            "raise max_epochs or lower TOKEN_BUDGET"
        )
    _say("compiling the training step")


def _say(line: str) -> None:
    """One line on stderr, above the progress bar where there is one; of several processes from the first."""
    if jax.process_index() == 0:
        tqdm.tqdm.write(line, file=sys.stderr)


def _progress_bar(run: RunConfig, at: Position, shown: bool) -> tqdm.tqdm:
    total, hidden = schedule.planned_tokens(run.train), not shown or jax.process_index() > 0
    form = "{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} tokens, {elapsed}<{remaining}{postfix}"
    every = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LOG_LINES
    return tqdm.tqdm(
        total=total, initial=at.tokens, unit_scale=True, disable=hidden, bar_format=form, mininterval=every
    )
