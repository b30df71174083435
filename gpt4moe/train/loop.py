"""Trains a run in its work directory: restore, step, log, evaluate, save, until its end or a request to stop.

The same command in the same work directory goes on where the newest checkpoint stands, and gives bitwise the losses
of a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from gpt4moe import checkpoint
from gpt4moe.config.check import RunError
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel import multihost
from gpt4moe.train import beginning, evaluate, feed, metrics, resume, schedule, trace
from gpt4moe.train.beginning import Beginning, Position
from gpt4moe.train.console import progress_bar, say
from gpt4moe.train.profile import Profile
from gpt4moe.train.recorder import Recorder, StepFacts
from gpt4moe.train.step import lower_step
from gpt4moe.train.stop import StopRequest


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
class Parts:
    """What the loop works with, assembled once."""

    start: Beginning
    step: jax.stages.Compiled
    checkpoints: checkpoint.Checkpoints
    log: metrics.MetricsLog
    recorder: Recorder
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
    stop: StopRequest | None = None,
) -> TrainResult:
    """Trains `run` to its end, or until SIGINT or SIGTERM, and leaves a checkpoint of the last step.

    Args:
      run: the configuration; on resume it must agree with the checkpoint's (see `train.resume`).
      workdir: local path or object store; made once everything that can be checked without it has been.
      config_text: the operative configuration, kept in `config.gin`.
      allow_config_change: resume although settings differ.
      profile_steps: how many steps to write a profiler trace of, into `profile/`.
      show_progress: draw a progress bar on stderr.
      stop: a request that the caller listens for already, over several runs say.

    Raises:
      CallerError: the configuration does not fit the devices, the data or what the work directory holds.
      CheckpointError: a checkpoint could not be written; earlier ones stand.
      SkipLimitError: see there.
    """
    say_progress = say if show_progress else None
    given = {"allow_change": allow_config_change, "progress": say_progress}
    start = beginning.begin(run, epath.Path(workdir), config_text, **given)
    run, workdir, store = start.run, start.workdir, start.store
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest())
        at = beginning.first_position(start)
        log = stack.enter_context(metrics.MetricsLog(workdir, keep_to_step=at.step))
        if show_progress:
            beginning.say_what_begins(start)
        multihost.mark("compiling")
        step = lower_step(run, len(store.source_names), start.abstract).compile()
        bar = stack.enter_context(progress_bar(schedule.planned_tokens(run.train), at.tokens, show_progress))
        parts = Parts(
            start=start,
            step=step,
            checkpoints=stack.enter_context(_checkpoints(run, workdir)),
            log=log,
            recorder=Recorder(run, workdir, store.source_names, log, bar, start.mesh),
            stop=stop,
            profile=stack.enter_context(Profile(workdir / "profile", profile_steps)),
        )
        return _steps(parts, at)


def _steps(parts: Parts, at: Position) -> TrainResult:
    """Steps until the end of the run or of the data, or a request to stop."""
    run, evaluation, data_ended = parts.start.run, None, False
    parts.recorder.clock.resume()
    while not (_is_finished(run, at) or parts.stop.agreed(at.step) or data_ended):
        multihost.mark(f"step {at.step + 1}")
        with parts.recorder.clock.drawing(parts.recorder.is_idle):
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
    before, run = parts.start.rows.exhausted(), parts.start.run
    replay, source = None, run.train.replay_routing
    if source:
        record = trace.replayed(run, at.step + 1, parts.start.batch.replay_ids.shape[-1])
        if record is None:  # before a batch is drawn, so that the next run finds it
            say(f"no further step was recorded in {source}: the run ends at step {at.step:,}, {at.tokens:,} tokens")
            return None
        replay = functools.partial(record.on, source=source)
    batch_tokens = schedule.batch_tokens_at(run.train.ramp, at.tokens)
    drawn = feed.draw(parts.start.rows, batch_tokens, parts.start.batch, replay)
    for name in sorted(set(parts.start.rows.exhausted()) - set(before)):
        say(f"source {name!r} has been seen max_epochs times and leaves the mixture at step {at.step + 1:,}")
    if drawn is None:
        say(f"all sources are used up: the run ends at step {at.step:,}, {at.tokens:,} tokens")
    return drawn


def _step(parts: Parts, at: Position, drawn: feed.Drawn) -> Position:
    """Dispatches one step and writes the row of the one before it."""
    parts.profile.before_step()
    count, tokens = np.int32(drawn.num_microbatches), np.float32(at.tokens)
    state, step_metrics = parts.step(at.state, drawn.microbatches, count, tokens)
    at = Position(state, at.step + 1, at.tokens + drawn.tokens)
    epochs = parts.start.rows.epochs()
    facts = StepFacts(at.step, at.tokens, drawn.tokens, epochs, drawn.num_microbatches, drawn.tokens_crc)
    parts.recorder.record(step_metrics, facts)
    parts.checkpoints.check()
    if parts.recorder.skipped_in_row >= parts.start.run.train.max_skipped_steps:
        _give_up(parts, at)
    return at


def _is_finished(run: RunConfig, at: Position) -> bool:
    return at.step >= run.train.steps or at.tokens >= run.train.token_budget


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _evaluate(parts: Parts, at: Position) -> evaluate.Evaluation:
    """Held-out loss of the parameters as they are, into the log and `evaluation.json`."""
    parts.recorder.flush()
    multihost.mark(f"the evaluation of step {at.step}")
    evaluation = evaluate.evaluate(parts.start.run, parts.start.store, at.state.params)
    if at.step not in parts.log.evaluated_steps:
        parts.log.write({"step": at.step, "tokens": at.tokens} | evaluation.row())
    evaluate.write_evaluation(parts.start.workdir, evaluation, step=at.step)
    parts.recorder.clock.resume()
    return evaluation


def _save(parts: Parts, at: Position, evaluation: evaluate.Evaluation | None) -> None:
    """Begins a checkpoint. Rows up to its step are on disk before it can be complete, so that no kill loses one."""
    parts.recorder.flush()
    parts.log.upload()
    progress = {
        "step": at.step,
        "tokens": at.tokens,
        "data": parts.start.rows.get_state(),
        "store": parts.start.store.content_hash,
        "settings": resume.settings(parts.start.run),
    }
    loss = math.nan if evaluation is None else evaluation.mean_loss
    parts.checkpoints.save(
        at.step, at.state, progress, held_out_loss=loss if math.isfinite(loss) else None, layer_order=parts.start.slots
    )
    parts.recorder.clock.resume()


def _give_up(parts: Parts, at: Position) -> NoReturn:
    """Saves the last finite parameters, with a fresh allowance of skips for whoever goes on from them."""
    state = dataclasses.replace(at.state, skipped_in_row=jnp.zeros_like(at.state.skipped_in_row))
    _save(parts, dataclasses.replace(at, state=state), None)
    parts.checkpoints.wait()
    raise SkipLimitError(
        f"the loss or gradient of the last {parts.recorder.skipped_in_row} steps was not finite "
        f"(max_skipped_steps={parts.start.run.train.max_skipped_steps}); step {at.step} is saved with the last finite "
        "parameters; lower LEARNING_RATE or look at the data of these steps, then resume with --allow_config_change"
    )


def _checkpoints(run: RunConfig, workdir: epath.Path) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(workdir, keep_last=run.train.keep_last, keep_best=run.train.keep_best)
