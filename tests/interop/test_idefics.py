"""A whole Idefics model with our arithmetic: features, latents, logits, loss and gradients of the original."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.check import CallerError
from gpt4moe.interop import arrays as interop
from gpt4moe.interop import idefics
from gpt4moe.model.transformer import Transformer
from tests.interop.golden import close, foreign_model, golden

pytestmark = pytest.mark.usefixtures("full_precision")
PERCEIVER, CROSS = "model.perceiver_resampler.", "model.gated_cross_attn_layers."


def outputs():
    return golden("idefics-tiny")


@functools.cache
def _model():
    foreign, arrays = foreign_model("idefics-tiny")
    config = idefics.idefics_config(foreign, arrays)
    model = Transformer(config, rngs=nnx.Rngs(0))
    interop.fill(model, idefics.idefics_parameters(config, arrays))
    return model


def _images():
    return np.moveaxis(outputs()["in/pixel_values"], -3, -1)


@nnx.jit
def _loss_and_logits(model):
    """The mean cross-entropy of the next token where it has a label, as the golden file's."""
    tokens, segments = (outputs()[f"in/{name}"].astype(np.int32) for name in ("input_ids", "attention_mask"))
    image_index, first_image = idefics.visible_images(outputs()["in/image_attention_mask"])
    media = model.look(jnp.asarray(_images()), np.ones(_images().shape[:2], bool), image_index, first_image)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, _ = model(tokens, positions, segments, dropless=True, media=media)
    logits, labels = model.logits(x), outputs()["in/labels"][:, 1:]
    learned = labels >= 0
    of_labels = jnp.maximum(labels, 0)[..., None]
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), of_labels, axis=-1)[..., 0]
    return -jnp.sum(log_likelihood * learned) / np.sum(learned), logits


def test_features_and_latents():
    model = _model()
    features = nnx.jit(lambda encoder: encoder(jnp.asarray(_images())))(model.vision_encoder)
    close(features.reshape(outputs()["out/vision"].shape), outputs()["out/vision"])
    latents = nnx.jit(lambda resampler: resampler(features[:, :, None]))(model.resampler)
    close(latents.reshape(outputs()["out/latents"].shape), outputs()["out/latents"])


def test_logits_and_loss():
    loss, logits = _loss_and_logits(_model())
    close(logits, outputs()["out/logits"])
    close(loss, outputs()["out/loss"])


def test_gradients_of_resampler_and_cross_attention():
    model = _model()
    config = model.config
    gradients = nnx.jit(nnx.grad(lambda model: _loss_and_logits(model)[0]))(model)
    got = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(gradients)}
    theirs = interop.below(outputs(), "grad/")
    crossing = {name: array for name, array in theirs.items() if name.startswith(CROSS)}
    resampling = interop.below(theirs, PERCEIVER)
    assert len(crossing) + len(resampling) == len(theirs)
    modules = {
        "cross_attention": idefics.idefics_cross_attention_parameters(config, crossing),
        "resampler": idefics.idefics_resampler_parameters(config.vision.resampler, resampling),
    }
    for module, parameters in modules.items():
        for path, want in parameters.items():
            name = f"{module}.{path}"
            # of a bias that is added to every key, nothing but rounding is left
            scale = 1e-3 if path == "blocks.key_norm.bias" else np.abs(want).max()
            np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


def test_the_configuration_is_read_from_file_and_arrays():
    foreign, arrays = foreign_model("idefics-tiny")
    config = _model().config
    assert (config.num_layers, config.vocab_size, config.num_cross_attention_layers) == (4, 252, 2)
    with pytest.raises(CallerError, match="hidden_act='gelu' must be silu"):
        idefics.idefics_config(foreign | {"hidden_act": "gelu"}, arrays)
    with pytest.raises(CallerError, match="rope_type='linear' must be default"):
        idefics.idefics_config(foreign | {"rope_parameters": {"rope_type": "linear"}}, arrays)
    with pytest.raises(CallerError, match="have no place in our model"):
        idefics.idefics_parameters(config, arrays | {"model.layers.0.mlp.bias": np.zeros(1)})


def test_gates_may_be_vectors_and_the_resampler_absent():
    foreign, arrays = foreign_model("idefics-tiny")
    dim = len(arrays["model.norm.weight"])
    wide = {name: np.broadcast_to(a, (1, 1, dim)) if ".alpha_" in name else a for name, a in arrays.items()}
    wide = {name: array for name, array in wide.items() if not name.startswith(PERCEIVER)}
    config = idefics.idefics_config(foreign, wide)
    assert config.vision.cross_attention.gate == "vector" and config.vision.resampler is None
    model = Transformer(config, rngs=nnx.Rngs(0))
    interop.fill(model, idefics.idefics_parameters(config, wide))
    assert model.cross_attention.attention_gate[...].shape == (2, dim)


def test_a_head_that_is_tied_is_the_embedding():
    foreign, arrays = foreign_model("idefics-tiny")
    tied = {name: array for name, array in arrays.items() if not name.startswith("lm_head.")}
    parameters = idefics.idefics_parameters(idefics.idefics_config(foreign, tied), tied)
    np.testing.assert_array_equal(parameters["embedding"], parameters["head"])


def test_which_images_tokens_see():
    mask = np.array([[[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]]])
    image_index, first_image = idefics.visible_images(mask)
    assert image_index.tolist() == [[-1, 0, 1, 2, 2]] and first_image.tolist() == [[-1, 0, 0, 1, 2]]
    with pytest.raises(CallerError, match="consecutive"):
        idefics.visible_images(np.array([[[1, 0, 1]]]))
