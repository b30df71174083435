"""What is predicted of a found layout beside what the compiler makes of it."""

import json
import pathlib

import pytest

from gpt4moe.accounting import parameters
from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.pipeline import idle_fraction
from gpt4moe.accounting.shape import shape_of
from gpt4moe.configure import build_run
from gpt4moe.plan.published import own_runs
from gpt4moe.plan.search import gin_export, verify
from gpt4moe.plan.search.layouts import Job
from gpt4moe.plan.search.ranking import cost_one
from gpt4moe.plan.training import memory

RESULTS = pathlib.Path(__file__).resolve().parents[3] / "benchmarks/results/compile"


def own_layout(gin_file, chip, num_chips, overrides=()):
    run, _ = build_run([gin_file], overrides)
    length = run.data.sequence_length
    rows = run.train.ramp[-1][1] // length
    numerics = memory.NUMERICS["float32_adam"]
    job = Job(shape_of(run.model), chip_named(chip), num_chips, rows, length, own_runs.STACK, numerics)
    return run, cost_one(job, gin_export.layout_of(run, num_chips), rows)


def ratios(rows):
    return {row["name"]: row["ratio"] for row in rows}


REFERENCES = [("gpt4_1p8t_v5p", "tpu_v5p", 2048), ("gpt4_1p8t_v6e", "tpu_v6e", 3840)]


@pytest.mark.parametrize(("name", "chip", "num_chips"), REFERENCES)
def test_the_reference_as_the_tpu_compiler_left_it(name, chip, num_chips):
    """The programs of docs/scale.md: state to 2 %, memory to 8 %, exchanges of experts to the byte."""
    _, item = own_layout(f"gin_configs/run/{name}.gin", chip, num_chips)
    compiled = json.loads((RESULTS / f"{name}.json").read_text())
    found = ratios(verify.compared(item, compiled))
    assert found["flops"] == pytest.approx(1, abs=0.002)
    assert found["state_bytes"] == pytest.approx(1, abs=0.02)
    assert found["expert_sent_bytes"] == pytest.approx(1, abs=1e-6)
    assert found["total_bytes"] == pytest.approx(1, abs=0.08) and 1 < found["tensor_sent_bytes"] < 2


def test_a_layout_is_compiled_on_emulated_devices():
    overrides = (
        "NUM_LAYERS=2", "BATCH_TOKENS=1024", "MICROBATCH_ROWS=16", "CAPACITY_FACTOR=1.0",
        'MESH={"fsdp": 2, "expert": 2, "tensor": 2}',
    )  # fmt: skip
    run, item = own_layout("gin_configs/run/tiny.gin", "h100", 8, overrides)
    document = verify.verify(run, item)
    assert document["compiled"] and document["topology"] == "cpu:8"
    assert document["mesh"] == {"fsdp": 2, "expert": 2, "tensor": 2}
    found = ratios(document["rows"])
    assert found["flops"] == pytest.approx(1, abs=0.05)
    assert found["state_bytes"] == pytest.approx(1, abs=0.25)  # norms and router, which are much of so little
    assert found["expert_sent_bytes"] == pytest.approx(1, abs=0.05)
    text = verify.format_verification(document)
    assert "compiled for cpu:8 (fsdp 2, expert 2, tensor 2)" in text and "expert_sent_bytes" in text


def test_what_is_neither_here_nor_small():
    run, item = own_layout("gin_configs/run/gpt4_1p8t_v5p.gin", "h100", 2048)
    document = verify.verify(run, item)
    assert not document["compiled"] and document["rows"] == []
    assert verify.format_verification(document).startswith("not compiled: 2,048 x h100 can be neither emulated")


def test_topologies():
    assert verify.topology_of(chip_named("h100"), 8) == "cpu:8"
    assert verify.topology_of(chip_named("h100"), 128) is None
    v5p = verify.topology_of(chip_named("tpu_v5p"), 2048)
    assert v5p in ("v5p:8x16x16", None)  # None where the TPU compiler is not installed
    assert verify.topology_of(chip_named("tpu_v5p"), 16) in ("v5p:2x2x4", "cpu:16")
    assert verify.topology_of(chip_named("tpu_v6e"), 128) in ("v6e:8x16", None)
    assert verify.topology_of(chip_named("tpu_v6e"), 2048) is None  # eight pods


@pytest.mark.parametrize(
    ("kind", "axes", "purpose"),
    [
        ("all-gather", ("tensor",), "tensor"), ("all-to-all", ("expert",), "expert"),
        ("all-to-all", ("tensor",), "tensor"),
        ("all-reduce", ("expert",), "replicas"), ("all-gather", ("fsdp", "tensor"), "replicas"),
        ("collective-permute", ("stage",), "stage"), ("send between slices", ("stage",), "stage"),
        ("collective-permute", ("context",), "context"), ("all-reduce", ("data",), "replicas"),
    ],
)  # fmt: skip
def test_what_a_collective_is_for(kind, axes, purpose):
    assert verify.purpose(kind, axes) == purpose


def test_bytes_sent_by_hand():
    """4 layers of width 32, 4 sequences of 64 in 16 bits; rings send (n - 1) / n of what they gather."""
    wide = ("NUM_LAYERS=4", "BATCH_TOKENS=512", "SEQUENCE_LENGTH=64")
    activation = 64 * 32 * 2

    def sent(mesh, *more):
        _, item = own_layout("gin_configs/run/tiny.gin", "h100", 4, (*wide, *more, f"MESH={mesh}"))
        return item, verify.sent_bytes(item)

    item, found = sent({"context": 2, "data": 2}, "MICROBATCH_ROWS=2")
    width = item.job.shape.cache_width
    assert found["context"] == pytest.approx(4 * (2 + 1) * 4 * 1 / 2 * 64 * width * 2)
    item, found = sent({"stage": 2, "data": 2}, "MICROBATCH_ROWS=8", "config.mesh.MeshConfig.stage_microbatches=4")
    ticks = 4 / (1 - float(idle_fraction(2, 4, 1)))
    assert item.layout.passes == 1 and found["stage"] == pytest.approx(2 * ticks * activation)
    counted = parameters.count(item.job.shape)
    half = memory.stage_parameters(item.job.shape, item.layout, 1)
    assert found["replicas"] == pytest.approx(2 * 1 / 2 * sum(half[:2]) * 2)
    item, found = sent({"fsdp": 2, "data": 2}, "MICROBATCH_ROWS=4")
    microbatches, gathered = item.layout.microbatches(8), 1 / 2 * counted.total
    assert microbatches == 2
    summed = 2 * 1 / 2 * counted.total / 2 * 2
    assert found["replicas"] == pytest.approx(2 * gathered * (2 + 2 * 2) + summed)


def test_room_of_an_exchange_without_a_capacity():
    run, item = own_layout("gin_configs/run/tiny.gin", "h100", 2, ("BATCH_TOKENS=512", 'MESH={"expert": 2}'))
    assert run.model.moe.capacity_factor is None
    assert verify._exchange_room(run, item, "cpu:2") == 2
    assert verify._exchange_room(run, item, "v5p:2x1x1") in (1.0, 2)
