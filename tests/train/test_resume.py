"""Which settings may change on resume: named by hand, and each setting of a run in turn."""

import dataclasses
import json
import pathlib

from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.rules import ShardingRules
from gpt4moe.train import resume, schedule
from tests.train import tiny

RUN = tiny.run_config(pathlib.Path("corpus"))
SAVED = json.loads(json.dumps(resume.settings(RUN)))


def test_settings_survive_json_and_are_named_by_their_place():
    assert resume.differences(SAVED, RUN) == []
    assert SAVED["model.moe.num_experts"] == 4
    assert SAVED["data.sources.code.max_epochs"] == 4
    assert SAVED["train.batch_tokens"] == [[0, 128], [384, 256], [1000, 512]]


def test_length_and_housekeeping_may_change():
    longer = tiny.with_train(RUN, steps=99, token_budget=5, checkpoint_every=7, log_every=2, keep_last=9)
    mesh = MeshConfig({"data": 4, "stage": 2}, stage_layers=(1, 1), zero1=True)
    elsewhere = dataclasses.replace(longer, mesh=mesh, rules=ShardingRules(overrides={"embed": []}))
    assert resume.differences(SAVED, elsewhere) == []


def test_a_record_from_before_there_were_rules_is_no_difference():
    before = {name: value for name, value in SAVED.items() if not name.startswith("rules.")}
    assert resume.differences(before, RUN) == []


def test_settings_that_the_library_did_not_have_yet_were_at_their_defaults():
    new = ("model.leading_dense_layers", "model.moe.router", "model.moe.bias_rate", "model.moe.load_balance_scope")
    before = {name: value for name, value in SAVED.items() if name not in new}
    assert resume.differences(before, RUN) == []
    moe = dataclasses.replace(RUN.model.moe, bias_rate=0.1)
    moved = dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, moe=moe))
    assert resume.differences(before, moved) == ["model.moe.bias_rate: 0.0 -> 0.1"]


def test_what_is_trained_may_not_and_is_told_by_name():
    optimizer = dataclasses.replace(RUN.optimizer, learning_rate=0.5)
    changed = dataclasses.replace(tiny.with_train(RUN, seed=3), optimizer=optimizer)
    assert resume.differences(SAVED, changed) == ["optimizer.learning_rate: 0.01 -> 0.5", "train.seed: 0 -> 3"]


def test_a_function_is_known_by_its_import_path():
    shaped = dataclasses.replace(RUN.optimizer.schedule, shape=schedule.wsd)
    changed = dataclasses.replace(RUN, optimizer=dataclasses.replace(RUN.optimizer, schedule=shaped))
    [difference] = resume.differences(SAVED, changed)
    assert difference == "optimizer.schedule.shape: None -> 'gpt4moe.train.schedule.wsd'"
    assert resume.differences(resume.settings(changed), changed) == []


def test_a_source_more_or_less_is_a_difference():
    fewer = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, sources=RUN.data.sources[:1]))
    names = [line.partition(":")[0] for line in resume.differences(SAVED, fewer)]
    assert "data.sources.text.name" in names and not any("code" in name for name in names)
