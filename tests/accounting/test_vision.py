"""What images cost, against the arrays of real models: bytes kept and fed, parameters that a token meets, its FLOPs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.accounting import flops, memory, parameters, vision
from gpt4moe.config.data import ImageConfig
from gpt4moe.data.image_rows import ImageDecoder
from gpt4moe.model.transformer import Transformer
from tests.model.test_cross_attention import ENCODER, TINY, VARIANTS

# What tokens do not meet in a block of cross-attention: keys and values are of images; the rest is no matrix product.
NOT_OF_TOKENS = ("key", "value", "attention_gate", "feed_forward_gate")


def _shapes(config):
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["before every second", "grouped heads", "resampler", "frames"])
def test_the_bytes_of_an_image_in_the_cache_are_those_of_its_keys_and_values(name, dtype, frames):
    config = dataclasses.replace(VARIANTS[name], compute_dtype=dtype)

    def see(pixels):
        nothing = jnp.zeros((1, 1), jnp.int32)
        model = Transformer(config, rngs=nnx.Rngs(0))
        return model.keep(model.look(pixels, jnp.ones((1, 1, frames), bool), nothing, nothing))

    if frames > 1 and name != "frames":
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, encoder=_of_frames(frames)))
    kept = jax.eval_shape(see, jax.ShapeDtypeStruct((1, 1, frames, 8, 12, 3), jnp.uint8))
    size = sum(part.size * part.dtype.itemsize for part in (kept.keys, kept.values))
    assert size == vision.cache_bytes_per_image(config, memory.DTYPE_BYTES[dtype], frames)


def _of_frames(frames):
    return dataclasses.replace(ENCODER, max_frames=frames)


@pytest.mark.parametrize("frames", [1, 3])
def test_the_bytes_fed_are_those_of_the_batch(frames):
    images = ImageConfig(ENCODER.height, ENCODER.width, per_row=5, frames=frames, workers=0)
    fed = ImageDecoder(images, lambda source: None).begin([], num_rows=2).images_BIFHW3
    assert fed.nbytes == 2 * 5 * vision.input_bytes_per_image(ENCODER, frames)


@pytest.mark.parametrize(
    "name", ["before every second", "leading and dense", "resampler", "layer norms, vector gates", "spelling"]
)
def test_what_a_token_meets_of_the_blocks_that_read(name):
    """All of cross-attention is active, none of encoder and resampler; its matrices of tokens are multiplied."""
    config = VARIANTS[name]
    text = dataclasses.replace(config, vision=None)
    leaves = nnx.to_flat_state(nnx.split(_shapes(config).cross_attention)[1])
    sizes = {tuple(map(str, path)): int(np.prod(leaf.get_value().shape)) for path, leaf in leaves}
    added = parameters.count_active(config) - parameters.count_active(text)
    assert added == sum(sizes.values())
    met = sum(
        size
        for path, size in sizes.items()
        if path[0] not in NOT_OF_TOKENS and not any("norm" in part for part in path)
    )
    of_token = flops.forward_flops_per_token(config) - flops.forward_flops_per_token(text)
    assert of_token == 2 * met > 0
    assert flops.train_flops_per_token(config) - flops.train_flops_per_token(text) == 3 * of_token


def test_frames_are_encoded_each_and_read_together():
    """Without a resampler all is done once for each; with one the latents' own keys, queries and values are not."""
    assert vision.flops_per_image(TINY, 3) == 3 * vision.flops_per_image(TINY)
    config = VARIANTS["resampler"]
    resampler, dim, features = config.vision.resampler, ENCODER.dim, ENCODER.num_features
    width = dim  # of all heads
    # A frame more: itself, its keys and values, and a score and a weighted value with each latent.
    cross = config.vision.cross_attention
    frame = vision.flops_per_image(TINY)
    frame -= config.num_cross_attention_layers * 2 * features * dim * 2 * cross.kv_heads * cross.head_dim
    read = resampler.num_layers * (2 * features * dim * 2 * width + 4 * resampler.num_latents * features * width)
    assert vision.flops_per_image(config, 4) - vision.flops_per_image(config, 3) == frame + read
