"""What may change between a run and its continuation in the same work directory, and what may not.

Every checkpoint records the settings it was trained with. On resume they are compared with those of the command:
settings of length, logging and housekeeping may change freely; others change what is trained and are refused with a
list of the differences unless the caller allows them; settings of the model's shape can never change.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from gpt4moe import checkpoint
from gpt4moe.config.check import CallerError, require
from gpt4moe.config.run import RunConfig
from gpt4moe.data.store import TOKENIZER_FILE
from gpt4moe.data.tokenizer import build_tokenizer, load_tokenizer
from gpt4moe.train import adapter, trainable, upcycle
from gpt4moe.train.state import TrainState

# A run may be prolonged, logged, saved and laid out differently. Its schedule follows its length (planned tokens), so
# a prolonged run is not bitwise the run that was planned long from the start.
FREE_SETTINGS = (
    "train.steps",
    "train.token_budget",
    "train.checkpoint_every",
    "train.evaluate_every",
    "train.log_every",
    "train.keep_last",
    "train.keep_best",
    "train.max_skipped_steps",
    "train.init_from",
    "train.sample_prompts",
    "train.sample_tokens",
    "train.record_routing",
    "data.store",
    "data.images.workers",
    "data.images.processes",
    "mesh.",
    "rules.",
    "model.remat",
    "model.attention.query_chunk",
)


def settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting of a configuration by its dotted name, JSON-able: functions by import path and parameters."""
    if dataclasses.is_dataclass(config):
        fields = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
    elif isinstance(config, tuple) and any(dataclasses.is_dataclass(item) for item in config):
        fields = [(getattr(item, "name", str(index)), item) for index, item in enumerate(config)]
    else:
        return {prefix: _plain(config)}
    named = {}
    for name, value in fields:
        named |= settings(value, f"{prefix}.{name}" if prefix else name)
    return named


def differences(saved: Mapping[str, Any], run: RunConfig) -> list[str]:
    """The settings that differ from the saved ones and are not free to, as `name: saved -> now`.

    A setting that was not saved, because the library did not have it yet, was at its default.
    """
    now = settings(run)
    there = _defaults(run) | saved
    names = [name for name in sorted(there.keys() | now.keys()) if not name.startswith(FREE_SETTINGS)]
    changed = [name for name in names if there.get(name) != now.get(name)]
    return [f"{name}: {there.get(name)!r} -> {now.get(name)!r}" for name in changed]


def saved_progress(
    run: RunConfig,
    workdir: epath.Path,
    abstract: TrainState,
    *,
    allow_change: bool,
    layer_order: Sequence[int] | None = None,
) -> dict | None:
    """The record of the newest checkpoint, None where there is none to go on from; reads only.

    `layer_order`: that of the stacks of layers in `abstract`, as in `checkpoint.restore`.

    Raises `CallerError` where that checkpoint, or what `init_from` names, is not of a model of these shapes, or where
    it was trained with other settings that are not free and `allow_change` is not given.
    """
    steps = checkpoint.saved_steps(workdir)
    source = run.train.init_from
    if not steps:
        if source is not None:
            step = checkpoint.latest_step(source)
            dense, new = upcycle.dense_source(run, step), adapter.new_parts(source, step, abstract.params)
            params = upcycle.abstract_dense(run, dense, abstract.step.sharding.mesh)[0] if dense else abstract.params
            params = adapter.without(params, new)
            checkpoint.check_shapes(source, step, {"params": params}, layer_order=layer_order, setting="INIT_FROM")
        return None
    progress = checkpoint.restore_progress(workdir, steps[-1])
    mend = "give another workdir, and INIT_FROM this one"
    require("data" in progress, "workdir", str(workdir), "holds imported weights, which no run has trained", mend)
    changed = differences(progress["settings"], run)
    if changed and not allow_change:
        raise CallerError(
            f"workdir={str(workdir)!r} was trained with another configuration ({'; '.join(changed)}); "
            "give its own configuration, another workdir, or --allow_config_change to go on with the new one"
        )
    _require_optimizer_state(run, progress["settings"], abstract)
    checkpoint.check_shapes(workdir, steps[-1], abstract, layer_order=layer_order)
    return progress


def _require_optimizer_state(run: RunConfig, saved: Mapping[str, Any], abstract: TrainState) -> None:
    """Raises `CallerError` where what is trained was frozen; what is frozen now only loses its state."""
    then = dataclasses.replace(run.optimizer, frozen=tuple(saved.get("optimizer.frozen", ())))
    all_names = trainable.names(abstract.params)
    names = [name for name in all_names if run.optimizer.trains(name) and not then.trains(name)]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    constraint = f"trains {names[0]}{more}, of which the checkpoint has no optimizer state" if names else ""
    mend = "keep frozen as it was, or give another workdir and INIT_FROM this one"
    require(not names, "frozen", list(run.optimizer.frozen), constraint, mend)


def inherit_tokenizer(run: RunConfig) -> RunConfig:
    """Returns `run` with the tokenizer of the run it starts from, whose parameters know no other ids.

    Raises `CallerError` where that run has saved nothing, or where `run` asks for a tokenizer of its own that differs.
    """
    source, config = run.train.init_from, run.data.tokenizer
    if source is None:
        return run
    saved_there = bool(checkpoint.saved_steps(source))
    mend = "name the work directory of a run that has saved one"
    require(saved_there, "init_from", source, "has no complete checkpoint", mend)
    if not (epath.Path(source) / TOKENIZER_FILE).exists():
        return run
    path = os.fspath(epath.Path(source) / TOKENIZER_FILE)
    if config.path is None and not config.byte_level_only:
        tokenizer = dataclasses.replace(config, path=path)
        return dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=tokenizer))
    same = build_tokenizer(config, ()).serialized == load_tokenizer(path, config).serialized
    require(
        same, "tokenizer", config.path or "byte_level_only", f"is not the one of INIT_FROM ({path})", "leave it out"
    )
    return run


def _defaults(config: Any, prefix: str = "") -> dict[str, Any]:
    """The plain default of every setting of `config` that has one, by its dotted name."""
    named = {}
    for field in dataclasses.fields(config):
        name, value = f"{prefix}.{field.name}" if prefix else field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            named |= _defaults(value, name)
        elif field.default is not dataclasses.MISSING:
            named[name] = _plain(field.default)
    return named


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if callable(value):
        name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        parameters = value.keywords if isinstance(value, functools.partial) else {}
        shown = {key: _plain(item) if callable(item) else repr(item) for key, item in parameters.items()}
        return f"{name}({', '.join(f'{key}={item}' for key, item in shown.items())})" if parameters else name
    return value
