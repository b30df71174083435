"""What is set before JAX starts."""

import glob
import importlib.util
import os

import pytest

from gpt4moe import process


@pytest.mark.parametrize(
    ("installed", "chips", "platforms", "expected"),
    [
        (["libtpu"], [], None, "cpu"),
        (["libtpu"], ["/dev/vfio/0"], None, None),
        (["libtpu", "jax_cuda13_plugin"], [], None, None),
        ([], [], None, None),
        (["libtpu"], [], "tpu", "tpu"),
    ],
    ids=["compiler alone", "a TPU", "a GPU", "nothing", "asked for"],
)
def test_no_tpu_is_looked_for_where_libtpu_only_compiles(monkeypatch, installed, chips, platforms, expected):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(glob, "glob", lambda pattern: [chip for chip in chips if "vfio" in pattern])
    environment = {} if platforms is None else {"JAX_PLATFORMS": platforms}
    monkeypatch.setattr(os, "environ", environment)
    process.quiet(None)
    assert environment.get("JAX_PLATFORMS") == expected
