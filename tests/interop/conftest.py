"""Products in full float32 for what is compared with outputs of other frameworks."""

import jax
import pytest


@pytest.fixture
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield
