"""Tests run on eight emulated CPU devices, always, and check the annotated shapes of what they call."""

import gc
import importlib.metadata
import os
import shutil
import tempfile

# Before the first JAX import: eight devices on one CPU, no GPU or TPU probing. Unoptimised programs, in one piece and
# from the older code generator where jaxlib still has these, compile many times faster: compiling is what tests of tiny
# models wait for.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        *(
            ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
            if importlib.metadata.version("jaxlib") < "0.11"
            else []
        ),
    )
)
os.environ["JAX_PLATFORMS"] = "cpu"
# A worker and the processes its tests start compile a program once.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gpt4moe-programs-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# What schemathesis' engine keeps between runs does not belong into the repository.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "gpt4moe-hypothesis"))

import beartype
import jax
import pytest
from jaxtyping import install_import_hook

SHAPE_CHECKED = ("gpt4moe.model", "gpt4moe.train.loss", "gpt4moe.infer.sampling")


def check_functions(function):
    """`function` with its annotations checked at every call, except the making of a struct.

    JAX also builds structs of shardings, abstract arrays and None where a tree is mapped. A function inside another is
    left alone: it would be decorated anew at every call of the outer one, which is checked itself.
    """
    if function.__name__ == "__init__" or "<locals>" in function.__qualname__:
        return function
    return beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))(function)


# Before the first import of the package, here only: outside pytest annotations are never evaluated.
install_import_hook(SHAPE_CHECKED, f"{__name__}.check_functions")


def pytest_unconfigure():
    """No program outlives the run."""
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_collection_finish():
    """What the imports left stays to the end: the collector looks at it no more, and comes less often for the rest.

    It took a fifth of the time of a worker, whose tests trace programs of many thousands of objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """The compiled programs of a file go with its last test.

    Each takes a few of the 65,530 memory maps that Linux gives a process, some files leave 20,000, and the compilation
    that finds none left ends in a segmentation fault. What refers to itself waits for the collector.
    """
    yield
    jax.clear_caches()
    gc.collect()
