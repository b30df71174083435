"""The grouped product: values and gradients of every implementation against a loop; which one a program gets."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.experimental.pallas import tpu as pltpu
from jax.extend.mlir import ir
from jax.interpreters import mlir
from jaxlib.triton import dialect

from gpt4moe.config.check import CallerError
from gpt4moe.config.compile import CompileConfig
from gpt4moe.config.moe import GROUPED_PRODUCTS, MoeConfig
from gpt4moe.model import grouped_tpu, grouped_triton
from gpt4moe.model.grouped_matmul import IMPLEMENTATIONS, Implementation, block_matmul, fastest
from gpt4moe.model.layout import ONE_DEVICE
from gpt4moe.model.moe import Moe, RoutedTokens
from gpt4moe.plan.compiled import expected, hlo, topology, work
from gpt4moe.plan.compiled.compile import compile_lowered
from tests.model import slow

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
# Rows of a block: fewer than a tensor core takes, and two of its tiles. Two tiles of D, three of F.
BLOCK_ROWS = {"float32": 8, "bfloat16": 32}
BLOCKS, EXPERTS, DIM, HIDDEN, TILE = 6, 4, 32, 48, 16
# The expert of each block, and how many are in use; what unused blocks hold must not matter.
CASES = {
    "uneven": ([0, 1, 1, 1, 2, 3], 6),
    "experts without tokens": ([1, 1, 3, 3, 3, 3], 3),
    "all to one expert": ([2, 2, 2, 2, 2, 2], 6),
    "one block": ([3, 3, 3, 3, 3, 3], 1),
    "no block": ([3, 3, 3, 3, 3, 3], 0),
}


def interpreted(module, **settings):
    """The kernels of a module on a CPU, with tiles so small that there are several in every dim."""
    parts = (module.forward, module.rows_gradient, module.matrices_gradient)
    return Implementation(*(functools.partial(part, **settings) for part in parts))


TESTED = IMPLEMENTATIONS | {
    "triton": interpreted(grouped_triton, tiles=grouped_triton.Tiles(TILE, TILE, TILE, stages=1), interpret=True),
    # A TPU's memories are told apart, and hold NaN before they are written.
    "mosaic": interpreted(grouped_tpu, tile=TILE, interpret=pltpu.InterpretParams(uninitialized_memory="nan")),
}


def problem(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    length = BLOCK_ROWS[dtype]
    rows_XCD = jax.random.normal(keys[0], (BLOCKS, length, DIM)).astype(dtype)
    w_EDF = jax.random.normal(keys[1], (EXPERTS, DIM, HIDDEN))
    return rows_XCD, w_EDF, jax.random.normal(keys[2], (BLOCKS, length, HIDDEN)).astype(dtype)


@functools.cache
def multiplied(name):
    """The product and its gradients as one compiled function for all cases."""

    def multiply(rows_XCD, w_EDF, dy_XCF, block_expert_X, num_blocks):
        def product(rows_XCD, w_EDF):
            return block_matmul(rows_XCD, w_EDF, block_expert_X, num_blocks, TESTED[name])

        y_XCF, gradients = jax.vjp(product, rows_XCD, w_EDF)
        return y_XCF, *gradients(dy_XCF)

    return jax.jit(multiply)


def one_by_one(rows_XCD, w_EDF, dy_XCF, block_expert_X, num_blocks):
    rows_XCD, w_EDF, dy_XCF = (np.asarray(x, np.float64) for x in (rows_XCD, w_EDF, dy_XCF))
    y_XCF, drows_XCD, dw_EDF = np.zeros_like(dy_XCF), np.zeros_like(rows_XCD), np.zeros_like(w_EDF)
    for x in range(num_blocks):
        w_DF = w_EDF[block_expert_X[x]]
        y_XCF[x] = rows_XCD[x] @ w_DF
        drows_XCD[x] = dy_XCF[x] @ w_DF.T
        dw_EDF[block_expert_X[x]] += rows_XCD[x].T @ dy_XCF[x]
    return y_XCF, drows_XCD, dw_EDF


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_equals_a_loop(name, dtype, case):
    operands, (block_expert_X, num_blocks) = problem(dtype), CASES[case]
    got = multiplied(name)(*operands, jnp.array(block_expert_X), jnp.int32(num_blocks))
    assert slow.relative_difference(got, one_by_one(*operands, block_expert_X, num_blocks)) < TOLERANCE[dtype]
    assert [x.dtype for x in got] == [jnp.dtype(dtype), jnp.dtype(dtype), jnp.float32]


def test_the_default_differentiates_inside_a_recomputed_scan():
    rows_XCD, w_EDF, _ = problem("float32")
    block_expert_X, num_blocks = jnp.array(CASES["uneven"][0]), jnp.int32(6)

    @jax.checkpoint
    def layer(rows_XCD, w_EDF):
        return rows_XCD + block_matmul(rows_XCD, w_EDF, block_expert_X, num_blocks) @ w_EDF[0].T, None

    def loss(w_LEDF):
        return jnp.sum(jax.lax.scan(layer, rows_XCD, w_LEDF)[0] * rows_XCD)

    def reference(w_LEDF):
        x_XCD = rows_XCD
        for w_EDF in w_LEDF:
            x_XCD = x_XCD + jnp.einsum("xcd,xdf->xcf", x_XCD, w_EDF[block_expert_X]) @ w_EDF[0].T
        return jnp.sum(x_XCD * rows_XCD)

    w_LEDF = 0.1 * jnp.stack([w_EDF, w_EDF[::-1]])
    assert slow.relative_difference(jax.jit(jax.grad(loss))(w_LEDF), jax.grad(reference)(w_LEDF)) < TOLERANCE["float32"]


def shapes(length, dim, hidden, dtype, experts=4, blocks=8):
    """Abstract operands of `block_matmul`, the matrices in float32."""
    row, matrix = ((blocks, length, dim), dtype), ((experts, dim, hidden), jnp.float32)
    return tuple(jax.ShapeDtypeStruct(*x) for x in (row, matrix, ((blocks,), jnp.int32), ((), jnp.int32)))


@pytest.mark.parametrize(
    ("platform", "sizes", "expected"),
    [
        ("cpu", (128, 256, 512, "bfloat16"), "loop"),
        ("cuda", (128, 256, 512, "bfloat16"), "triton"),
        ("rocm", (8, 48, 80, "float32"), "triton"),
        ("cuda", (8, 48, 72, "float32"), "loop"),
        ("tpu", (8, 256, 512, "bfloat16"), "mosaic"),
        ("tpu", (128, 256, 192, "bfloat16"), "ragged"),
        ("tpu", (128, 256, 512, "float16"), "ragged"),
    ],
)
def test_the_fastest_is_chosen_by_platform_and_shapes(platform, sizes, expected):
    assert fastest(platform, *shapes(*sizes)[:2]) == expected


def test_a_name_that_cannot_be_is_refused_in_one_line():
    lower = lambda name, *sizes: jax.jit(block_matmul, static_argnums=4).lower(*shapes(*sizes), name)  # noqa: E731
    with pytest.raises(CallerError, match=r"^grouped_product='mosaic' runs on tpu only; leave it out"):
        lower("mosaic", 8, 128, 128, "float32")
    with pytest.raises(CallerError, match=r"^grouped_product='triton' runs on cuda or rocm only"):
        lower("triton", 8, 128, 128, "float32")
    with pytest.raises(
        CallerError, match=r"needs model and hidden dims, per shard, in multiples of 128, here are rows"
    ):
        lower("mosaic", 8, 128, 96, "float32")
    with pytest.raises(CallerError, match=r"needs blocks whose number of rows is a power of two"):
        lower("triton", 24, 128, 128, "float32")
    with pytest.raises(CallerError, match="must be in"):
        lower("fast", 8, 128, 128, "float32")
    with pytest.raises(CallerError, match="grouped_product='fast' must be in"):
        MoeConfig(4, 2, 8, grouped_product="fast")
    assert tuple(IMPLEMENTATIONS) == GROUPED_PRODUCTS


def test_a_layer_multiplies_by_the_one_its_config_names():
    """By the plain one it gives the same; by one that no CPU has it is refused."""

    def applied(name):
        config = MoeConfig(2, 1, 128, normalize_gates=False, grouped_product=name)
        moe = slow.one_layer(Moe((0,), 128, config, ONE_DEVICE, 1.0, nnx.Rngs(0)))
        x_BTD = jax.random.normal(jax.random.key(1), (1, 8, 128))
        tokens = RoutedTokens(jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8), bool))
        return nnx.jit(lambda moe, x_BTD, tokens: moe(x_BTD, tokens, dropless=True)[0])(moe, x_BTD, tokens)

    assert slow.relative_difference(applied("plain"), applied(None)) < TOLERANCE["float32"]
    with pytest.raises(CallerError, match="grouped_product='mosaic' runs on tpu only"):
        applied("mosaic")


def gradients(rows_XCD, w_EDF, block_expert_X, num_blocks):
    """Three products: forward, and of both gradients."""

    def loss(rows_XCD, w_EDF):
        y_XCF = block_matmul(rows_XCD, w_EDF, block_expert_X, num_blocks)
        return jnp.sum(jnp.square(y_XCF.astype(jnp.float32)))

    return jax.grad(loss, (0, 1))(rows_XCD, w_EDF)


def triton_kernels(program):
    """The kernels that the text of a program holds as bytes, each a module in Triton's language."""
    for text in re.findall(r' ir = "((?:[^"\\]|\\.)*)"', program):
        plain = text.replace("\\\\", "\\5C").encode("latin1")
        yield re.sub(rb"\\([0-9A-F]{2})", lambda found: bytes([int(found[1], 16)]), plain)


@pytest.mark.parametrize(("length", "dtype"), [(8, "float32"), (128, "bfloat16")])
def test_a_program_for_a_gpu_has_the_kernels(length, dtype):
    """As far as a machine without one goes: Pallas turns them into Triton's language, which checks what it is given."""
    allowed = [export.DisabledSafetyCheck.custom_call(n) for n in ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")]
    exported = export.export(jax.jit(gradients), platforms=["cuda"], disabled_checks=allowed)
    if jax.version.__version_info__ >= (0, 11):  # compiles them too, with what comes with JAX for CUDA
        with pytest.raises(RuntimeError, match="Triton compilation handler"):
            exported(*shapes(length, 256, 384, dtype))
        return
    program = exported(*shapes(length, 256, 384, dtype)).mlir_module()
    context = mlir.make_ir_context()
    dialect.register_dialect(context)
    with context:
        kernels = [ir.Module.parse(kernel).operation for kernel in triton_kernels(program)]
        assert len(kernels) == 3 and all(kernel.verify() for kernel in kernels)
    assert "stablehlo.while" not in program and "stablehlo.dot" not in program


@pytest.mark.parametrize("machine", ["v5p:2x2x1", "v5e:2x2", "v6e:2x2"])
def test_a_program_for_a_tpu_has_the_flops_it_needs(machine):
    """Of eight blocks for four experts, all in use or five; the analysis is told how many are."""
    if importlib.util.find_spec("libtpu") is None:
        with pytest.raises(CallerError, match="needs the TPU compiler"):
            topology.devices(CompileConfig(machine))
        return
    device = jax.sharding.SingleDeviceSharding(topology.devices(CompileConfig(machine))[0])
    operands = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for x in shapes(128, 256, 384, "bfloat16")]
    module = hlo.parse(compile_lowered(jax.jit(gradients).lower(*operands)).text)
    needed = 3 * 2 * 128 * 256 * 384
    assert work.count(module, {}).flops == 8 * needed
    in_use = dict.fromkeys(expected.GROUPED_PRODUCTS, 5)
    assert work.count(module, {}, in_use).flops == 5 * needed
