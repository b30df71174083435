"""Arrays of foreign checkpoints by name, made into parameters of ours by a table of names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from safetensors.flax import load_file

from gpt4moe.config.check import CallerError, require

Arrays = Mapping[str, np.ndarray]
Turn = Callable[[np.ndarray], np.ndarray]
# Our parameter's path -> the foreign name, {} for a layer's number where ours is a stack, and what makes ours of it.
Table = dict[str, tuple[str, Turn]]
SUFFIXES = (".safetensors", ".npz")


def load_arrays(path: str) -> dict[str, np.ndarray]:
    """Returns every array of a file (.safetensors, .npz), or of all .safetensors of a directory, as they are stored.

    Raises `CallerError` where there is no such file.
    """
    place = epath.Path(path)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    found = bool(files) and all(file.exists() and file.suffix in SUFFIXES for file in files)
    require(found, "path", path, f"must be a file ({', '.join(SUFFIXES)}) or a directory of .safetensors")
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        if file.suffix == ".npz":
            with file.open("rb") as stream, np.load(stream) as stored:
                arrays.update(stored)
        else:  # by way of JAX, for NumPy alone has no bfloat16
            arrays.update({name: np.asarray(array) for name, array in load_file(file).items()})
    return arrays


def part(arrays: Arrays, anchor: str) -> dict[str, np.ndarray]:
    """Returns the arrays of the one module that has the parameter `anchor`, named from there.

    Checkpoints put a module at different depths: `vision_model.`, `model.vision_model.` or nothing before its names.
    """
    places = {name.removesuffix(anchor) for name in arrays if f".{name}".endswith(f".{anchor}")}
    require(len(places) == 1, "places of " + anchor, sorted(places), "must be one", "pass the arrays of one module")
    return below(arrays, places.pop())


def below(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    """Returns the arrays whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def parameters_of(
    table: Table, arrays: Arrays, num_layers: int, ignored: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Returns our parameters by path, float32, as the `table` makes them of `arrays`.

    Raises `CallerError` where an array is missing, and where one is left over whose name begins with none of `ignored`.
    """
    parameters, used = {}, set()
    for path, (pattern, turn) in table.items():
        names = [pattern.format(layer) for layer in range(num_layers)] if "{}" in pattern else [pattern]
        for name in names:
            require(name in arrays, "array", name, "is not in the checkpoint", f"near: {_near(name, arrays)}")
        used.update(names)
        ours = [turn(np.asarray(arrays[name], np.float32)) for name in names]
        parameters[path] = np.stack(ours) if "{}" in pattern else ours[0]
    left = sorted(name for name in set(arrays) - used if not name.startswith(ignored or "\0"))
    require(not left, "arrays", left, "have no place in our model", "pass the arrays of the module alone")
    return parameters


def fill(module: nnx.Module, parameters: Mapping[str, np.ndarray]) -> None:
    """Sets every parameter of `module`; raises `CallerError` unless `parameters` has each of them in its shape."""
    ours = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    missing, unknown = sorted(ours.keys() - parameters.keys()), sorted(parameters.keys() - ours.keys())
    require(not missing, "parameters", missing, "are missing")
    require(not unknown, "parameters", unknown, "are not of this module")
    values = []
    for name, (path, leaf) in ours.items():
        shape = leaf.get_value().shape
        if parameters[name].shape != shape:
            raise CallerError(f"shape of {name}={parameters[name].shape} must be {shape}, that of our configuration")
        values.append((path, leaf.replace(jnp.asarray(parameters[name], jnp.float32))))
    nnx.update(module, nnx.from_flat_state(values))


def same(array: np.ndarray) -> np.ndarray:
    """A norm, a bias or a table: as it is."""
    return array


def transposed(array: np.ndarray) -> np.ndarray:
    """A PyTorch linear layer's [out, in] as our [in, out]."""
    return array.T


def into_heads(num_heads: int) -> Turn:
    """A PyTorch projection [heads * head_dim, in] as our [in, heads, head_dim]."""
    return lambda array: array.T.reshape(array.shape[1], num_heads, -1)


def out_of_heads(num_heads: int) -> Turn:
    """A PyTorch projection [out, heads * head_dim] as our [heads, head_dim, out]."""
    return lambda array: array.T.reshape(num_heads, -1, array.shape[0])


def norm_pair(path: str, name: str) -> Table:
    """Scale and bias of a LayerNorm of ours at `path`, called `name` by PyTorch."""
    return {f"{path}.scale": (f"{name}.weight", same), f"{path}.bias": (f"{name}.bias", same)}


def linear_pair(path: str, name: str, turn: Turn) -> Table:
    """Matrix and bias of a linear layer of ours at `path`, called `name` by PyTorch."""
    return {f"{path}.weight": (f"{name}.weight", turn), f"{path}.bias": (f"{name}.bias", same)}


def count_layers(arrays: Arrays, pattern: str) -> int:
    """Returns how many layers, from 0 on, have the parameter of `pattern`."""
    return next(layer for layer in range(len(arrays) + 1) if pattern.format(layer) not in arrays)


def _near(name: str, arrays: Arrays) -> str:
    return ", ".join(difflib.get_close_matches(name, arrays, cutoff=0.0)) or "none"
