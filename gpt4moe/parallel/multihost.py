"""Several processes as one job: joining, leaving, and what they must agree on; on one process all of it does nothing.

Host-side agreements go through the coordinator's key-value store, not through device collectives: they may wait for
hours (tokenising), and the watch ends the job where a process is gone.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import dataclasses
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed

from gpt4moe.config.check import CallerError, one_line, require
from gpt4moe.parallel.cluster import Cluster
from gpt4moe.parallel.muster import JOIN_SECONDS, muster
from gpt4moe.parallel.watch import FAULT, Watch

# The watch of the job that this process is part of.
_WATCH: contextvars.ContextVar[Watch | None] = contextvars.ContextVar("watch", default=None)
GOES_ON = "the same command goes on from the last checkpoint"
# A barrier has no time limit of its own: whoever waits in it is freed or ended by the watch.
BARRIER_MS = 7 * 24 * 3600 * 1000


@contextlib.contextmanager
def job(
    cluster: Cluster | None,
    *,
    prefix: str,
    heartbeat_seconds: int,
    stall_seconds: int,
    explain: Callable[[BaseException], int],
) -> Iterator[None]:
    """Makes this process part of `cluster` for the time of the block; None: it is alone.

    An error inside is told to the other processes and ends this one: `explain` prints it and gives the exit code. The
    block of a process that finishes lasts until all have. `heartbeat_seconds` of silence of one process end all, and so
    do `stall_seconds` in which one lives but does not `mark` that its work goes on.
    """
    if cluster is None:
        yield
        return
    _keep_stdout_ours()
    joined: list[int] = []
    with _explained_abort(cluster, prefix, joined):
        _join(cluster, heartbeat_seconds, prefix)
        joined.append(cluster.process_id)
        client = distributed.global_state.client
        limits = {"silence": heartbeat_seconds, "stall": stall_seconds}
        watch = Watch(client, cluster.process_id, cluster.num_processes, prefix=prefix, **limits)
        watch.start()
        _WATCH.set(watch)
        try:
            yield
            wait_for_all("done")
        except BaseException as error:
            _leave(error, watch, explain)
        watch.stop()
        jax.distributed.shutdown()


def mark(place: str, *, waiting: bool = False) -> None:
    """Says that the work of this process has come to `place`; see `job`. Costs nothing, alone or not."""
    watch = _WATCH.get()
    if watch is not None:
        watch.mark(place, waiting=waiting)


def wait_for_all(name: str) -> None:
    """Returns when every process has come here; `name` is used once in a job."""
    if jax.process_count() > 1:
        mark(f"the wait for {name}", waiting=True)
        distributed.global_state.client.wait_at_barrier(f"gpt4moe/{name}", BARRIER_MS)
        mark(name)


@contextlib.contextmanager
def first_process_first(name: str) -> Iterator[None]:
    """The block on process 0, then on the others: what the first one leaves on a shared disk the others find.

    It may take as long as it takes: no stall is seen in it.
    """
    if jax.process_index():
        wait_for_all(name)
    mark(name, waiting=True)
    yield
    if not jax.process_index():
        wait_for_all(name)


def require_same(name: str, value: Any) -> None:
    """Raises `CallerError` where the JSON-able `value` is not that of process 0; `name` is used once in a job."""
    if jax.process_count() == 1:
        return
    client, key = distributed.global_state.client, f"gpt4moe/same/{name}"
    if jax.process_index() == 0:
        client.key_value_set(key, repr(value))
        return
    mark(f"the wait for process 0's {name}", waiting=True)
    first = client.blocking_key_value_get(key, BARRIER_MS)
    mark(name)
    constraint = f"of process {jax.process_index()} differs from {first} of process 0"
    require(repr(value) == first, name, value, constraint, "start every process with the same flags, files and workdir")


@dataclasses.dataclass(frozen=True)
class RowGroup:
    """The part of every microbatch's rows that a process supplies: the `index`-th of `count` equal ones."""

    index: int
    count: int


def row_group(
    microbatches: jax.ShapeDtypeStruct,
    process: int | None = None,
    process_of: Callable[[jax.Device], int] = lambda device: device.process_index,
) -> RowGroup:
    """Which rows of `microbatches` [microbatches, B, T] lie on the devices of `process` (None: this one).

    Processes that hold the same rows, being other stages or other shards of a layer, are of one group and must
    supply the same rows. Raises `CallerError` where a process has no device in the mesh, or holds a part of a group.
    """
    process = jax.process_index() if process is None else process
    num_rows, mesh = microbatches.shape[1], microbatches.sharding.mesh
    held: dict[int, set] = {}
    for device, (_, rows, *_) in microbatches.sharding.devices_indices_map(microbatches.shape).items():
        held.setdefault(process_of(device), set()).add(rows.indices(num_rows)[:2])
    used = {axis: size for axis, size in mesh.shape.items() if size > 1}
    require(process in held, "MESH", used, f"lies on {mesh.size} devices, none of them of process {process}", _SPREAD)
    groups = sorted({tuple(sorted(rows)) for rows in held.values()})
    pieces = [piece for group in groups for piece in group]
    even = len(set(pieces)) == len(pieces) and len({len(group) for group in groups}) == 1
    require(even, "MESH", used, "gives processes overlapping parts of the rows", _WHOLE)
    return RowGroup(groups.index(tuple(sorted(held[process]))), len(groups))


_SPREAD = 'give a MESH over the devices of all processes, e.g. {"fsdp": -1}'
_WHOLE = "let the devices of a process divide, or be divided by, tensor * context and what follows the row axes"


def _join(cluster: Cluster, heartbeat_seconds: int, prefix: str) -> None:
    """Raises as `muster` does; JAX itself would end the process with a stack trace."""
    muster(cluster, lambda line: print(f"{prefix}{line}", file=sys.stderr, flush=True))
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # A CPU program from the cache has the communicators of the process that compiled it: another one that runs it
        # exchanges messages of wrong sizes with its neighbours (jax 0.10.2).
        jax.config.update("jax_enable_compilation_cache", False)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        local_device_ids=cluster.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=JOIN_SECONDS,
        heartbeat_timeout_seconds=max(100, 3 * heartbeat_seconds),  # ours comes first, and says more
    )


def _answers(cluster: Cluster) -> bool:
    try:
        with socket.create_connection(cluster.address, timeout=2):
            return True
    except OSError:
        return False


def _leave(error: BaseException, watch: Watch, explain: Callable[[BaseException], int]) -> None:
    """Ends this process for `error`: a normal exit would wait for processes that may be gone."""
    if _comes_from_jax(error):  # a collective breaks when another process dies: that one is the reason, if it is gone
        watch.await_verdict()
    watch.take_over()
    try:
        code = explain(error)
    except BaseException:
        traceback.print_exc()
        code = FAULT
    sys.stdout.flush()
    sys.stderr.flush()
    watch.tell_failure(code, one_line(error))
    os._exit(code)


def _comes_from_jax(error: BaseException | None) -> bool:
    if error is None or isinstance(error, CallerError):
        return False
    return isinstance(error, jax.errors.JaxRuntimeError) or _comes_from_jax(error.__cause__)


def _keep_stdout_ours() -> None:
    """Points descriptor 1 to nowhere and `sys.stdout` to what it was: XLA's collectives greet there from C++."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)


@contextlib.contextmanager
def _explained_abort(cluster: Cluster, prefix: str, joined: list[int]) -> Iterator[None]:
    """JAX aborts, from a thread of its own, the moment that the coordinator is gone: the last word is then ours.

    It also does where one goes while all join; `joined` is empty until then. A handler of Python's would wait
    for the main thread, which waits for a collective; this one runs in C's place.
    """

    def on_abort(_: int) -> None:
        gone = f"process 0, which coordinates the job at {cluster.coordinator}, is gone"
        few = f"a process of the job at {cluster.coordinator} has gone while all were joining"
        other = f"JAX gave up on the job of {cluster.num_processes} processes, for the reason above"
        line = (other if _answers(cluster) else gone) if joined else few
        print(f"{prefix}{line}{'; ' + GOES_ON if joined else ''}", file=sys.stderr, flush=True)
        os._exit(FAULT)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    previous = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, previous)
