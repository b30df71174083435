"""A product of rows with a matrix of int8 for this machine's CPU, made with its C++ compiler when it is first needed.

XLA:CPU packs a matrix of integers anew in every product, which takes longer than the product. `int8_product.cc` reads
one that was packed once. It is compiled against the headers of the installed jaxlib and kept in the user's cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
import warnings

import jax
import jax.numpy as jnp
import jaxlib
from jaxtyping import Float, Float32, Int8, UInt8

from gpt4moe.types import Array

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
# No processor exceptions or errno: roundings of many entries at a time. Warnings would be of jaxlib's headers.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-w", "-shared", "-fPIC")
TARGET = "gpt4moe_int8_product"
COLUMNS, QUAD = 16, 4  # of a panel, see the source
# A sum of more products of 255 and 127 does not fit into int32.
MOST_SUMMED = 2**31 // (255 * 127)


@functools.cache
def is_available() -> bool:
    """Whether decoding multiplies so here: on a CPU with AVX-512 VNNI and a C++ compiler.

    Warns where the compiler fails.
    """
    if jax.default_backend() != "cpu" or "avx512_vnni" not in _processor().split() or compiler() is None:
        return False
    try:
        register()
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(f"int8 decodes slowly: {SOURCE.name} does not compile: {said.strip()[-300:]}", stacklevel=2)
        return False
    return True


@functools.cache
def register() -> None:
    """Compiles the product, unless this machine has, and tells XLA of it.

    Raises `OSError` or `subprocess.CalledProcessError` where that fails.
    """
    made = (SOURCE.read_text(), *FLAGS, jaxlib.__version__, _processor())
    name = hashlib.sha256("\0".join(made).encode()).hexdigest()[:16]
    library = _cache() / f"int8_product-{name}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            fresh = pathlib.Path(folder) / library.name
            words = [compiler() or "c++", *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(fresh)]
            subprocess.run(words, check=True, capture_output=True, text=True)
            fresh.replace(library)  # others may be doing the same
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(ctypes.CDLL(str(library)).Int8Product), platform="cpu")


def compiler() -> str | None:
    """The C++ compiler of this machine, $CXX or c++; None where there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def packed(values_JI: Int8[Array, "J I"]) -> UInt8[Array, "P Q 64"]:
    """Returns a matrix in panels of 16 columns, as the source says."""
    num_columns, num_inner = values_JI.shape
    padding = ((0, -num_columns % COLUMNS), (0, -num_inner % QUAD))
    shifted_JI = jnp.pad(values_JI.astype(jnp.int16), padding) + 128
    panels = shifted_JI.astype(jnp.uint8).reshape(-1, COLUMNS, shifted_JI.shape[1] // QUAD, QUAD)
    return panels.swapaxes(1, 2).reshape(len(panels), -1, COLUMNS * QUAD)


def unpacked(panels_PQB: UInt8[Array, "P Q 64"], num_columns: int, num_inner: int) -> Int8[Array, "J I"]:
    """The inverse of `packed`."""
    panels = panels_PQB.reshape(*panels_PQB.shape[:2], COLUMNS, QUAD).swapaxes(1, 2)
    shifted_JI = panels.reshape(len(panels) * COLUMNS, -1)[:num_columns, :num_inner]
    return (shifted_JI.astype(jnp.int16) - 128).astype(jnp.int8)


def multiply(
    x_UI: Float[Array, "U I"], panels_PQB: UInt8[Array, "P Q 64"], scale_J: Float32[Array, " J"]
) -> Float32[Array, "U J"]:
    """Returns rows, rounded as `gpt4moe.infer.matrix.quantized_rows` rounds, times a packed matrix and its scales."""
    result = jax.ShapeDtypeStruct((len(x_UI), len(scale_J)), jnp.float32)
    return jax.ffi.ffi_call(TARGET, result)(x_UI.astype(jnp.float32), panels_PQB, scale_J)


@functools.cache
def _processor() -> str:
    """What the kernel says of this processor's instructions; programs are kept apart by it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _cache() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "gpt4moe"
