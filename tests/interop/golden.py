"""Outputs of other people's vision modules and their weights (tests/golden/vision/README.md)."""

import functools
import json
import pathlib

import numpy as np

from gpt4moe.interop.arrays import load_arrays

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "vision"
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@functools.cache
def golden(name):
    """Inputs, outputs and gradients of a folder."""
    return load_arrays(str(GOLDEN / name / "golden.npz"))


@functools.cache
def foreign_model(name):
    """config.json and the arrays of a folder's model."""
    return json.loads((GOLDEN / name / "config.json").read_text()), load_arrays(str(GOLDEN / name))
