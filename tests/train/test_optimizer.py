"""AdamW against its formulas written out in NumPy; what decays; the user's own optimizer."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gpt4moe.config.optimizer import OptimizerConfig
from gpt4moe.config.vision import CrossAttentionConfig, EncoderConfig, ResamplerConfig, VisionConfig
from gpt4moe.model.transformer import Transformer
from gpt4moe.train import optimizer, state
from tests.train import tiny


def parameter(value, *axes):
    return nnx.Param(jnp.asarray(value, jnp.float32), logical_axes=axes)


def test_adamw_equals_its_formulas_over_three_steps():
    config = OptimizerConfig(0.1, b1=0.8, b2=0.9, epsilon=1e-3, weight_decay=0.2, clip_norm=None)
    draw = np.random.default_rng(0)
    matrix, scale = draw.normal(size=(2, 3)), draw.normal(size=3)
    params = {"matrix": parameter(matrix, "embed", "mlp"), "scale": parameter(scale, "norm")}
    opt_state = optimizer.make_optimizer(0.1, config).init(params)
    expected = {name: (value, 0.0, 0.0) for name, value in (("matrix", matrix), ("scale", scale))}
    for t, rate in enumerate((0.1, 0.05, 0.01), start=1):
        grads = {name: draw.normal(size=value.shape) for name, (value, _, _) in expected.items()}
        for name, (value, mean, square) in expected.items():
            mean, square = 0.8 * mean + 0.2 * grads[name], 0.9 * square + 0.1 * grads[name] ** 2
            direction = (mean / (1 - 0.8**t)) / (np.sqrt(square / (1 - 0.9**t)) + 1e-3)
            decay = 0.2 * value if name == "matrix" else 0.0
            expected[name] = (value - rate * (direction + decay), mean, square)
        device_grads = {name: params[name].replace(jnp.asarray(grad, jnp.float32)) for name, grad in grads.items()}
        updates, opt_state = optimizer.make_optimizer(rate, config).update(device_grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    for name, (value, _, _) in expected.items():
        np.testing.assert_allclose(params[name].get_value(), value, rtol=1e-5)


def test_matrices_decay_and_stacked_norms_do_not():
    run = tiny.run_config(pathlib.Path("unused"))
    params = jax.eval_shape(lambda: state.initial_state(run)).params
    mask = jax.tree_util.tree_leaves_with_path(optimizer.decay_mask(params))
    decays = {jax.tree_util.keystr(path, simple=True, separator="."): bool(value) for path, value in mask}
    kept = {name for name, value in decays.items() if not value}
    assert kept and all("norm" in name for name in kept)
    assert not any("norm" in name for name, value in decays.items() if value)


def test_of_what_reads_images_matrices_decay_and_biases_norms_and_gates_do_not():
    vision = VisionConfig(
        EncoderConfig(4, 4, 2, dim=8, num_layers=2, num_heads=2, hidden_dim=8, norm_before=True),
        CrossAttentionConfig(every=1, num_heads=2, head_dim=4, hidden_dim=8, norm="layer", gate="vector"),
        ResamplerConfig(2, num_layers=2, num_heads=2, hidden_dim=8, qk_norm=True),
    )
    model = dataclasses.replace(tiny.run_config(pathlib.Path("unused")).model, vision=vision)
    params = nnx.split(nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0))))[1]
    mask = jax.tree_util.tree_leaves_with_path(optimizer.decay_mask(params))
    decays = {jax.tree_util.keystr(path, simple=True, separator="."): bool(value) for path, value in mask}
    parts = ("vision_encoder.", "resampler.", "cross_attention.")
    assert all(sum(name.startswith(part) for name in decays) > 10 for part in parts)
    plain = ("bias", "norm", "_gate")
    assert decays == {name: not any(one in name for one in plain) for name in decays}


def test_gradients_are_clipped_to_the_global_norm():
    config = OptimizerConfig(1.0, clip_norm=2.0, build=lambda rate, config: optax.sgd(rate))
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    transform = optimizer.make_optimizer(1.0, config)
    updates, _ = transform.update({"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}, transform.init(params), params)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-1.2, -1.6], rtol=1e-6)
