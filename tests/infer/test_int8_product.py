"""The product with packed int8 against the same in whole numbers, and a decoder that takes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4moe.infer import int8_product
from gpt4moe.infer.decode_weights import unpacked
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.matrix import Matrix, PackedMatrix, make_matrix, pack, times, unpack

from .engine.models import make_model


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if int8_product.compiler() is None:
        pytest.skip("needs a C++ compiler")
    int8_product.register()


@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(1, 512, 2816), (2, 7, 5), (15, 33, 50), (8, 512, 64), (9, 10, 200), (64, 64, 144), (1, 1, 1)],
)
def test_products_are_those_of_whole_numbers(rows, inner, columns):
    draw = np.random.default_rng(rows)
    values_JI = draw.integers(-127, 128, (columns, inner)).astype(np.int8)
    scale_J = draw.uniform(0.1, 1, columns).astype(np.float32)
    x_UI = draw.normal(size=(rows, inner)).astype(np.float32)
    scale_U1 = np.abs(x_UI).max(axis=1, keepdims=True) / np.float32(127)
    sums_UJ = np.rint(x_UI / scale_U1).astype(np.int64) @ values_JI.T.astype(np.int64)
    got = jax.jit(int8_product.multiply)(x_UI, int8_product.packed(jnp.asarray(values_JI)), scale_J)
    np.testing.assert_array_equal(got, sums_UJ.astype(np.float32) * scale_U1 * scale_J)


@pytest.mark.parametrize("shape", [(48, 96), (31, 17)])
def test_a_packed_matrix_multiplies_as_it_did_and_can_be_unpacked(shape):
    matrix = make_matrix(jax.random.normal(jax.random.key(0), shape), jnp.float32, "int8")
    packed = pack(matrix)
    assert isinstance(packed, PackedMatrix)
    x_UI = jax.random.normal(jax.random.key(1), (5, shape[0]))
    np.testing.assert_array_equal(times(x_UI, packed), times(x_UI, matrix))
    back = unpack(packed)
    np.testing.assert_array_equal(back.values_JI, matrix.values_JI)
    np.testing.assert_array_equal(back.scale_J, matrix.scale_J)


def test_rows_without_a_finite_size_have_no_finite_product_and_empty_ones_are_zero():
    packed = pack(make_matrix(jnp.ones((8, 16)), jnp.float32, "int8"))
    x_UI = jnp.ones((4, 8)).at[0, 3].set(jnp.nan).at[1, 5].set(-jnp.inf).at[2].set(0)
    y_UJ = np.asarray(times(x_UI, packed))
    assert not np.isfinite(y_UJ[:2]).any()
    np.testing.assert_array_equal(y_UJ[2], 0)
    np.testing.assert_allclose(y_UJ[3], 8, rtol=1e-6)


def test_other_matrices_stay_as_they_are():
    for given in (None, "fp8"):
        matrix = make_matrix(jnp.ones((8, 16)), jnp.float32, given)
        assert pack(matrix) is matrix and unpack(matrix) is matrix
    stack = make_matrix(jnp.ones((3, 8, 16)), jnp.float32, "int8")
    assert pack(stack) is stack


def test_a_decoder_in_int8_takes_it_where_the_processor_can(monkeypatch):
    model = make_model(64, 32)

    def expert(decoder):
        return decoder.weights.layers[-1].feed_forward.experts[0].in_DJ

    monkeypatch.setattr(int8_product, "is_available", lambda: True)
    packed = Decoder.of(model, quantize="int8")
    assert isinstance(expert(packed), PackedMatrix) and isinstance(packed.weights.unembedding_DV, Matrix)
    assert isinstance(expert(Decoder.of(model)), Matrix)
    monkeypatch.setattr(int8_product, "is_available", lambda: False)
    plain = Decoder.of(model, quantize="int8")
    jax.tree.map(np.testing.assert_array_equal, unpacked(packed.weights), plain.weights)
