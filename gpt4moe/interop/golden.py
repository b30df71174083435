"""A run's logits and greedy tokens, in float32, against those that another framework gave for the same weights."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from gpt4moe.config.check import CallerError, require
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer import trained
from gpt4moe.infer.generate import generate_ids
from gpt4moe.interop.foreign_checkpoint import CONFIG_FILE, FOREIGN_FOLDER
from gpt4moe.model.transformer import Transformer

ARRAYS = ("tokens", "logits", "greedy")
NEVER = -1


@dataclasses.dataclass(frozen=True)
class Golden:
    """tokens [rows, T] and the logits [rows, T, V] of every one; greedy: rows, each tokens and their continuation."""

    tokens: np.ndarray
    logits: np.ndarray
    greedy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Comparison:
    """max_logit_error: largest difference of any logit. greedy_match: whether every greedy token is ours.

    tokens: how many had their logits compared; greedy_tokens: how many were continued, greedy_equal: of them equal.
    """

    max_logit_error: float
    greedy_match: bool
    tokens: int
    greedy_tokens: int
    greedy_equal: int


@dataclasses.dataclass(frozen=True)
class Ids:
    """In the place of a tokenizer where ids go in and out; no id ends a text."""

    end_of_text: int = NEVER
    image: int | None = None

    def encode(self, text: str) -> list[int]:
        """Text has no ids here."""
        raise CallerError(f"text={text!r} cannot be encoded without a tokenizer")

    def decode(self, ids: Any) -> str:
        """Returns the ids as they are, in words."""
        return " ".join(map(str, ids))


def compare(
    run: RunConfig,
    workdir: str | os.PathLike,
    file: str | os.PathLike,
    *,
    step: int | None = None,
    mesh: MeshConfig | None = None,
) -> Comparison:
    """Returns how far the model of a run is from a golden file (.npz with `tokens`, `logits`, `greedy`).

    Everything is computed in float32 with full products. A row of `greedy` begins with first tokens of the same row of
    `tokens`, as many as they share, or else continues the whole row; it is compared up to an end-of-text.
    Raises `CallerError` for a file that is none, lacks an array, or is of another vocabulary.
    """
    golden = read_golden(file)
    _check(golden, run, file)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, compute_dtype="float32"))
    with jax.default_matmul_precision("highest"):
        model = trained.restore(run, workdir, step=step, mesh=mesh).model
        error = _logit_error(model, golden)
        total, equal = _greedy(model, golden, _ends(workdir))
    return Comparison(error, equal == total, int(golden.tokens.size), total, equal)


def read_golden(file: str | os.PathLike) -> Golden:
    """Returns the arrays of a golden file; raises `CallerError` where it is none or lacks one."""
    path = pathlib.Path(file)
    require(path.is_file(), "--golden", str(path), "is not a file", "give an .npz of tokens, logits, greedy")
    try:
        with np.load(path, allow_pickle=False) as stored:
            lacking = [name for name in ARRAYS if name not in stored]
            require(not lacking, "--golden", str(path), f"lacks {', '.join(lacking)}", f"it needs {', '.join(ARRAYS)}")
            return Golden(*(stored[name] for name in ARRAYS))
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, CallerError):
            raise
        raise CallerError(f"--golden={str(path)!r} cannot be read as .npz: {error}") from None


def format_comparison(document: Mapping[str, Any]) -> str:
    """Returns the comparison as lines to read."""
    greedy = f"{document['greedy_equal']:,} of {document['greedy_tokens']:,} tokens"
    return (
        f"max_logit_error  {document['max_logit_error']:.3g}  over {document['tokens']:,} tokens, float32\n"
        f"greedy_match     {document['greedy_match']}  {greedy}"
    )


def _check(golden: Golden, run: RunConfig, file: str | os.PathLike) -> None:
    tokens, logits, greedy = golden.tokens, golden.logits, golden.greedy
    name, vocab_size, length = f"--golden={os.fspath(file)!r}: ", run.model.vocab_size, run.model.context_length
    for array, dims, kind in (("tokens", 2, "iu"), ("greedy", 2, "iu"), ("logits", 3, "f")):
        value = getattr(golden, array)
        fits = value.ndim == dims and value.dtype.kind in kind and value.size > 0
        wanted = f"must be {dims}-dimensional {'numbers' if kind == 'f' else 'integers'}"
        require(fits, f"{name}{array}", f"{value.dtype}{list(value.shape)}", wanted)
    fits = logits.shape[:2] == tokens.shape
    require(fits, f"{name}logits", logits.shape, f"must be of the tokens, {tokens.shape}")
    mend = "it is of another model"
    require(logits.shape[2] == vocab_size, f"{name}vocabulary", logits.shape[2], f"must be {vocab_size}", mend)
    for array in (tokens, greedy):
        inside = array.min() >= 0 and array.max() < vocab_size
        require(inside, f"{name}ids", f"{array.min()}..{array.max()}", f"must lie below vocab_size ({vocab_size})")
        require(array.shape[1] <= length, f"{name}length", array.shape[1], f"must be at most context_length ({length})")
    fits = len(greedy) <= len(tokens)
    require(fits, f"{name}greedy", f"{len(greedy)} rows", f"must be at most the {len(tokens)} rows of tokens")


def _logit_error(model: Transformer, golden: Golden) -> float:
    """Rows in turn, so that no more than the logits of one are there; not a number where a logit is none."""
    graph, state = nnx.split(model)

    @jax.jit
    def logits_of(state: nnx.State, tokens_BT: jax.Array) -> jax.Array:
        whole = nnx.merge(graph, state)
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD, _ = whole(tokens_BT, positions, jnp.ones_like(tokens_BT), dropless=True)
        return whole.logits(x_BTD)

    rows = model.layout.row_multiple
    errors = []
    for tokens, wanted in zip(golden.tokens, golden.logits, strict=True):
        got = np.asarray(logits_of(state, jnp.asarray(np.tile(tokens, (rows, 1)), jnp.int32)))[0]
        errors.append(np.abs(got.astype(np.float64) - wanted).max())
    return float(np.max(errors))


def _greedy(model: Transformer, golden: Golden, ends: frozenset[int]) -> tuple[int, int]:
    """How many tokens of `greedy` are new, and how many of them, from the first on in each row, are ours."""
    total = equal = 0
    for tokens, greedy in zip(golden.tokens, golden.greedy, strict=False):
        shared = _num_shared(tokens, greedy)
        prompt, wanted = (tokens, greedy) if shared == 0 else (greedy[:shared], greedy[shared:])
        stops = np.flatnonzero(np.isin(wanted, list(ends)))
        wanted = wanted[: stops[0] + 1] if len(stops) else wanted
        if not len(wanted):
            continue
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=len(wanted))
        (made,) = generate_ids(model, Ids(), [prompt.tolist()], sampling, [()])
        total, equal = total + len(wanted), equal + _num_shared(np.asarray(made), wanted)
    return total, equal


def _num_shared(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two rows have in common from the first on."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def _ends(workdir: str | os.PathLike) -> frozenset[int]:
    """The ids after which the original stops, from the config.json that an import kept."""
    kept = epath.Path(workdir) / FOREIGN_FOLDER / CONFIG_FILE
    ids = json.loads(kept.read_text()).get("eos_token_id") if kept.exists() else None
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
