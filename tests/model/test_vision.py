"""The image encoder: bytes and floats, positions, leading tokens, gradients; the activations against their formulas."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.check import CallerError
from gpt4moe.config.rules import ShardingRules
from gpt4moe.config.vision import ACTIVATIONS, EncoderConfig
from gpt4moe.model import layout, vision
from gpt4moe.model.bidirectional import attend_all
from gpt4moe.model.layers import LayerNorm, activation
from gpt4moe.model.rope import rotate
from gpt4moe.model.vision import VisionEncoder, resampled_positions
from tests.model.slow import relative_difference

LEARNED = EncoderConfig(height=12, width=8, patch_size=4, dim=16, num_layers=2, num_heads=2, hidden_dim=24)
ROTARY = dataclasses.replace(
    LEARNED, positions="rotary", class_token=True, num_registers=2, norm_before=True, activation="gelu"
)


@functools.cache
def _encoder(config, remat="none", dtype="float32"):
    return VisionEncoder(config, dtype, remat, nnx.Rngs(0))


@nnx.jit
def _features(encoder, images):
    return encoder(images)


def _bytes(*lead):
    return np.random.default_rng(0).integers(0, 256, (*lead, 12, 8, 3), np.uint8)


def _normalised(images, config):
    return (images / np.float32(255) - np.float32(config.pixel_mean)) / np.float32(config.pixel_std)


@pytest.mark.parametrize("config", [LEARNED, ROTARY], ids=["learned", "rotary"])
@pytest.mark.parametrize("lead", [(3,), (2, 1, 2)])
def test_a_feature_for_each_patch_and_leading_token(config, lead):
    features = _features(_encoder(config), _bytes(*lead))
    assert features.shape == (*lead, config.num_features, config.dim) and features.dtype == jnp.float32
    assert np.isfinite(features).all()


@pytest.mark.parametrize(("high", "wide"), [(12, 2), (3, 8), (6, 4)])
def test_a_patch_need_not_be_square(high, wide):
    """What a patch holds, by hand: its pixels by rows, columns, colours; patches by rows."""
    config = dataclasses.replace(LEARNED, patch_size=high, patch_width=wide)
    rows, columns = config.grid
    assert (rows, columns) == (12 // high, 8 // wide)
    assert _features(_encoder(config), _bytes(1)).shape == (1, rows * columns, config.dim)
    images = np.arange(12 * 8 * 3).reshape(1, 12, 8, 3)
    patches = np.asarray(vision._patches(jnp.asarray(images), high, wide))
    by_hand = [
        images[0, row * high : (row + 1) * high, column * wide : (column + 1) * wide].reshape(-1)
        for row in range(rows)
        for column in range(columns)
    ]
    np.testing.assert_array_equal(patches[0], by_hand)


def test_patches_that_do_not_divide_are_refused():
    with pytest.raises(
        CallerError, match=r"EncoderConfig.width=8 must be a multiple of patch_width \(3\); change width"
    ):
        dataclasses.replace(LEARNED, patch_width=3)
    with pytest.raises(CallerError, match=r"EncoderConfig.height=12 must be a multiple of patch_size \(8\); change"):
        dataclasses.replace(LEARNED, patch_size=8, patch_width=8)


def test_fresh_frames_are_told_apart_by_their_distance_alone():
    config = dataclasses.replace(LEARNED, max_frames=24)
    table = np.asarray(VisionEncoder(config, "float32", "none", nnx.Rngs(0)).frames[...])
    assert table.shape == (24, config.dim) and np.mean(table**2) == pytest.approx(1.0, abs=1e-5)
    alike = table @ table.T / config.dim
    for distance in range(24):
        assert np.ptp(np.diagonal(alike, distance)) < 1e-5
    assert alike[0, 0] == pytest.approx(1.0, abs=1e-5) and np.all(np.diagonal(alike, 1) < 0.95)


def test_more_frames_than_embeddings_are_refused():
    encoder = VisionEncoder(dataclasses.replace(LEARNED, max_frames=2), "float32", "none", nnx.Rngs(0))
    one, two = _features(encoder, np.stack([_bytes(1), _bytes(1)], axis=1))[0]
    assert relative_difference(one, two) > 0.1
    with pytest.raises(CallerError, match=r"frames of an image=3 must be at most EncoderConfig.max_frames \(2\)"):
        _features(encoder, _bytes(1, 3))


def test_bytes_are_normalised_as_the_configuration_says():
    config = dataclasses.replace(LEARNED, pixel_mean=(0.1, 0.5, 0.8), pixel_std=(0.2, 0.3, 0.4))
    images = _bytes(2)
    got, want = (_features(_encoder(config), x) for x in (images, _normalised(images, config).astype(np.float32)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_images_of_a_row_do_not_see_each_other():
    images = _bytes(3)
    changed = images.copy()
    changed[1] = 0
    before, after = (np.asarray(_features(_encoder(LEARNED), x)) for x in (images, changed))
    np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
    assert np.abs(before[1] - after[1]).max() > 1e-2


def test_a_patch_is_the_pixels_of_its_square():
    """Without layers' mixing, what a pixel changes is the feature of its patch: row 5, column 6 is patch 1 * 2 + 1."""
    still = dataclasses.replace(LEARNED, num_layers=1)
    encoder = VisionEncoder(still, "float32", "none", nnx.Rngs(0))
    for linear in (encoder.blocks.output, encoder.blocks.down):
        linear.weight[...] = jnp.zeros_like(linear.weight[...])
    images = _bytes(1)
    changed = images.copy()
    changed[0, 5, 6, 2] ^= 255
    moved = np.abs(_features(encoder, images) - _features(encoder, changed)).max(-1)[0]
    assert np.flatnonzero(moved > 1e-6).tolist() == [3]


@pytest.mark.parametrize("axis", [1, 2], ids=["rows", "columns"])
def test_where_a_patch_stands_matters(axis):
    """Patches moved on by one row or column are other features there; without positions they are the same."""
    images = _bytes(1)
    shifted = np.roll(images, LEARNED.patch_size, axis)

    def changed(encoder):
        config = encoder.config
        here, there = (np.asarray(_features(encoder, x))[:, config.num_leading :] for x in (images, shifted))
        here, there = (x.reshape(1, *config.grid, -1) for x in (here, there))
        return relative_difference(np.roll(here, 1, axis), there)

    assert changed(_encoder(LEARNED)) > 1e-2 and changed(_encoder(ROTARY)) > 1e-2
    placeless = VisionEncoder(LEARNED, "float32", "none", nnx.Rngs(0))
    placeless.positions[...] = jnp.zeros_like(placeless.positions[...])
    assert changed(placeless) < 1e-5


def test_the_row_turns_the_first_quarter_of_a_head_and_the_column_the_second():
    """By one radian a patch in the fastest pair of each; leading tokens are not turned."""
    turn, (rows, columns) = vision.patch_rotation(ROTARY), ROTARY.grid
    angles = np.arctan2(np.asarray(turn.sin), np.asarray(turn.cos))[0]
    assert not angles[: ROTARY.num_leading].any()
    of_patches = angles[ROTARY.num_leading :].reshape(rows, columns, -1)
    fastest = of_patches[..., [0, of_patches.shape[-1] // 2]]
    np.testing.assert_allclose(fastest, np.stack(np.mgrid[:rows, :columns], axis=-1), atol=1e-6)


def test_rotary_positions_are_relative():
    """A query meets equal keys by their distance alone, in rows and in columns, and tells the two apart."""
    turn = vision.patch_rotation(dataclasses.replace(LEARNED, positions="rotary", height=16, width=12))
    q, k = (jax.random.normal(jax.random.key(i), (8,)) for i in (0, 1))
    turned_q, turned_k = (rotate(jnp.broadcast_to(x, (1, 12, 1, 8)), turn)[0, :, 0] for x in (q, k))
    scores = np.asarray(turned_q @ turned_k.T).reshape(4, 3, 4, 3)
    np.testing.assert_allclose(scores[0, 0, 2, 1], scores[1, 1, 3, 2], rtol=1e-5)
    assert abs(scores[0, 0, 2, 1] - scores[0, 0, 1, 2]) > 1e-3


@pytest.mark.parametrize("config", [LEARNED, ROTARY], ids=["learned", "rotary"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_gradients_reach_every_parameter_and_do_not_depend_on_remat(config, remat):
    weights = jax.random.normal(jax.random.key(1), (2, config.num_features, config.dim))

    @nnx.jit
    def gradients(encoder):
        return nnx.grad(lambda encoder: jnp.sum(encoder(jnp.asarray(_bytes(2))) * weights))(encoder)

    got, want = (nnx.to_pure_dict(gradients(_encoder(config, kind))) for kind in (remat, "none"))
    assert relative_difference(got, want) < 1e-5
    for path, gradient in nnx.traversals.flatten_mapping(got, sep=".").items():
        # softmax does not see what is added to every key: the gradient of the keys' bias is zero, but where keys turn
        if path != "blocks.key.bias" or config.positions == "rotary":
            assert np.linalg.norm(gradient) > 1e-3, path


def test_many_layers_in_a_loop_are_the_same_as_few_laid_out(monkeypatch):
    images = _bytes(1)
    want = _features(_encoder(LEARNED), images)
    monkeypatch.setattr(layout, "MOST_UNROLLED", 1)
    got = nnx.jit(lambda encoder: encoder(images))(_encoder(LEARNED))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_near():
    images = _bytes(2)
    got = _features(_encoder(ROTARY, dtype="bfloat16"), images)
    assert got.dtype == jnp.bfloat16
    assert relative_difference(got.astype(jnp.float32), _features(_encoder(ROTARY), images)) < 2e-2


def test_images_of_another_size_are_refused():
    with pytest.raises(CallerError, match=r"\(8, 12\) must be \(12, 8\)"):
        _encoder(LEARNED)(np.zeros((1, 8, 12, 3), np.uint8))


def test_every_parameter_names_dims_of_the_table():
    for path, leaf in nnx.to_flat_state(nnx.state(_encoder(ROTARY))):
        axes = leaf.get_metadata()["logical_axes"]
        assert len(axes) == leaf.get_value().ndim, path
        assert (axes[0] == "vision_layers") == (path[0] == "blocks")
        for dim in axes:
            ShardingRules().axes_of(dim)


@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_positions_are_resampled_by_rows_and_columns(method):
    """A table that grows along rows only grows so in a finer grid, and one of the same grid is as it was."""
    table = jnp.repeat(jnp.arange(3.0), 2)[:, None] * jnp.array([1.0, 2.0])
    np.testing.assert_allclose(resampled_positions(table, (3, 2), (3, 2), method), table, atol=1e-6)
    finer = np.asarray(resampled_positions(table, (3, 2), (6, 4), method)).reshape(6, 4, 2)
    np.testing.assert_allclose(finer, np.broadcast_to(finer[:, :1], finer.shape), atol=1e-6)
    assert (np.diff(finer[:, 0, 0]) > -1e-6).all() and finer[-1, 0, 0] > 1.9
    np.testing.assert_allclose(finer[..., 1], 2 * finer[..., 0], atol=1e-6)
    with pytest.raises(CallerError, match="old_grid"):
        resampled_positions(table, (2, 2), (4, 4))


def test_activations_are_their_formulas():
    x = np.linspace(-3, 3, 13).astype(np.float32)
    erf = np.array([math.erf(value / math.sqrt(2)) for value in x])
    formulas = {
        "gelu": x * (1 + erf) / 2,
        "gelu_tanh": x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        "quick_gelu": x / (1 + np.exp(-1.702 * x)),
        "relu": np.maximum(x, 0),
        "squared_relu": np.maximum(x, 0) ** 2,
    }
    assert set(formulas) == set(ACTIVATIONS)
    for name, want in formulas.items():
        np.testing.assert_allclose(activation(name)(jnp.asarray(x)), want, rtol=1e-5, atol=1e-6)
        assert activation(name)(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    assert relative_difference(formulas["gelu"], formulas["quick_gelu"]) > 1e-3


def test_layer_norm_takes_mean_and_deviation_away():
    norm = LayerNorm(None, 4, 1e-5)
    norm.scale[...], norm.bias[...] = jnp.arange(4.0), jnp.ones(4)
    x = np.array([[1.0, 2.0, 4.0, 9.0]], np.float32)
    want = (x - 4.0) / np.sqrt(np.var(x) + 1e-5) * np.arange(4.0) + 1
    np.testing.assert_allclose(norm(jnp.asarray(x)), want, rtol=1e-5)


def test_attention_equals_a_loop_over_queries():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, n, 2, 4)) for i, n in enumerate((3, 5, 5)))
    valid = np.array([[True, True, False, True, False], [False] * 4 + [True]])

    def loop(q, k, v):
        rows = []
        for b, t, n in np.ndindex(2, 3, 2):
            seen = np.flatnonzero(valid[b])
            weights = jax.nn.softmax(k[b, seen, n] @ q[b, t, n] / 2.0)
            rows.append(weights @ v[b, seen, n])
        return jnp.stack(rows).reshape(2, 3, 2, 4)

    dy = jax.random.normal(jax.random.key(9), (2, 3, 2, 4))
    got, want = (
        jax.value_and_grad(lambda *x, f=f: jnp.sum(f(*x) * dy), (0, 1, 2))(q, k, v)
        for f in (lambda *x: attend_all(*x, jnp.asarray(valid)), loop)
    )
    assert relative_difference(got, want) < 1e-5
