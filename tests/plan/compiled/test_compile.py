"""Real programs of a small run, compiled for emulated devices: bytes, FLOPs and collectives against the analysis."""

import dataclasses
import functools

import pytest

from gpt4moe.accounting import parameters
from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.check import CallerError
from gpt4moe.config.compile import CompileConfig
from gpt4moe.config.data import DataConfig, SourceConfig
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.optimizer import OptimizerConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.config.train import TrainConfig
from gpt4moe.plan.compiled import compile as compiling

LENGTH, ROWS, VOCAB, LAYERS = 64, 16, 320, 12
EIGHT = CompileConfig("cpu:8", decode_rows=8, decode_length=64, weight_dtype="float32")
FOUR = dataclasses.replace(EIGHT, topology="cpu:4")
LEADING = {"num_layers": LAYERS + 2, "leading_dense_layers": 2, "dense_hidden_dim": 192}
LAYOUTS = {
    "one device": ({}, {}, {}),
    "TP2 x EP2 x FSDP2": ({"tensor": 2, "expert": 2, "fsdp": 2}, {"sequence_parallel": True}, {}),
    "CP4 x TP2": ({"context": 4, "tensor": 2}, {}, {}),
    # Two dense layers before the pipeline.
    "PP2 interleaved x2 x EP2 x TP2": ({"stage": 2, "expert": 2, "tensor": 2}, {"virtual_stages": 2}, LEADING),
}


def run_of(axes, settings, capacity_factor=1.25):
    """Twelve layers, enough to be scanned; two microbatches a step."""
    model = ModelConfig(
        num_layers=LAYERS,
        model_dim=64,
        vocab_size=VOCAB,
        context_length=LENGTH,
        attention=AttentionConfig(num_heads=4, head_dim=32, query_chunk=16),
        moe=MoeConfig(4, 2, hidden_dim=256, gated=False, capacity_factor=capacity_factor),
        compute_dtype="float32",
        remat="full",
    )
    data = DataConfig((SourceConfig("text", paths=("unused",)),), LENGTH, TokenizerConfig(272, byte_level_only=True))
    train = TrainConfig(10, 10**9, 2 * ROWS * LENGTH, seed=0, checkpoint_every=10, microbatch_rows=ROWS)
    return RunConfig(model, data, OptimizerConfig(1e-3), train, MeshConfig(axes, **settings))


def with_model(run, **settings):
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **settings))


def one_microbatch(run):
    return dataclasses.replace(run, train=dataclasses.replace(run.train, batch_tokens=ROWS * LENGTH))


@functools.cache
def document_of(name):
    axes, settings, model = LAYOUTS[name]
    return compiling.examine(with_model(run_of(axes, settings), **model), EIGHT)


@pytest.mark.parametrize("name", LAYOUTS)
def test_compiled_flops_are_those_the_analysis_expects(name):
    document = document_of(name)
    assert document["compiled_over_executed"] == pytest.approx(1, abs=0.05), document["products"]
    assert document["unknown_loops"] == []


def test_layers_before_a_pipeline_are_recomputed_too():
    products = document_of("PP2 interleaved x2 x EP2 x TP2")["products"]
    flops = {item["pass_name"]: item["flops"] for item in products if item["source"].startswith("attention.py")}
    assert flops["recomputed"] == flops["forward"]


def test_one_chip_holds_parameters_and_moments():
    document = document_of("one device")
    counted = parameters.count(run_of({}, {}).model).total
    assert document["argument_bytes"] == pytest.approx(12 * counted, rel=0.02)
    assert document["fits"] and document["missing_bytes"] == 0
    assert document["collectives"] == []
    assert compiling.format_document(document).startswith("train on 1 of 8 chips (1 x cpu:8)")


def test_what_is_there_at_once_must_fit():
    """Of the output 4 bytes lie where arguments were."""
    memory = compiling.Memory(argument=100, temporary=30, output=7, aliased=4, generated_code=1)
    assert memory.total == 100 + 30 + (7 - 4) + 1


def test_sequence_parallelism_divides_what_lies_between_layers():
    """The backward pass keeps the residual stream before every layer, [rows, T, D] in float32: a quarter of it here."""
    runs = [one_microbatch(run_of({"tensor": 4}, {"sequence_parallel": flag})) for flag in (False, True)]
    whole, parted = (compiling.examine(run, FOUR)["temporary_bytes"] for run in runs)
    assert whole - parted >= 3 / 4 * LAYERS * ROWS * LENGTH * runs[0].model.model_dim * 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("TP2 x EP2 x FSDP2", {("all-to-all", "expert"), ("all-gather", "fsdp"), ("reduce-scatter", "tensor")}),
        ("CP4 x TP2", {("all-gather", "context"), ("all-reduce", "tensor")}),
        ("PP2 interleaved x2 x EP2 x TP2", {("collective-permute", "stage"), ("all-to-all", "expert")}),
    ],
)
def test_each_axis_is_known_by_its_collective(name, expected):
    found = {(item["kind"], *item["axes"]) for item in document_of(name)["collectives"]}
    assert expected <= found


def test_a_stage_hands_on_at_every_tick():
    """Twice a tick (forward, backward), in both microbatches of the step; 2 * 8 + 1 ticks."""
    collectives = document_of("PP2 interleaved x2 x EP2 x TP2")["collectives"]
    handed = next(item for item in collectives if (item["kind"], item["axes"]) == ("collective-permute", ("stage",)))
    assert handed["count"] == 2 * 2 * (2 * 8 + 1)


def test_a_model_too_large_is_said_to_be_and_by_how_much():
    run = run_of({}, {})
    large = with_model(run, moe=dataclasses.replace(run.model.moe, num_experts=2**22))
    document = compiling.examine(large, EIGHT)
    assert not document["fits"]
    assert document["missing_bytes"] == document["total_bytes"] - document["memory_bytes"] > 10**12
    assert f"does NOT fit, by {document['missing_bytes'] / 1e9:.1f} GB" in compiling.format_document(document)


def test_decoding_counts_one_token_of_each_row():
    document = compiling.examine(run_of({}, {}), EIGHT, "decode")
    assert document["tokens"] == EIGHT.decode_rows
    assert document["compiled_over_executed"] == pytest.approx(1, abs=0.05), document["products"]


def test_experts_on_other_chips_decode_in_whole_blocks():
    document = compiling.examine(run_of({"expert": 2, "tensor": 2, "data": 2}, {}), EIGHT, "decode")
    counted = max(document["products"], key=lambda item: item["flops"])
    assert counted["flops"] == document["executed_flops"]["experts"]
    assert ("all-to-all", ("expert",)) in {(item["kind"], item["axes"]) for item in document["collectives"]}


def test_what_cannot_be_compiled_is_refused_in_one_line():
    run = run_of({"tensor": 2}, {})
    with pytest.raises(CallerError, match="topology=None must be given; give --topology"):
        compiling.examine(run, CompileConfig())
    with pytest.raises(CallerError, match="--program='serve' must be in"):
        compiling.examine(run, EIGHT, "serve")
    with pytest.raises(CallerError, match="spans 2 devices but there are 8"):
        compiling.examine(run, EIGHT)
    with pytest.raises(CallerError, match="num_heads=4 must be divisible by the tensor axis of the mesh"):
        compiling.examine(run_of({"tensor": -1}, {}), EIGHT, "decode")
