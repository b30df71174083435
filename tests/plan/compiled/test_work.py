"""FLOPs, loops and collectives read from compiled programs, against what small programs are known to do."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt4moe.config.check import CallerError
from gpt4moe.config.compile import CompileConfig
from gpt4moe.plan.compiled import groups, hlo, topology, work
from gpt4moe.plan.compiled.compile import compile_lowered, examine
from tests.plan.compiled.test_compile import EIGHT, run_of

LAYERS, ROWS, DIM = 12, 256, 512
ONE_PRODUCT = 2 * ROWS * DIM * DIM


@functools.cache
def mesh_of(kind):
    """Two by two devices: emulated, or of a TPU that only the compiler knows."""
    devices = topology.devices(CompileConfig("cpu:4" if kind == "cpu" else "v5p:2x2x1"))
    return Mesh(np.array(devices).reshape(2, 2), ("fsdp", "tensor"))


def machines():
    """The TPU's compiler is an extra: without it, its refusal is tested instead."""
    return ["cpu", "tpu"] if importlib.util.find_spec("libtpu") else ["cpu"]


def counted(function, mesh, *arguments, rounds=None):
    """The work of `function` on bfloat16 arrays: (shape, partition) pairs."""
    abstract = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, spec, dtype in arguments
    ]
    compiled = compile_lowered(jax.jit(function).lower(*abstract))
    return work.count(hlo.parse(compiled.text), mesh.shape, rounds)


def chain(x_BD, weights_LDD, remat=False):
    def layer(x_BD, w_DD):
        return jnp.tanh(x_BD @ w_DD), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x_BD, weights_LDD)[0])


X = (ROWS, DIM), ("fsdp",), jnp.float32
WEIGHTS = (LAYERS, DIM, DIM), (None, None, "tensor"), jnp.float32


@pytest.mark.parametrize("machine", machines())
def test_a_loop_counts_as_often_as_it_runs(machine):
    found = counted(chain, mesh_of(machine), X, WEIGHTS)
    np.testing.assert_allclose(found.flops, LAYERS * ONE_PRODUCT / 4)
    assert found.unknown_loops == ()


@pytest.mark.parametrize("machine", machines())
@pytest.mark.parametrize(("remat", "products"), [(False, 3), (True, 4)])
def test_gradients_are_two_products_more_and_recomputation_a_fourth(machine, remat, products):
    gradient = jax.grad(functools.partial(chain, remat=remat), argnums=(0, 1))
    found = counted(gradient, mesh_of(machine), X, WEIGHTS)
    np.testing.assert_allclose(found.flops, products * LAYERS * ONE_PRODUCT / 4)
    np.testing.assert_allclose(found.recomputed_flops, (products - 3) * LAYERS * ONE_PRODUCT / 4)


@pytest.mark.parametrize("machine", machines())
def test_a_batched_product_counts_each_of_its_matrices(machine):
    stacks = [((16, 64, 128), (), jnp.float32), ((16, 128, 32), (), jnp.float32)]
    found = counted(lambda a, b: jnp.einsum("eij,ejk->eik", a, b), mesh_of(machine), *stacks)
    np.testing.assert_allclose(found.flops, 16 * 2 * 64 * 128 * 32)


@pytest.mark.parametrize("machine", machines())
def test_a_loop_of_unknown_length_counts_as_the_caller_says(machine):
    def some_rounds(x_BD, w_DD, num_rounds):
        return jax.lax.fori_loop(0, num_rounds, lambda i, x_BD: jnp.tanh(x_BD @ w_DD), x_BD)

    arguments = X, ((DIM, DIM), (), jnp.float32), ((), (), jnp.int32)
    once = counted(some_rounds, mesh_of(machine), *arguments)
    (name,) = once.unknown_loops
    often = counted(some_rounds, mesh_of(machine), *arguments, rounds={name: 5})
    np.testing.assert_allclose([once.flops, often.flops], [ONE_PRODUCT / 2, 5 * ONE_PRODUCT / 2])
    assert often.unknown_loops == ()


@pytest.mark.parametrize("machine", machines())
def test_collectives_are_known_by_axis_count_and_bytes(machine):
    """Each in a loop of three rounds, on shards of 8 x 512 float32 (16 KiB)."""

    def rounds(x_BD):
        def one(x_BD, _):
            x_BD = jax.lax.psum(x_BD, "tensor")
            gathered_BD = jax.lax.all_gather(jnp.sin(x_BD), "fsdp", tiled=True)
            x_BD = jax.lax.psum_scatter(jnp.cos(gathered_BD), "fsdp", tiled=True)
            x_BD = jax.lax.all_to_all(jnp.tanh(x_BD), "tensor", 0, 1, tiled=True).reshape(x_BD.shape)
            return jax.lax.ppermute(jnp.exp(x_BD), "fsdp", [(0, 1), (1, 0)]), None

        return jax.lax.scan(one, x_BD, None, length=3)[0]

    mesh = mesh_of(machine)
    spec = PartitionSpec("fsdp", "tensor")
    island = jax.shard_map(rounds, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    found = counted(island, mesh, ((16, 1024), ("fsdp", "tensor"), jnp.float32))
    shard = 8 * 512 * 4
    expected = {
        ("all-reduce", ("tensor",)): 3 * shard,
        ("all-gather", ("fsdp",)): 3 * shard,
        ("reduce-scatter", ("fsdp",)): 3 * shard,
        ("all-to-all", ("tensor",)): 3 * shard / 2,
        ("collective-permute", ("fsdp",)): 3 * shard,
    }
    assert {(item.kind, item.axes): item.bytes_sent for item in found.collectives} == pytest.approx(expected)
    assert {item.count for item in found.collectives} == {3}


def test_bytes_that_a_ring_of_four_sends():
    """All of it passed on three times, a quarter sent to each of three others, and an all-reduce is both."""
    text = """
ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %gathered = f32[4096]{0} all-gather(%x), GROUPS, dimensions={0}
  %summed = f32[1024]{0} all-reduce(%x), GROUPS, to_apply=%add
  %scattered = f32[256]{0} reduce-scatter(%x), GROUPS, dimensions={0}, to_apply=%add
  %exchanged = f32[1024]{0} all-to-all(%x), GROUPS, dimensions={0}
  ROOT %passed = f32[1024]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
}
""".replace("GROUPS", "replica_groups={{0,1,2,3}}")
    found = work.count(hlo.parse(text), {"tensor": 4})
    assert {item.kind: item.bytes_sent / 4096 for item in found.collectives} == {
        "all-gather": 3,
        "all-reduce": 2 * 3 / 4,
        "reduce-scatter": 3 / 4,
        "all-to-all": 3 / 4,
        "collective-permute": 1,
    }


def test_cycles_and_rounds_of_a_loop_that_counts_by_twos():
    """From 0 to 9 by 2 is five rounds, each of 100 cycles, after 7 outside."""
    text = """
%body (at: (s32[])) -> (s32[]) {
  %at = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%at), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two), backend_config={"estimated_cycles":"100"}
  ROOT %out = (s32[]) tuple(%next)
}

%condition (at: (s32[])) -> pred[] {
  %at = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%at), index=0
  %limit = s32[] constant(9)
  ROOT %below = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main () -> (s32[]) {
  %zero = s32[] constant(0), backend_config={"estimated_cycles":"7"}
  %begin = (s32[]) tuple(%zero)
  ROOT %loop = (s32[]) while(%begin), condition=%condition, body=%body
}
"""
    found = work.count(hlo.parse(text), {"tensor": 1})
    assert (found.cycles, found.unknown_loops) == (7 + 5 * 100, ())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,2},{2,0}}", [[0, 2], [2, 0]]),
    ],
)
def test_every_way_to_write_groups(text, expected):
    np.testing.assert_array_equal(groups.groups(f"channel_id=1, {text}, dimensions={{0}}", 4), expected)


def test_padding_and_holes_of_a_convolution_are_no_work():
    """A batched product as XLA:TPU writes one: the batch is a dilated spatial dim that meets itself once."""
    text = """
ENTRY %main (a: f32[8,16,32], b: f32[8,32,64]) -> f32[8,16,64] {
  %a = f32[8,16,32]{2,1,0} parameter(0)
  %b = f32[8,32,64]{2,1,0} parameter(1)
  ROOT %c = f32[8,16,64]{2,1,0} convolution(%a, %b), WINDOW, dim_labels=0bf_0io->0bf
}
""".replace("WINDOW", "window={size=8 stride=7 pad=0_0 lhs_dilate=8}")
    found = work.count(hlo.parse(text), {"tensor": 1})
    assert found.flops == 8 * 2 * 16 * 32 * 64


def test_an_instruction_may_run_over_several_lines():
    """A kernel's metadata does; what stands behind it says that it is recomputed."""
    text = """
ENTRY %main (q: bf16[4,256,128], mask: s8[1,2,2]) -> bf16[4,256,128] {
  %q = bf16[4,256,128]{2,1,0} parameter(0)
  %mask = s8[1,2,2]{2,1,0} parameter(1)
  ROOT %splash_mqa_fwd.1 = bf16[4,256,128]{2,1,0} custom-call(%mask, %q), frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="rematted_computation/pallas_call"}
}
"""
    found = work.count(hlo.parse(text), {"tensor": 1})
    pairs_of_visited_blocks = 3 * 128 * 128
    assert found.flops == found.recomputed_flops == 4 * 2 * 2 * 128 * pairs_of_visited_blocks


def test_a_grouped_product_counts_the_tiles_in_use():
    text = """
ENTRY %main (x: bf16[1024,64], w: bf16[4,64,32]) -> f32[1024,32] {
  %x = bf16[1024,64]{1,0} parameter(0)
  %w = bf16[4,64,32]{2,1,0} parameter(1)
  ROOT %ragged-dot-none.1 = f32[1024,32]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call", TILING, COST
}
""".replace("TILING", 'frontend_attributes={ragged_dot_tiling="128,64,32"}')
    module = hlo.parse(text.replace("COST", 'backend_config={"cost_estimate":{"flops":"4194304"}}'))
    assert work.count(module, {"tensor": 1}).flops == 2 * 1024 * 64 * 32
    assert work.count(module, {"tensor": 1}, {"ragged-dot-none": 3}).flops == 3 * 2 * 128 * 64 * 32


def test_what_crosses_between_slices_is_a_send_over_their_axes():
    text = """
ENTRY %main (x: bf16[8,128]) -> token[] {
  %x = bf16[8,128]{1,0} parameter(0)
  %after = token[] after-all()
  %send = (bf16[8,128]{1,0}, u32[], token[]) send(%x, %after), channel_id=2, is_host_transfer=true
  ROOT %done = token[] send-done(%send), channel_id=2, is_host_transfer=true
}
"""
    found = work.count(hlo.parse(text), {"tensor": 4}, slow=("stage",))
    assert found.collectives == (work.Collective("send between slices", ("stage",), 1, 8 * 128 * 2),)


def test_axes_within_a_slice_are_known_from_its_program():
    """Of three axes of two, fsdp lies between two slices: groups of a slice's program number its four chips."""
    run = run_of({"data": 2, "fsdp": 2, "tensor": 2}, {"dcn": {"fsdp": 2}})
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=1))
    config = dataclasses.replace(EIGHT, topology="v5p:2x2x1", slices=2)
    jax.devices()  # emulated ones are made while XLA_FLAGS, hidden from the TPU's compiler, still says how many
    if "tpu" not in machines():
        with pytest.raises(CallerError, match="needs the TPU compiler"):
            examine(run, config, "decode")
        return
    found = {(item["kind"], *item["axes"]) for item in examine(run, config, "decode")["collectives"]}
    assert {("send between slices", "fsdp"), ("all-reduce", "tensor"), ("all-reduce", "data")} <= found
    assert [axes for kind, *axes in found if "fsdp" in axes] == [["fsdp"]]


@pytest.mark.parametrize("machine", machines())
def test_temporaries_are_known_where_they_do_not_fit(machine):
    """A matrix that fills more than a chip even in bfloat16: the TPU's compiler refuses it and says what it needs."""
    rows = 250_000

    def large(x_ND):
        y_NN = jnp.tanh(x_ND @ x_ND.T)
        return jnp.tanh(y_NN @ y_NN) @ x_ND

    x = jax.ShapeDtypeStruct((rows, 128), jnp.float32, sharding=NamedSharding(mesh_of(machine), PartitionSpec()))
    memory = compile_lowered(jax.jit(large).lower(x)).memory
    assert memory.temporary > 2 * rows**2 > 95e9
    assert memory.argument == 4 * rows * 128


def test_a_topology_that_cannot_be_is_refused_in_one_line():
    with pytest.raises(CallerError, match="topology='v5p' must be a TPU with its torus"):
        CompileConfig("v5p")
    with pytest.raises(CallerError, match="topology='cpu:9' needs 9 devices, 8 are emulated"):
        topology.devices(CompileConfig("cpu:9"))
    with pytest.raises(CallerError, match=r"topology='v5p:1x7x3' (is refused by|needs) the TPU compiler"):
        topology.devices(CompileConfig("v5p:1x7x3"))
