"""Configurations refuse what cannot work, in one line that names setting, value, constraint and mend."""

import dataclasses

import pytest

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.check import CallerError
from gpt4moe.config.data import DataConfig, SourceConfig
from gpt4moe.config.mesh import MESH_AXES, MeshConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.optimizer import OptimizerConfig, ScheduleConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.config.train import TrainConfig

ATTENTION = AttentionConfig(num_heads=4)
MOE = MoeConfig(num_experts=4, experts_per_token=2, hidden_dim=8)
MODEL = ModelConfig(2, 32, 512, 64, ATTENTION, MOE)
SOURCE = SourceConfig("files", paths=("somewhere",))
DATA = DataConfig((SOURCE,), sequence_length=64, tokenizer=TokenizerConfig(vocab_size=512))
TRAIN = TrainConfig(steps=8, token_budget=10**9, batch_tokens=256, seed=0, checkpoint_every=4)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
RUN = RunConfig(MODEL, DATA, OPTIMIZER, TRAIN)

REFUSED = [
    (ATTENTION, {"num_heads": 0}, "num_heads=0"),
    (ATTENTION, {"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads (4)"),
    (ATTENTION, {"head_dim": 5}, "head_dim=5 must be even"),
    (MOE, {"experts_per_token": 5}, "experts_per_token=5 must be at most num_experts (4)"),
    (MOE, {"experts_per_token": 1}, "normalize_gates=True gives the router no gradient"),
    (MOE, {"capacity_factor": 0}, "capacity_factor=0 must be a number above 0"),
    (MOE, {"load_balance_weight": -1}, "load_balance_weight=-1"),
    (MODEL, {"model_dim": 30}, "model_dim=30 must be an even multiple of num_heads (4)"),
    (MODEL, {"moe_every": 3}, "num_layers=2 must be a multiple of moe_every (3)"),
    (MODEL, {"moe_every": 2}, "dense_hidden_dim=None"),
    (MODEL, {"leading_dense_layers": 1}, "dense_hidden_dim=None"),
    (MODEL, {"leading_dense_layers": 2}, "leading_dense_layers=2 must be less than num_layers (2)"),
    (MODEL, {"leading_dense_layers": 1, "moe_every": 2}, "num_layers=2 less leading_dense_layers (1) must be a"),
    (MODEL, {"compute_dtype": "float16"}, "compute_dtype='float16'"),
    (SOURCE, {"name": "no good"}, "name='no good'"),
    (SOURCE, {"paths": ()}, "give either paths or documents"),
    (SOURCE, {"documents": print}, "give either paths or documents"),
    (SOURCE, {"weight": -1}, "weight=-1 must be a number of at least 0"),
    (SOURCE, {"spelled": 1}, "spelled=1 must be True or False"),
    (DATA, {"sources": ()}, "sources=()"),
    (DATA, {"sources": (SOURCE, SOURCE)}, "must have different names"),
    (DATA, {"exhaust_together": True}, "needs max_epochs on every source"),
    (TRAIN, {"steps": 0}, "steps=0 must be an integer of at least 1"),
    (TRAIN, {"batch_tokens": ((5, 256),)}, "must start with (0, tokens)"),
    (TRAIN, {"batch_tokens": ((0, 512), (100, 256))}, "must rise in both numbers"),
    (OPTIMIZER, {"learning_rate": -1}, "learning_rate=-1"),
    (OPTIMIZER, {"b1": 1.5}, "b1=1.5 must lie between 0 and 1"),
    (ScheduleConfig(), {"final_fraction": 2}, "final_fraction=2"),
    (TokenizerConfig(), {"vocab_size": 271}, "vocab_size=271 must be at least 272: bytes and special tokens"),
    (RUN, {"data": dataclasses.replace(DATA, sequence_length=65)}, "sequence_length=65 must be at most"),
    (RUN, {"train": dataclasses.replace(TRAIN, batch_tokens=100)}, "batch_tokens=100 must be a multiple of"),
    (RUN, {"data": dataclasses.replace(DATA, held_out_fraction=1.0)}, "held_out_fraction=1.0 must leave text"),
    (RUN, {"model": dataclasses.replace(MODEL, vocab_size=300)}, "tokenizer.vocab_size=512 must be at most"),
]


@pytest.mark.parametrize(("valid", "change", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refuses_in_one_line(valid, change, message):
    with pytest.raises(CallerError) as caught:
        dataclasses.replace(valid, **change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_configurations_are_hashable_and_equal_by_value():
    again = dataclasses.replace(RUN, train=dataclasses.replace(TRAIN))
    assert hash(again) == hash(RUN)
    assert again == RUN


def test_one_batch_is_one_microbatch_unless_said_otherwise():
    assert RUN.microbatch_rows == 256 // 64
    ramp = dataclasses.replace(TRAIN, batch_tokens=[[0, 256], [10_000, 1024]])
    assert ramp.ramp == ((0, 256), (10_000, 1024))
    assert dataclasses.replace(RUN, train=ramp).microbatch_rows == 4


def test_a_mesh_axis_may_be_inferred():
    sizes = MeshConfig({"fsdp": -1, "tensor": 2}).sizes(8)
    assert sizes == {**dict.fromkeys(MESH_AXES, 1), "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": 2, "tensor": -1, "fsdp": 3}])
def test_a_mesh_that_does_not_span_the_devices_is_refused(axes):
    with pytest.raises(CallerError, match="devices"):
        MeshConfig(axes).sizes(8)


@pytest.mark.parametrize("axes", [{"rows": 2}, {"data": 0}, {"data": -1, "fsdp": -1}])
def test_a_mesh_with_a_bad_axis_is_refused(axes):
    with pytest.raises(CallerError, match="MESH="):
        MeshConfig(axes)
