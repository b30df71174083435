"""When XLA compiles: never while serving, and once for many processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def forbid_compilation() -> Iterator[None]:
    """A `with` block in which XLA compiles nothing: raises `AssertionError` at its end where it did, by any thread."""
    seconds = []

    def heard(event: str, duration: float, **_: object) -> None:
        if event == COMPILED:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    if seconds:
        raise AssertionError(f"{len(seconds)} programs were compiled, in {sum(seconds):.1f} s")


def keep_programs(folder: str | os.PathLike) -> None:
    """Keeps compiled programs in a folder, small ones too, where the next process finds them."""
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
