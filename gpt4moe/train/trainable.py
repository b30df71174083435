"""Which parameters a run trains, and each one's learning rate relative to the schedule's.

In: a tree of parameters and the patterns of `OptimizerConfig`. A parameter's name is the dotted path of its place in
the model, which is also that of its array in a checkpoint (there below `params.`).
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from gpt4moe.config.check import require
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.optimizer import NOT_FROZEN, OptimizerConfig
from gpt4moe.model.transformer import Transformer


def split(params: nnx.State, config: OptimizerConfig) -> tuple[nnx.State, nnx.State]:
    """Returns (trained, frozen): the parameters of a model in two, which `join` puts together again."""
    if not config.frozen:
        return params, nnx.State({})
    return nnx.split_state(params, lambda path, _: config.trains(".".join(map(str, path))), ...)


def join(trained: nnx.State, frozen: nnx.State) -> nnx.State:
    """Returns all the parameters of which `split` made two parts."""
    return nnx.merge_state(trained, frozen) if frozen else trained


def scaled(updates: Any, config: OptimizerConfig) -> Any:
    """Returns an optimizer's updates, each times its factor of the learning rate."""

    def of_leaf(path: tuple, leaf: Any) -> Any:
        factor = config.rate_scale(_name(path))
        return leaf if factor == 1 else jax.tree.map(lambda update: factor * update, leaf)

    return jax.tree_util.tree_map_with_path(of_leaf, updates, is_leaf=_is_parameter)


def names(params: Any) -> list[str]:
    """Returns the name of every parameter, in the order of the tree."""
    return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_parameter)]


def check(params: Any, config: OptimizerConfig) -> None:
    """Raises `CallerError` where a pattern fits no parameter, a factor none that is trained, or nothing is trained."""
    known = names(params)
    trained = [name for name in known if config.trains(name)]
    scales = {config.rate_pattern(name) for name in trained}
    for pattern in config.frozen:
        _require_match("frozen", pattern, known)
    require(bool(trained), "frozen", config.frozen, "leaves nothing to train", "name fewer, or add '!pattern'")
    for pattern, _ in config.rate_scales:
        _require_match("rate_scales", pattern, known)
        constraint = "scales nothing: what it matches is frozen or matched by an earlier pattern"
        require(pattern in scales, "rate_scales", pattern, constraint, "leave it out, or put it first")


def table(model: ModelConfig, config: OptimizerConfig | None) -> list[dict[str, Any]]:
    """Returns a row for every parameter: its name, shape, count, whether it is trained and its share of the rate."""
    params = nnx.state(nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0))))
    if config:
        check(params, config)
    leaves = zip(names(params), jax.tree.leaves(params), strict=True)
    return [
        {
            "name": name,
            "shape": list(leaf.shape),
            "parameters": math.prod(leaf.shape),
            "trained": config is None or config.trains(name),
            "rate_scale": config.rate_scale(name) if config else 1.0,
        }
        for name, leaf in leaves
    ]


def count(model: ModelConfig, config: OptimizerConfig) -> int:
    """Returns how many of a model's parameters are trained."""
    return sum(row["parameters"] for row in table(model, config) if row["trained"])


def _require_match(setting: str, pattern: str, known: Sequence[str]) -> None:
    glob = OptimizerConfig(1.0, frozen=(pattern.removeprefix(NOT_FROZEN),))
    require(any(not glob.trains(name) for name in known), setting, pattern, "matches no parameter", _near(glob, known))


def _near(glob: OptimizerConfig, known: Sequence[str]) -> str:
    """What may have been meant: paths, all below a part of one, or all that are called so."""
    parts = [name.split(".") for name in known]
    called = {f"*.{part[-1]}" for part in parts if len(part) > 1}
    below = {".".join((*part[:depth], "*")) for part in parts for depth in range(1, len(part))}
    close = difflib.get_close_matches(glob.frozen[0], sorted({*known, *below, *called}), n=2, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    tops = itertools.groupby(known, key=lambda name: name.partition(".")[0])
    return f"there are {', '.join(f'{top}.*' if '.' in next(paths) else top for top, paths in tops)}"


def _is_parameter(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
