"""Images lie with their rows: a mesh divides what the encoder and the resampler do, and repeats none of it."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.rules import ShardingRules
from gpt4moe.config.vision import CrossAttentionConfig, EncoderConfig, ResamplerConfig, VisionConfig
from gpt4moe.model.transformer import Transformer
from gpt4moe.parallel.layout import make_layout
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.parallel.sharding import laid_out_shapes, state_shardings

# Enough layers to be scanned: in a loop XLA forgets by itself where images lie, and every device looks at all of them.
ENCODER = EncoderConfig(height=32, width=32, patch_size=8, dim=64, num_layers=10, num_heads=4, hidden_dim=256)
RESAMPLER = ResamplerConfig(num_latents=8, num_layers=1, num_heads=4, hidden_dim=128)
CROSS = CrossAttentionConfig(every=1, num_heads=4, head_dim=16, hidden_dim=64)
MODEL = ModelConfig(
    num_layers=1,
    model_dim=64,
    vocab_size=64,
    context_length=16,
    attention=AttentionConfig(num_heads=4, head_dim=16),
    moe=MoeConfig(4, 2, hidden_dim=64),
    vision=VisionConfig(ENCODER, CROSS, RESAMPLER),
    compute_dtype="float32",
    remat="full",
)
ROWS, IMAGES = 8, 2


def flops_of_looking(axes):
    """FLOPs that a device executes for the gradient of a batch's features, by the compiler, which counts loops once."""
    config, rules = MeshConfig(axes), ShardingRules()
    mesh = make_mesh(config, jax.devices()[: math.prod(axes.values())])
    layout = make_layout(MODEL, config, rules, mesh)
    graph, parameters = nnx.split(nnx.eval_shape(lambda: Transformer(MODEL, rngs=nnx.Rngs(0), layout=layout)))
    by_row = NamedSharding(mesh, PartitionSpec(tuple(axis for axis in rules.batch_axes if mesh.shape[axis] > 1)))

    def loss(parameters, images, valid):
        index = jnp.zeros((ROWS, 1), jnp.int32)
        return jnp.sum(nnx.merge(graph, parameters).look(images, valid, index, index).features_BIRD ** 2)

    shapes = (ROWS, IMAGES, ENCODER.height, ENCODER.width, 3), (ROWS, IMAGES)
    given = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=by_row)
        for shape, dtype in zip(shapes, ("uint8", "bool"), strict=True)
    ]
    where = state_shardings(parameters, mesh, rules)
    laid_out = laid_out_shapes(parameters, where)
    return jax.jit(jax.grad(loss)).lower(laid_out, *given).compile().cost_analysis()["flops"]


def test_no_device_looks_at_the_images_of_another():
    whole = flops_of_looking({})
    for axes in ({"fsdp": 2, "expert": 4}, {"fsdp": 2, "expert": 2, "tensor": 2}):
        assert flops_of_looking(axes) < 1.25 * whole / 8, axes
