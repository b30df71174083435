"""Safetensors of a Hugging Face checkpoint, whole or in shards: what is there, one tensor at a time in and out."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gpt4moe.config.check import CallerError, require

WHOLE, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-{:05d}-of-{:05d}.safetensors"
# What our parameters can be made of, as the format names it.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SHOWN_NAMES = 50


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that is not read yet: its file, shape and dtype."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str


def find_tensors(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns every tensor of a checkpoint's folder by name, from the headers of its files alone.

    Raises `CallerError` where there are no weights, or a file is missing, cut short or holds another dtype than
    `DTYPES`.
    """
    index = folder / INDEX
    sharded = not (folder / WHOLE).exists() and index.exists()
    expected = _weight_map(index) if sharded else {}
    files = [folder / WHOLE] if (folder / WHOLE).exists() else sorted(folder.glob("*.safetensors"))
    files = sorted({folder / name for name in expected.values()}) if sharded else files
    mend = f"it needs {WHOLE}, or {INDEX} with its shards"
    require(bool(files), "--from", str(folder), "holds no weights in safetensors", mend)
    found: dict[str, StoredTensor] = {}
    for file in files:
        there = _headers(file)
        twice = sorted(there.keys() & found.keys())
        require(not twice, "file", file.name, f"holds what another file holds too: {listed(twice)}")
        found |= there
    astray = sorted(name for name, file in expected.items() if name not in found or found[name].file.name != file)
    require(not astray, "index", str(index), f"names tensors that are not in their files: {listed(astray)}")
    return found


def read_tensor(tensor: StoredTensor, name: str, part: slice | None = None) -> np.ndarray:
    """Returns a tensor as it is stored, or the `part` of its second dim, as an array that nothing else holds."""
    with _opened(tensor.file) as file:
        stored = file.get_slice(name)
        return np.asarray(stored[:] if part is None else stored[:, part])


def write_shards(
    folder: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]], sizes: Mapping[str, int], shard_bytes: int
) -> list[str]:
    """Writes `tensors` as they come, no more than a shard of them held at once, and returns the names of the files.

    `sizes`: bytes of every tensor, in the order in which `tensors` gives them; one file needs no index.
    """
    shards = _shards(sizes, shard_bytes)
    names = [WHOLE] if len(shards) == 1 else [SHARD.format(number + 1, len(shards)) for number in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        arrays = {}
        for expected in shard:
            name, array = next(tensors)
            assert name == expected, f"{name} came where {expected} was planned"
            arrays[name] = np.array(array, order="C")
            del array  # a view of a whole parameter, which may go before the next one comes
        try:
            save_file(arrays, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"could not write {folder / file}: {error}") from error
        (folder / file).chmod(0o666 & ~_umask())  # safetensors lets nobody else read it
        del arrays
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        names.append(INDEX)
    return names


def _umask() -> int:
    """What new files of this process may not have; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def listed(names: Sequence[str]) -> str:
    """Returns the first few of `names`, and how many more there are."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def read_json(path: pathlib.Path) -> dict:
    """Returns the object of a JSON file; raises `CallerError` where it holds none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CallerError(f"{path} is not JSON: {error}") from None
    require(isinstance(document, dict), "file", str(path), "must hold a JSON object")
    return document


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    whole = isinstance(weight_map, dict) and weight_map and all(isinstance(file, str) for file in weight_map.values())
    require(bool(whole), "index", str(index), "must have a weight_map from tensors to files")
    missing = sorted({file for file in weight_map.values() if not (index.parent / file).is_file()})
    require(not missing, "index", str(index), f"names files that are not there: {listed(missing)}", "download them")
    return weight_map


def _headers(file: pathlib.Path) -> dict[str, StoredTensor]:
    with _opened(file) as stored:
        slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
        dtypes = {name: str(item.get_dtype()) for name, item in slices.items()}
        foreign = sorted(f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in DTYPES)
        require(not foreign, "file", str(file), f"holds dtypes other than {', '.join(DTYPES)}: {listed(foreign)}")
        shapes = {name: tuple(item.get_shape()) for name, item in slices.items()}
    return {name: StoredTensor(file, shapes[name], DTYPES[dtype]) for name, dtype in dtypes.items()}


def _opened(file: pathlib.Path):
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise CallerError(f"{file} is no whole safetensors file: {error}; download it again") from None


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards
