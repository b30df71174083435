"""The Perceiver resampler: what it reads, what it must not, what its embeddings do; gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.check import CallerError
from gpt4moe.config.rules import ShardingRules
from gpt4moe.config.vision import ResamplerConfig
from gpt4moe.model.resampler import Resampler
from tests.model.slow import relative_difference

PLAIN = ResamplerConfig(num_latents=4, num_layers=2, num_heads=2, hidden_dim=24)
FULL = dataclasses.replace(PLAIN, head_dim=6, qk_norm=True, max_frames=3, max_images=2, activation="relu")
DIM = 16


@functools.cache
def _resampler(config, dtype="float32"):
    return Resampler(config, DIM, dtype, nnx.Rngs(0))


@nnx.jit
def _latents(resampler, x, valid=None):
    return resampler(x, valid)


def _features(frames=3, patches=5):
    return jax.random.normal(jax.random.key(1), (2, 2, frames, patches, DIM))


@pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 3e-2)])
def test_as_many_latents_whatever_the_features(config, dtype, tolerance):
    for x in (_features(), _features(frames=1, patches=9)):
        got = _latents(_resampler(config, dtype), x)
        assert got.shape == (2, 2, config.num_latents, DIM) and got.dtype == jnp.dtype(dtype)
        assert relative_difference(got.astype(jnp.float32), _latents(_resampler(config), x)) < tolerance


@pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "full"])
def test_patches_of_a_frame_are_a_set_and_frames_only_where_they_have_no_embedding(config):
    x, order = _features(), jnp.array([3, 0, 4, 2, 1])
    want = _latents(_resampler(config), x)
    np.testing.assert_allclose(_latents(_resampler(config), x[:, :, :, order]), want, rtol=1e-4, atol=1e-5)
    moved = relative_difference(_latents(_resampler(config), x[:, :, ::-1]), want)
    assert moved > 1e-2 if config.max_frames else moved < 1e-5


def test_an_image_does_not_see_another_but_knows_its_place():
    x = _features()
    changed = x.at[:, 0].set(0.0)
    before, after = (np.asarray(_latents(_resampler(FULL), y)) for y in (x, changed))
    np.testing.assert_allclose(before[:, 1], after[:, 1], atol=1e-6)
    swapped = np.asarray(_latents(_resampler(FULL), x[:, ::-1]))[:, ::-1]
    assert relative_difference(swapped, before) > 1e-2
    without = dataclasses.replace(FULL, max_images=0)
    before, swapped = (np.asarray(_latents(_resampler(without), y)) for y in (x, x[:, ::-1]))
    np.testing.assert_allclose(swapped[:, ::-1], before, atol=1e-5)


@pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "full"])
def test_an_invalid_frame_is_as_if_it_were_not_there(config):
    x = _features()
    valid = jnp.ones((2, 2, 3), bool).at[:, :, 2].set(False)
    got = _latents(_resampler(config), x.at[:, :, 2].set(50.0), valid)
    np.testing.assert_allclose(got, _latents(_resampler(config), x[:, :, :2]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        _latents(_resampler(config), x, jnp.ones((2, 2, 3), bool)), _latents(_resampler(config), x), atol=1e-5
    )


def test_an_image_of_invalid_frames_gives_numbers_and_no_gradient():
    x, valid = _features(), jnp.ones((2, 2, 3), bool).at[0, 1].set(False)

    @jax.jit
    def loss(x):
        return jnp.sum(_resampler(FULL)(x, valid) ** 2 * jnp.arange(DIM))

    gradient = jax.grad(loss)(x)
    assert np.isfinite(loss(x)) and np.isfinite(gradient).all()
    assert not np.any(gradient[0, 1]) and np.any(gradient[0, 0])


def test_latents_read_each_other():
    """A latent that changes is read by the others in the first layer already."""
    config = dataclasses.replace(PLAIN, num_layers=1)
    resampler = Resampler(config, DIM, "float32", nnx.Rngs(0))
    before = np.asarray(_latents(resampler, _features()))
    resampler.latents[...] = resampler.latents[...].at[0].multiply(-1.0)
    after = np.asarray(_latents(resampler, _features()))
    assert np.abs(before[:, :, 1:] - after[:, :, 1:]).max() > 1e-3


def test_gradients_reach_every_parameter():
    weights = jax.random.normal(jax.random.key(2), (2, 2, FULL.num_latents, DIM))

    @nnx.jit
    def gradients(resampler):
        return nnx.grad(lambda resampler: jnp.sum(resampler(_features()) * weights))(resampler)

    for path, gradient in nnx.to_flat_state(gradients(_resampler(FULL))):
        if path != ("blocks", "key_norm", "bias"):  # added to every key: softmax does not see it
            norms = np.linalg.norm(np.asarray(gradient.get_value()).reshape(len(gradient.get_value()), -1), axis=1)
            assert (norms > 1e-5).all(), path


def test_every_parameter_names_dims_of_the_table():
    for path, leaf in nnx.to_flat_state(nnx.state(_resampler(FULL))):
        axes = leaf.get_metadata()["logical_axes"]
        assert len(axes) == leaf.get_value().ndim, path
        assert (axes[0] == "vision_layers") == (path[0] == "blocks")
        for dim in axes:
            ShardingRules().axes_of(dim)


def test_more_frames_or_images_than_embeddings_are_refused():
    with pytest.raises(CallerError, match=r"max_frames=3 must be at least the batch's 4"):
        _resampler(FULL)(_features(frames=4))
    with pytest.raises(CallerError, match=r"max_images=2 must be at least the batch's 3"):
        _resampler(FULL)(jnp.ones((1, 3, 1, 5, DIM)))
