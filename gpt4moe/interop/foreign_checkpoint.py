"""A Mixtral checkpoint of Hugging Face made a work directory of ours, and the other way.

Everything is checked from headers and configuration before anything is written. Parameters are made, and tensors
written, one after the other: in memory is never more than a parameter of ours with a tensor of theirs, or a shard.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tokenizers
from etils import epath
from flax import nnx

from gpt4moe import checkpoint
from gpt4moe.config.check import CallerError, require
from gpt4moe.config.run import RunConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.data.store import TOKENIZER_FILE
from gpt4moe.data.tokenizer import END_OF_TEXT_NAMES, named_tokenizer
from gpt4moe.interop import mixtral
from gpt4moe.interop.mixtral_config import foreign_config
from gpt4moe.interop.tensor_files import find_tensors, read_json, write_shards
from gpt4moe.model.transformer import Transformer
from gpt4moe.train import metrics, resume

CONFIG_FILE, FOREIGN_FOLDER = "config.json", "foreign"
# Small files beside the weights that say nothing of our model: kept, and given back on export.
KEPT_FILES = (
    *(CONFIG_FILE, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
STEP = 0
SHARD_BYTES = 5 * 10**9
RUN_FILES = ("config.gin", "metrics.jsonl")


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import made: how many tensors were read and parameters made, their dtypes as stored, and what is lacking.

    has_tokenizer: whether text can be encoded; notes: what the user should know, a line each.
    """

    workdir: str
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    has_tokenizer: bool
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export wrote, and of which step."""

    folder: str
    step: int
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    files: tuple[str, ...]


def read_config(source: str | os.PathLike) -> dict[str, Any]:
    """Returns config.json of a checkpoint's folder; raises `CallerError` where there is none."""
    path = pathlib.Path(source) / CONFIG_FILE
    mend = "give the folder of a Hugging Face checkpoint"
    require(path.is_file(), "--from", os.fspath(source), f"holds no {CONFIG_FILE}", mend)
    return read_json(path)


def require_free(workdir: str | os.PathLike) -> None:
    """Raises `CallerError` where the work directory holds a run already."""
    place = epath.Path(workdir)
    require(not place.exists() or place.is_dir(), "--workdir", os.fspath(workdir), "is a file", "name a folder")
    taken = any((place / name).exists() for name in RUN_FILES) or bool(checkpoint.saved_steps(workdir))
    require(not taken, "--workdir", os.fspath(workdir), "already holds a run", "give another, or remove it first")


def import_checkpoint(
    run: RunConfig, config_text: str, source: str | os.PathLike, workdir: str | os.PathLike, dtype: str | None = None
) -> Imported:
    """Makes `workdir` of the checkpoint in the folder `source`, whose config.json `run` was made of.

    Parameters are stored in the dtype of their tensors, or in `dtype`; they are float32 where a model is loaded.
    Raises `CallerError`, before anything is written, where tensors are missing, unknown or of other shapes, or the
    tokenizer has more ids than the model.
    """
    require_free(workdir)
    folder, place = pathlib.Path(source), epath.Path(workdir)
    tensors = find_tensors(folder)
    naming = mixtral.naming_of(tensors)
    mixtral.require_enough(run.model, naming, tensors)
    table = mixtral.places(run.model, naming)
    mixtral.check_tensors(run.model, table, tensors)
    tokenizer, notes = _tokenizer(folder, run)
    shapes = mixtral.parameter_shapes(run.model)
    arrays = {}
    for path, parts in table.items():
        kind = np.dtype(dtype) if dtype else _dtype_of({tensors[part.name].dtype for part in parts})

        def make(shape=shapes[path], parts=parts, kind=kind) -> np.ndarray:
            return mixtral.parameter(shape, parts, tensors, kind)

        arrays[f"params.{path}"] = checkpoint.Unmade(shapes[path], kind, make)
    record = {"step": STEP, "tokens": 0, "store": None, "settings": resume.settings(run)}
    record |= {"imported_from": str(folder.resolve())}
    place.mkdir(parents=True, exist_ok=True)
    checkpoint.save_one_by_one(workdir, STEP, arrays, record)
    if tokenizer is not None:
        metrics.write_atomically(place / TOKENIZER_FILE, tokenizer)
    (place / FOREIGN_FOLDER).mkdir(exist_ok=True)
    for name in KEPT_FILES:
        if (folder / name).is_file():
            (place / FOREIGN_FOLDER / name).write_bytes((folder / name).read_bytes())
    metrics.write_atomically(place / "environment.json", json.dumps(metrics.environment(), indent=2) + "\n")
    metrics.write_atomically(place / "config.gin", config_text)  # last: with it the work directory is whole
    return Imported(
        workdir=os.fspath(workdir),
        tensors=len(tensors),
        parameters=sum(array.nbytes // array.dtype.itemsize for array in arrays.values()),
        dtypes=tuple(sorted({array.dtype.name for array in arrays.values()})),
        has_tokenizer=tokenizer is not None,
        notes=tuple(notes),
    )


def macros(foreign: Mapping[str, Any], source: str | os.PathLike, workdir: str | os.PathLike) -> dict[str, str]:
    """Returns what an import sets beside the sizes of config.json, `foreign`: compute dtype and tokenizer, in gin."""
    dtype = _dtype_of({tensor.dtype for tensor in find_tensors(pathlib.Path(source)).values()})
    compute = "float32" if dtype == np.float32 else "bfloat16"
    place = os.fspath(workdir) if "://" in os.fspath(workdir) else os.path.abspath(workdir)
    values = {"COMPUTE_DTYPE": compute, "TOKENIZER_PATH": os.path.join(place, TOKENIZER_FILE)}
    values |= token_names(pathlib.Path(source) / TOKENIZER_FILE, foreign)
    return {name: repr(value) for name, value in values.items()}


def token_names(path: pathlib.Path, foreign: Mapping[str, Any]) -> dict[str, str]:
    """Returns macros that name begin and end of text of a tokenizer.json, where they are not those we would take.

    The end is config.json's `eos_token_id`, the first of several; the begin is what the tokenizer itself puts first.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
    except Exception:  # the library raises bare Exception; what is wrong with the file is said where it is kept
        return {}
    usual = [name for name in END_OF_TEXT_NAMES if tokenizer.token_to_id(name) is not None]
    ids = foreign.get("eos_token_id")
    ids = [each for each in (ids if isinstance(ids, list) else [ids]) if isinstance(each, int)]
    end = tokenizer.id_to_token(ids[0]) if ids else None
    named = {"END_OF_TEXT": end} if end is not None and [end] != usual[:1] else {}
    first = tokenizer.encode("", add_special_tokens=True).tokens[:1]
    return named | ({"BEGIN_OF_TEXT": first[0]} if first and first != ([end] if end else usual[:1]) else {})


def _dtype_of(names: set[str]) -> np.dtype:
    return np.dtype(names.pop()) if len(names) == 1 else np.dtype(np.float32)


def _tokenizer(folder: pathlib.Path, run: RunConfig) -> tuple[str | None, list[str]]:
    """The text of tokenizer.json where it is one that we can use, and what to say of it."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return None, [f"no {TOKENIZER_FILE} in {folder}: put one into the work directory to generate text"]
    text = path.read_text(encoding="utf-8")
    try:
        tokenizer = named_tokenizer(text, run.data.tokenizer)
    except CallerError as error:
        return text, [f"{path} is kept but cannot be used: {error}"]
    constraint = f"must be at least the {tokenizer.vocab_size} ids of {path}"
    require(tokenizer.vocab_size <= run.model.vocab_size, "vocab_size", run.model.vocab_size, constraint)
    return text, []


def export_checkpoint(
    run: RunConfig,
    workdir: str | os.PathLike,
    target: str | os.PathLike,
    *,
    step: int | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Writes a step of a run (None: the latest) as a Mixtral checkpoint into the folder `target`, new or empty.

    Tensors have the dtype that their parameters are stored in, or `dtype`. Raises `CallerError` where a Mixtral
    cannot be what the model is, or where `target` has files.
    """
    folder = pathlib.Path(target)
    step = checkpoint.latest_step(workdir) if step is None else step
    saved = checkpoint.saved_steps(workdir)
    require(step in saved, "--step", step, f"is not saved in {os.fspath(workdir)}", f"choose one of {saved}")
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(empty, "--to", str(folder), "exists and is not an empty folder", "name another")
    stored = checkpoint.saved_dtypes(workdir, step)
    config = foreign_config(run.model, dtype or "float32")  # refuses what a Mixtral cannot be
    table = mixtral.places(run.model, mixtral.Naming())
    dtypes = {path: np.dtype(dtype) if dtype else stored[f"params.{path}"] for path in table}
    config["torch_dtype"] = _dtype_of({kind.name for kind in dtypes.values()}).name
    abstract = _abstract_parameters(run)
    checkpoint.check_shapes(workdir, step, {"params": abstract})
    sizes = {part.name: mixtral.size_of(part, dtypes[path]) for path, parts in table.items() for part in parts}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for path, parts in table.items():
            for name, array in mixtral.tensors_of(_restore_one(workdir, step, abstract, path), parts):
                yield name, array.astype(dtypes[path], copy=False)
            del array

    folder.mkdir(parents=True, exist_ok=True)
    files = write_shards(folder, tensors(), sizes, shard_bytes)
    files += _write_beside(epath.Path(workdir), folder, config, run.data.tokenizer)
    counts = {path: np.prod(shape, dtype=np.int64) for path, shape in mixtral.parameter_shapes(run.model).items()}
    names = tuple(sorted({kind.name for kind in dtypes.values()}))
    return Exported(str(folder), step, len(sizes), int(sum(counts.values())), names, tuple(sorted(files)))


def _abstract_parameters(run: RunConfig) -> nnx.State:
    return nnx.split(nnx.eval_shape(lambda: Transformer(run.model, rngs=nnx.Rngs(0))))[1]


def _restore_one(workdir: str | os.PathLike, step: int, abstract: nnx.State, path: str) -> np.ndarray:
    """One parameter, in the order of the layers and on the host, whatever the default device."""
    parts, host = tuple(path.split(".")), jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    wanted = nnx.from_flat_state([(key, leaf) for key, leaf in nnx.to_flat_state(abstract) if key == parts])
    dtype = checkpoint.saved_dtypes(workdir, step)[f"params.{path}"]
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=host), wanted)
    (array,) = jax.tree.leaves(checkpoint.restore(workdir, step, {"params": wanted}))
    return np.asarray(array)


def _write_beside(
    workdir: epath.Path, folder: pathlib.Path, config: Mapping[str, Any], names: TokenizerConfig
) -> list[str]:
    """Configuration and tokenizer: what an import kept, with our settings in the place of its own."""
    kept = workdir / FOREIGN_FOLDER
    written = []
    for name in KEPT_FILES:
        if name != CONFIG_FILE and (kept / name).exists():
            (folder / name).write_bytes((kept / name).read_bytes())
            written.append(name)
    ids = _kept_config(kept)
    if (workdir / TOKENIZER_FILE).exists():
        text = (workdir / TOKENIZER_FILE).read_text()
        (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")
        written.append(TOKENIZER_FILE)
        if not kept.exists():
            ids, described = _describe_tokenizer(text, names)
            (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
            written.append("tokenizer_config.json")
    (folder / CONFIG_FILE).write_text(json.dumps(config | ids, indent=2) + "\n")
    return [*written, CONFIG_FILE]


def _kept_config(kept: epath.Path) -> dict[str, Any]:
    """The special ids of an imported config.json, of which our model knows nothing."""
    if not (kept / CONFIG_FILE).exists():
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    there = json.loads((kept / CONFIG_FILE).read_text())
    return {name: there.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _describe_tokenizer(serialized: str, names: TokenizerConfig) -> tuple[dict[str, int], dict[str, str]]:
    """Special ids, and a tokenizer_config.json, where an import kept none: a prompt follows what it does here."""
    tokenizer, token_of = named_tokenizer(serialized, names), tokenizers.Tokenizer.from_str(serialized).id_to_token
    ids = {"bos_token_id": tokenizer.begin_of_text, "eos_token_id": tokenizer.end_of_text}
    described = {"bos_token": token_of(tokenizer.begin_of_text), "eos_token": token_of(tokenizer.end_of_text)}
    return ids, {"tokenizer_class": "PreTrainedTokenizerFast"} | described
