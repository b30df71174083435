"""Save and restore any pytree of arrays, with its shardings and a JSON record of where the run stood.

A checkpoint is the folder `checkpoints/STEP` of a work directory, local or in an object store (`gs://`): `state` holds
every array under its path in the tree (`params.layers.router`), `progress` the JSON record. Arrays are restored to
whatever sharding the caller's abstract tree asks for, so another mesh or number of hosts may read what this one wrote.
Stacks of layers are saved in the order in which the pipeline stages hold them, which the record names (`layer_order`),
and restored in the order that the caller asks for.

A folder gets its name only when it is complete (Orbax renames it, or writes a commit marker in an object store), so
a process killed while saving leaves a folder which readers ignore and the next trainer removes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from orbax.checkpoint import checkpoint_managers

from gpt4moe.config.check import one_line, require
from gpt4moe.config.mesh import NO_SUPERBLOCK, grouped_placement
from gpt4moe.parallel import placement

PyTree = Any

# Stacks of superblocks, and of what is there once for several of them.
STACKED_DIMS = ("layers", "cross_layers")
_LAYER_ORDER = "layer_order"
_HELD_OUT_LOSS = "held_out_loss"
_SHOWN_NAMES = 3
# Room asked for beyond the arrays themselves: indices and metadata. Some failures of a write already begun end in
# tracebacks from TensorStore's threads that nothing can catch, so the margin is wide.
_ROOM_FACTOR, _ROOM_BYTES = 1.1, 2**20


class CheckpointError(OSError):
    """A checkpoint could not be written; the message names the folder, the cause and what still stands."""


class Checkpoints:
    """The checkpoints of one work directory, for the one process that writes them; use as a context manager.

    Keeps the newest `keep_last` and, of those saved with a held-out loss, the best `keep_best`. Saving is
    asynchronous: the arrays are copied before `save` returns, so the caller may donate them at once, and the files
    are written behind. A write that failed behind raises `CheckpointError` in the next `save`, `check` or `close`.
    """

    def __init__(self, workdir: epath.PathLike, *, keep_last: int = 2, keep_best: int = 1) -> None:
        self._directory = checkpoint_directory(workdir)
        policies = [checkpoint_managers.LatestN(keep_last), _best(keep_best)]
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            save_root_metadata=False,
        )
        # Orbax logs the traceback of every failed write several times over, from threads that may outlive this object;
        # the failure itself reaches the caller.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_not_from_orbax)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(
        self,
        step: int,
        state: PyTree,
        progress: Mapping,
        *,
        held_out_loss: float | None = None,
        layer_order: Sequence[int] | None = None,
    ) -> None:
        """Begins to save `state` and the JSON-able `progress` as `step`; a step that is already there is left alone.

        `layer_order`: which superblock each row of a stack holds, as `MeshConfig.placement` gives it (None: in order).
        """
        if step in self._manager.all_steps():
            return
        progress = progress if layer_order is None else {**progress, _LAYER_ORDER: list(layer_order)}
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(_by_path(state)), progress=ocp.args.JsonSave(progress))
        metrics = None if held_out_loss is None else {_HELD_OUT_LOSS: float(held_out_loss)}
        with self._explained():
            _require_room(self._directory, state)
            self._manager.save(step, args=items, metrics=metrics, force=True)

    def check(self) -> None:
        """Raises `CheckpointError` if a write that was behind has failed."""
        with self._explained():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits until everything begun is written; raises `CheckpointError` if that fails."""
        with self._explained():
            self._manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            # An error on its way out must not be replaced by one of the write behind it.
            with contextlib.suppress(CheckpointError) if kind else contextlib.nullcontext():
                self.wait()
        finally:
            with contextlib.suppress(Exception):
                self._manager.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            steps = saved_steps(self._directory.parent)
            stands = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier checkpoint"
            raise CheckpointError(
                f"could not save a checkpoint in {self._directory}: {_cause(error)}; {stands}; "
                "make room and give the same command again to go on from there"
            ) from error


@dataclasses.dataclass(frozen=True)
class Unmade:
    """An array that `make` gives when it is written, and that nobody holds before or after."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Writes each `Unmade` array before the next one is made, where Orbax would have them all at once."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Sequence[Unmade], infos: Sequence, args: Sequence | None = None) -> list:
        args = args or [ocp.SaveArgs()] * len(values)
        for value, info, arg in zip(values, infos, args, strict=True):
            for written in await super().serialize([value.make()], [info], [arg]):
                written.result()
        return []


def save_one_by_one(workdir: epath.PathLike, step: int, arrays: Mapping[str, Unmade], progress: Mapping) -> None:
    """Saves `arrays` by their dotted paths, and `progress`, as `step`, with no more than one of them in memory.

    Raises `CheckpointError` where that fails; what was begun is never taken for a checkpoint.
    """
    directory = checkpoint_directory(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    # Orbax warns where its own kind of array is not among those it may meet.
    kinds = (Unmade, _OneByOne()), (jax.Array, ocp.type_handlers.ArrayHandler())
    registry = ocp.type_handlers.create_type_handler_registry(*kinds)
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        "progress": ocp.JsonCheckpointHandler(),
    }
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(dict(arrays)), progress=ocp.args.JsonSave(progress))
    try:
        for left in directory.glob(f"{step}.orbax-checkpoint-tmp*"):  # of a process that was killed here
            left.rmtree()
        _require_bytes(directory, sum(array.nbytes for array in arrays.values()))
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as writer:
            writer.save(directory / str(step), items)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"could not save a checkpoint in {directory}: {_cause(error)}") from error


def checkpoint_directory(workdir: epath.PathLike) -> epath.Path:
    """Where the checkpoints of a work directory are."""
    path = epath.Path(workdir)
    return (path if "://" in str(workdir) else path.expanduser().resolve()) / "checkpoints"


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """The steps of the complete checkpoints of a work directory, oldest first; empty if it has none."""
    directory = checkpoint_directory(workdir)
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.exists() else []


def latest_step(workdir: epath.PathLike) -> int:
    """The newest complete checkpoint of a work directory; raises `CallerError` if it has none."""
    steps = saved_steps(workdir)
    require(bool(steps), "workdir", str(workdir), "has no complete checkpoint", "train there first")
    return steps[-1]


def restore_progress(workdir: epath.PathLike, step: int) -> dict:
    """The JSON record saved with a step."""
    with _reader() as reader:
        items = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return reader.restore(checkpoint_directory(workdir) / str(step), items)["progress"]


def restore(
    workdir: epath.PathLike, step: int, abstract: PyTree, *, layer_order: Sequence[int] | None = None
) -> PyTree:
    """Arrays of a step in the structure, dtypes and shardings of `abstract`, which may be a part of what was saved.

    `abstract` has `jax.ShapeDtypeStruct` leaves; one without a sharding is restored to the default device. To read
    the parameters alone pass `{"params": abstract_params}`. Stacks of layers, the `nnx.Variable`s whose first logical
    dim is one of `STACKED_DIMS`, come in `layer_order` (None: in counting order), whatever order they were saved in.

    Raises `CallerError` as `check_shapes` does.
    """
    check_shapes(workdir, step, abstract, layer_order=layer_order)
    path, held = checkpoint_directory(workdir) / str(step), _saved_order(workdir, step)
    wanted = {name: _with_sharding(leaf) for name, leaf in _by_path(abstract).items()}
    orders = {name: _orders(held, layer_order, wanted[name].shape[0]) for name in _stacked(abstract)}
    moved = {name: order for name, order in orders.items() if order[0] != order[1]}
    read = wanted | {name: _with_rows(wanted[name], len(held)) for name, (held, _) in moved.items()}
    with _reader() as reader:
        arguments = ocp.checkpoint_utils.construct_restore_args(read)
        for name in moved:
            arguments[name] = dataclasses.replace(arguments[name], strict=False)  # rows beyond the saved ones are 0
        state = ocp.args.PyTreeRestore(read, restore_args=arguments, partial_restore=True)
        arrays = reader.restore(path, ocp.args.Composite(state=state))["state"]
    for name, order in moved.items():  # one by one: each takes the place of what it is made from
        arrays[name] = placement.reorder(arrays[name], *order).block_until_ready()
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])


def check_shapes(
    workdir: epath.PathLike,
    step: int,
    abstract: PyTree,
    *,
    layer_order: Sequence[int] | None = None,
    setting: str | None = None,
) -> None:
    """Raises `CallerError` where a step lacks an array of `abstract` or has it in another shape.

    Stacks of layers are compared by the layers they hold, in whatever order and with whatever padding. `setting`: what
    named the work directory, where that is not the run's own.
    """
    path, saved = checkpoint_directory(workdir) / str(step), _saved_arrays(workdir, step)
    stacked, held = _stacked(abstract), _saved_order(workdir, step)
    wanted = {name: _shape(leaf, layer_order if name in stacked else None) for name, leaf in _by_path(abstract).items()}
    there = {name: _shape(saved[name], held if name in stacked else None) for name in wanted if name in saved}
    wrong = [f"{name} is missing" for name in wanted if name not in there]
    wrong += [
        f"{name} has shape {there[name]}, the model {shape}"
        for name, shape in wanted.items()
        if name in there and there[name] != shape
    ]
    more = f" and {len(wrong) - _SHOWN_NAMES} more" if len(wrong) > _SHOWN_NAMES else ""
    constraint = f"is of another model: {', '.join(wrong[:_SHOWN_NAMES])}{more}"
    mend = f"use the configuration it was trained with, or another {setting or 'workdir'}"
    require(not wrong, setting or "checkpoint", str(workdir if setting else path), constraint, mend)


def saved_names(workdir: epath.PathLike, step: int) -> list[str]:
    """The dotted path of every array of a step."""
    return list(_saved_arrays(workdir, step))


def saved_dtypes(workdir: epath.PathLike, step: int) -> dict[str, np.dtype]:
    """The dtype of every array of a step by its dotted path."""
    return {name: np.dtype(array.dtype) for name, array in _saved_arrays(workdir, step).items()}


def _saved_arrays(workdir: epath.PathLike, step: int) -> Mapping[str, Any]:
    """Shapes of the arrays of a step by their paths."""
    with _reader() as reader:
        return reader.metadata(checkpoint_directory(workdir) / str(step)).item_metadata["state"].tree


def _saved_order(workdir: epath.PathLike, step: int) -> tuple[int, ...] | None:
    """The order of the saved stacks of layers; None for counting order."""
    order = restore_progress(workdir, step).get(_LAYER_ORDER)
    return None if order is None else tuple(order)


def _stacked(tree: PyTree) -> set[str]:
    """Names of the stacks of layers."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in leaves
        if isinstance(leaf, nnx.Variable) and (leaf.get_metadata().get("logical_axes") or (None,))[0] in STACKED_DIMS
    }


def _require_room(directory: epath.Path, state: PyTree) -> None:
    """Raises `OSError` before anything is written where a local disk has less room than this host's arrays take."""
    shards = (shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards)
    _require_bytes(directory, sum(shard.data.nbytes for shard in shards if shard.replica_id == 0))


def _require_bytes(directory: epath.Path, num_bytes: int) -> None:
    """Raises `OSError` where `_require_room` would, of a host with arrays of so many bytes."""
    if "://" in os.fspath(directory):
        return
    needed = _ROOM_FACTOR * num_bytes + _ROOM_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(f"No space left on device ({needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free)")


def _by_path(tree: PyTree) -> dict[str, Any]:
    """Leaves under their dotted paths, so that the file format knows no class of any library."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in leaves]
    assert len(set(names)) == len(names), "two leaves of a tree share a path"
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def _orders(held: tuple | None, wanted: Sequence | None, num_rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The saved and the wanted order of a stack that is to have `num_rows`, in full."""
    each = len(wanted) // num_rows if wanted else _num_superblocks(held) // num_rows if held else 1
    wanted = tuple(range(num_rows)) if wanted is None else grouped_placement(wanted, each)
    return grouped_placement(held, each) if held else tuple(range(_num_superblocks(wanted))), wanted


def _shape(leaf: Any, layer_order: Sequence[int] | None) -> tuple[int, ...]:
    """The shape of an array, of a stack in some order the shape that it has in counting order."""
    if layer_order is None:
        return tuple(leaf.shape)
    each, rest = divmod(len(layer_order), leaf.shape[0])
    assert not rest, "a stack and its layer_order differ in length"
    return (_num_superblocks(layer_order) // each, *leaf.shape[1:])


def _num_superblocks(layer_order: Sequence[int]) -> int:
    return sum(superblock != NO_SUPERBLOCK for superblock in layer_order)


def _with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _with_rows(leaf: jax.ShapeDtypeStruct, num_rows: int) -> jax.ShapeDtypeStruct:
    """`leaf` with another number of rows, and some more where its sharding would not divide them."""
    shape = (placement.padded_rows(num_rows, leaf.sharding), *leaf.shape[1:])
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)


def _reader() -> ocp.Checkpointer:
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def _best(count: int) -> checkpoint_managers.BestN:
    return checkpoint_managers.BestN(
        get_metric_fn=lambda metrics: metrics[_HELD_OUT_LOSS],
        reverse=True,  # Orbax keeps the last of the sorted, and the best loss is the lowest.
        n=count,
        keep_checkpoints_without_metrics=False,
    )


def _cause(error: BaseException) -> str:
    """The operating system's own words where the error holds them, else its first line."""
    text = str(error)
    known = re.search(r"No space left on device( \(.*\))?|File too large|Permission denied|Disk quota exceeded", text)
    return known[0] if known else one_line(error)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname and "orbax" not in record.getMessage()
