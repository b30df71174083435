"""CLIP and SigLIP towers with our arithmetic: outputs of the originals on tiny random weights (tests/golden/vision)."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.flax import save_file

from gpt4moe.config.check import CallerError
from gpt4moe.interop import arrays as interop
from gpt4moe.interop import vision
from gpt4moe.model.vision import VisionEncoder
from tests.interop.golden import close, foreign_model, golden

pytestmark = pytest.mark.usefixtures("full_precision")


def _encode(config, arrays, pixels):
    """Features of foreign pixels [..., colours, rows, columns]."""
    encoder = VisionEncoder(config, "float32", "none", nnx.Rngs(0))
    interop.fill(encoder, vision.encoder_parameters(config, arrays))
    return np.asarray(nnx.jit(lambda encoder, images: encoder(images))(encoder, np.moveaxis(pixels, -3, -1)))


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_towers(tower):
    foreign, arrays = foreign_model(f"vit-golden/{tower}-tiny")
    outputs = golden("vit-golden")
    config = vision.encoder_config(foreign, arrays)
    close(_encode(config, arrays, outputs["in/pixel_values"]), outputs[f"out/{tower}_last_hidden_state"])
    shorter = dataclasses.replace(config, num_layers=config.num_layers - 1, norm_after=False)
    close(_encode(shorter, arrays, outputs["in/pixel_values"]), outputs[f"out/{tower}_penultimate"])


def test_pixels_are_normalised_as_the_originals_were():
    """The numbers of preprocessor_config.json of openai/clip-vit-large-patch14 and google/siglip-so400m-patch14-384."""
    for tower, mean, std in (
        ("clip", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ("siglip", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ):
        config = vision.encoder_config(*foreign_model(f"vit-golden/{tower}-tiny"))
        assert (config.pixel_mean, config.pixel_std) == (mean, std)


def test_pooled_clip_is_the_normed_class_token():
    foreign, arrays = foreign_model("vit-golden/clip-tiny")
    config = dataclasses.replace(vision.encoder_config(foreign, arrays), norm_after=True)
    outputs = golden("vit-golden")
    close(_encode(config, arrays, outputs["in/pixel_values"])[:, 0], outputs["out/clip_pooler"])


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "gelu"},
        {"norm_before": False},
        {"norm_epsilon": 1e-2},
        {"num_heads": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_golden_tower_tells_another_configuration_apart(change):
    foreign, arrays = foreign_model("vit-golden/clip-tiny")
    outputs = golden("vit-golden")
    config = dataclasses.replace(vision.encoder_config(foreign, arrays), **change)
    if "norm_before" in change:
        arrays = {name: array for name, array in arrays.items() if not name.startswith("pre_layrnorm")}
    got = _encode(config, arrays, outputs["in/pixel_values"])
    assert not np.allclose(got, outputs["out/clip_last_hidden_state"], rtol=1e-4, atol=1e-4)


def test_sizes_come_from_the_arrays_and_a_whole_model_holds_a_tower(tmp_path):
    """A tower of other sizes, in bfloat16, below `vision_model.` beside a text tower, whose config says little."""
    rng = np.random.default_rng(0)
    dim, hidden, heads, patch, side = 24, 40, 3, 2, 3
    shapes = {
        "embeddings.class_embedding": (dim,),
        "embeddings.patch_embedding.weight": (dim, 3, patch, patch),
        "embeddings.position_embedding.weight": (side**2 + 1, dim),
        **{f"{norm}.{kind}": (dim,) for norm in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")},
    }
    for layer in range(2):
        inner = f"encoder.layers.{layer}."
        linear = {f"self_attn.{name}_proj": (dim, dim) for name in ("q", "k", "v", "out")}
        for name, shape in (linear | {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}).items():
            shapes |= {f"{inner}{name}.weight": shape, f"{inner}{name}.bias": shape[:1]}
        shapes |= {f"{inner}layer_norm{i}.{kind}": (dim,) for i in (1, 2) for kind in ("weight", "bias")}
    tower = {f"vision_model.{name}": jnp.asarray(rng.normal(size=s), jnp.bfloat16) for name, s in shapes.items()}
    save_file(tower | {"text_model.final_layer_norm.bias": jnp.zeros(4)}, tmp_path / "model.safetensors")
    arrays = interop.load_arrays(str(tmp_path))
    foreign = {"model_type": "clip", "vision_config": {"num_attention_heads": heads}}
    config = vision.encoder_config(foreign, arrays)
    sizes = (config.height, config.patch_size, config.dim, config.num_layers, config.num_heads, config.hidden_dim)
    assert sizes == (side * patch, patch, dim, 2, heads, hidden)
    assert config.activation == "quick_gelu" and config.class_token and not config.patch_bias
    features = _encode(config, arrays, rng.normal(size=(1, 3, 6, 6)).astype(np.float32))
    assert features.shape == (1, 10, dim) and np.isfinite(features).all()


def test_what_does_not_fit_is_told():
    foreign, arrays = foreign_model("vit-golden/clip-tiny")
    config = vision.encoder_config(foreign, arrays)
    missing = {name: array for name, array in arrays.items() if name != "pre_layrnorm.bias"}
    with pytest.raises(CallerError, match=r"'pre_layrnorm.bias' is not in the checkpoint; near: .*pre_layrnorm.weight"):
        vision.encoder_parameters(config, missing)
    with pytest.raises(CallerError, match=r"'another'\] have no place"):
        vision.encoder_parameters(config, arrays | {"another": np.zeros(1)})
    with pytest.raises(CallerError, match="model_type='dinov2' must be in"):
        vision.encoder_config(foreign | {"model_type": "dinov2"}, arrays)
    with pytest.raises(CallerError, match="hidden_act='swish' must be in"):
        vision.encoder_config(foreign | {"hidden_act": "swish"}, arrays)
    wider = dataclasses.replace(config, hidden_dim=48)
    encoder = VisionEncoder(wider, "float32", "none", nnx.Rngs(0))
    with pytest.raises(CallerError, match=r"blocks\.\w+\.\w+=\(.*\) must be \(3"):
        interop.fill(encoder, vision.encoder_parameters(wider, arrays))
    with pytest.raises(CallerError, match="must be a file"):
        interop.load_arrays("/nowhere.npz")
