"""Values of the wrong kind are refused by the name of their setting, not by whatever would meet them first."""

import pytest

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.check import CallerError
from gpt4moe.config.data import DataConfig, SourceConfig
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.optimizer import OptimizerConfig, ScheduleConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.config.train import TrainConfig

REQUIRED = {
    AttentionConfig: {"num_heads": 4},
    MoeConfig: {"num_experts": 4, "experts_per_token": 2, "hidden_dim": 8},
    ModelConfig: {
        **{"num_layers": 2, "model_dim": 32, "vocab_size": 512, "context_length": 64},
        **{"attention": AttentionConfig(4), "moe": MoeConfig(4, 2, 8)},
    },
    OptimizerConfig: {"learning_rate": 1e-3},
    ScheduleConfig: {},
    TrainConfig: {"steps": 8, "token_budget": 10**9, "batch_tokens": 256, "seed": 0, "checkpoint_every": 4},
    TokenizerConfig: {},
    DataConfig: {"sources": (SourceConfig("files", paths=("somewhere",)),), "sequence_length": 64},
    SamplingConfig: {},
    EngineConfig: {},
}
REFUSED = [
    (AttentionConfig, "qk_norm", "no"),
    (AttentionConfig, "rope_theta", float("inf")),
    (MoeConfig, "gated", 1),
    (MoeConfig, "shared_hidden_dim", 1.5),
    (MoeConfig, "load_balance_weight", "x"),
    (MoeConfig, "router_z_weight", float("nan")),
    (ModelConfig, "tie_embeddings", "no"),
    (OptimizerConfig, "learning_rate", float("inf")),
    (OptimizerConfig, "b1", 1.0),
    (OptimizerConfig, "b2", "x"),
    (OptimizerConfig, "weight_decay", None),
    (ScheduleConfig, "warmup_tokens", 1.5),
    (TrainConfig, "seed", -1),
    (TrainConfig, "seed", 1.5),
    (TrainConfig, "keep_best", 1.5),
    (TrainConfig, "batch_tokens", 256.0),
    (TrainConfig, "batch_tokens", (0, 256)),
    (TrainConfig, "batch_tokens", ((0, 256.5),)),
    (TrainConfig, "batch_tokens", ()),
    (TokenizerConfig, "byte_level_only", "yes"),
    (DataConfig, "seed", "x"),
    (DataConfig, "exhaust_together", "yes"),
    (SamplingConfig, "temperature", True),
    (SamplingConfig, "min_p", 1.5),
    (SamplingConfig, "repetition_penalty", 0),
    (SamplingConfig, "repetition_penalty", 1e-7),
    (SamplingConfig, "frequency_penalty", 1e5),
    (SamplingConfig, "logit_bias", {3: -1e5}),
    (SamplingConfig, "presence_penalty", float("nan")),
    (SamplingConfig, "logit_bias", 7),
    (SamplingConfig, "stop", ("a", "")),
    (SamplingConfig, "stop_ids", 3),
    (SamplingConfig, "n", 0),
    (SamplingConfig, "logprobs", -1),
    (SamplingConfig, "prompt_logprobs", "yes"),
    (SamplingConfig, "json_schema", "{"),
    (SamplingConfig, "json_schema", "[" * 100_000),
    (SamplingConfig, "json_schema", "3"),
    (EngineConfig, "slots", 0),
    (EngineConfig, "page_size", 12),
    (EngineConfig, "prefill_chunk", 8),
    (EngineConfig, "num_pages", 1.5),
    (EngineConfig, "deterministic", 1),
]


@pytest.mark.parametrize(("config_type", "setting", "value"), REFUSED, ids=str)
def test_a_value_of_the_wrong_kind_is_refused_by_name(config_type, setting, value):
    with pytest.raises(CallerError) as caught:
        config_type(**REQUIRED[config_type] | {setting: value})
    assert str(caught.value).startswith(f"{setting}=")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("axes", [4, "data", {"data": True}, {"data": 2.0}], ids=str)
def test_a_mesh_is_a_dict_of_sizes(axes):
    with pytest.raises(CallerError, match="MESH="):
        MeshConfig(axes)


def test_one_prompt_may_be_given_as_a_string():
    assert TrainConfig(**REQUIRED[TrainConfig], sample_prompts="def f(").sample_prompts == ("def f(",)


def test_what_is_required_is_enough():
    for config_type, settings in REQUIRED.items():
        assert config_type(**settings) == config_type(**settings)
