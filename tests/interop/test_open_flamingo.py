"""OpenFlamingo's resampler and gated block with our arithmetic, against outputs and gradients of the original."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.vision import EncoderConfig, VisionConfig
from gpt4moe.interop import arrays as interop
from gpt4moe.interop import open_flamingo
from gpt4moe.model.cross_attention import GatedCrossAttention, Media
from gpt4moe.model.resampler import Resampler
from tests.interop.golden import close, golden

pytestmark = pytest.mark.usefixtures("full_precision")
NUM_HEADS = 4


def outputs():
    return golden("flamingo-golden")


@pytest.mark.parametrize("kind", ["image", "video"])
def test_resampler(kind):
    arrays, x = interop.below(outputs(), f"w/resampler_{kind}."), outputs()[f"in/resampler_{kind}"]
    config = open_flamingo.flamingo_resampler_config(arrays, NUM_HEADS)
    assert (config.max_frames, config.max_images) == ((4, 3) if kind == "video" else (0, 0))
    resampler = Resampler(config, x.shape[-1], "float32", nnx.Rngs(0))
    interop.fill(resampler, open_flamingo.flamingo_resampler_parameters(config, arrays))
    close(nnx.jit(lambda resampler: resampler(x))(resampler), outputs()[f"out/resampler_{kind}"])


@functools.cache
def _block():
    arrays, x, media = interop.below(outputs(), "w/xattn."), outputs()["in/x"], outputs()["in/media"]
    config = open_flamingo.flamingo_block_config(arrays, every=2, num_heads=NUM_HEADS)
    encoder = EncoderConfig(4, 4, 4, dim=media.shape[-1], num_layers=1, num_heads=2, hidden_dim=8)
    model = ModelConfig(
        num_layers=2,
        model_dim=x.shape[-1],
        vocab_size=8,
        context_length=x.shape[1],
        attention=AttentionConfig(num_heads=2),
        moe=MoeConfig(num_experts=1, experts_per_token=1, hidden_dim=8),
        norm_epsilon=1e-5,
        compute_dtype="float32",
        vision=VisionConfig(encoder, config),
    )
    block = GatedCrossAttention(None, model, nnx.Rngs(0))
    interop.fill(block, open_flamingo.flamingo_block_parameters(config, arrays))
    return config, block


def _media(first_image=None):
    """What tokens see: the latest image up to them, or those from `first_image` on."""
    features = outputs()["in/media"]
    image_index = np.cumsum(outputs()["in/media_locations"], axis=1) - 1
    since = image_index if first_image is None else np.where(image_index < 0, -1, first_image)
    return Media(features, np.ones(features.shape[:3], bool), image_index, since)


def test_block_of_the_latest_image():
    close(_block()[1](outputs()["in/x"], _media()), outputs()["out/xattn_immediate1"])


def test_block_of_all_images_so_far():
    """Of the tokens that see one: theirs without any attend to all images alike, ours to none."""
    media = _media(first_image=0)
    sees = np.asarray(media.visible_BTS().any(-1))
    assert not sees.all()
    got, want = np.asarray(_block()[1](outputs()["in/x"], media)), outputs()["out/xattn_immediate0"]
    close(got[sees], want[sees])
    assert np.abs(want - outputs()["out/xattn_immediate1"])[sees].max() > 1e-3


def test_block_of_the_last_token_alone():
    media = _media()
    last = Media(media.features_BIRD, media.valid_BIR, media.image_index_BT[:, -1:], media.first_image_BT[:, -1:])
    close(_block()[1](outputs()["in/x"][:, -1:], last), outputs()["out/xattn_cached_last_token"])


def test_gradients_of_the_block():
    """Of the mean square of what it gives."""
    config, block = _block()
    gradients = nnx.grad(lambda block: jnp.mean(block(outputs()["in/x"], _media()) ** 2))(block)
    want = open_flamingo.flamingo_block_parameters(config, interop.below(outputs(), "grad/xattn."))
    got = {".".join(path): leaf.get_value() for path, leaf in nnx.to_flat_state(gradients)}
    assert got.keys() == want.keys()
    for path, gradient in want.items():
        np.testing.assert_allclose(got[path], gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max(), err_msg=path)
