"""Settings of the mesh and the rules: which superblock lies where, and what is refused in one line."""

import dataclasses

import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.config.mesh import NO_SUPERBLOCK, MeshConfig
from gpt4moe.config.rules import ShardingRules
from gpt4moe.configure import build_run
from tests.config.test_config import MODEL, RUN

STAGE2, STAGE4 = {"stage": 2}, {"stage": 4}
MESHES = [
    ({"dcn": {"rows": 2}}, "dcn={'rows': 2} has unknown axis 'rows'"),
    ({"dcn": {"data": 0}}, "dcn={'data': 0} needs an integer data >= 1, or -1 for the rest"),
    ({"dcn": 2}, "dcn=2 must be a dict of axis sizes"),
    ({"axes": {"data": 6}, "dcn": {"data": 4}}, "dcn['data']=4 must divide MESH's data axis (6); change MESH['data']"),
    ({"axes": {"data": 2}, "dcn": {"stage": 2}}, "dcn['stage']=2 must divide MESH's stage axis (1)"),
    ({"axes": (("data", 2), ("data", 2))}, "MESH=(('data', 2), ('data', 2)) gives data more than once"),
    ({"virtual_stages": 0}, "virtual_stages=0 must be an integer of at least 1"),
    ({"virtual_stages": 2}, "virtual_stages=2 needs a stage axis above 1; set MESH's stage or drop virtual_stages"),
    ({"stage_layers": [1, 1]}, "stage_layers=(1, 1) needs a stage axis above 1"),
    ({"axes": STAGE2, "stage_layers": [2, 0]}, "stage_layers=[2, 0] must be a list of superblocks"),
    ({"axes": STAGE2, "stage_layers": 4}, "stage_layers=4 must be a list of superblocks"),
    ({"stage_microbatches": 4}, "stage_microbatches=4 needs a stage axis above 1"),
    ({"axes": STAGE2, "stage_microbatches": 1.5}, "stage_microbatches=1.5 must be an integer"),
    ({"axes": {"fsdp": 2}, "zero1": True}, "zero1=True needs a data axis above 1"),
    ({"zero1": "yes"}, "zero1='yes' must be True or False"),
    ({"axes": {"data": 2}, "sequence_parallel": True}, "sequence_parallel=True needs a tensor axis above 1"),
]
RUNS = [
    (
        {"axes": STAGE4},
        {},
        "stage=4 needs 4 chunks of at least one superblock (stage * virtual_stages) but there are 2",
    ),
    ({"axes": STAGE2, "virtual_stages": 2}, {}, "stage=2 needs 4 chunks"),
    ({"axes": STAGE2}, {"num_layers": 5}, "stage_layers=None must be given where 5 superblocks do not divide over 2"),
    ({"axes": STAGE2, "stage_layers": [2]}, {}, "stage_layers=(2,) needs 2 chunks"),
    ({"axes": STAGE2, "stage_layers": [2, 1]}, {}, "stage_layers=(2, 1) sums to 3 but the model has 2 superblocks"),
    ({"axes": {"data": 8}}, {}, "microbatch_rows=4 must be divisible by the data*fsdp*expert axes (8)"),
    (
        {"axes": {**STAGE2, "fsdp": 2}, "stage_microbatches": 4},
        {},
        "microbatch_rows=4 must be divisible by the data*fsdp*expert axes (2) times stage_microbatches (4)",
    ),
    (
        {"axes": STAGE2, "virtual_stages": 2, "stage_microbatches": 1},
        {"num_layers": 4},
        "virtual_stages=2 needs at least as many microbatches in a pass (1) as stages (2)",
    ),
    ({"axes": {"context": 3}}, {}, "sequence_length=64 must be divisible by the context axis (3)"),
    (
        {"axes": {"tensor": 4, "context": 3}, "sequence_parallel": True},
        {},
        "sequence_length=64 must be divisible by the context * tensor axes (12)",
    ),
    ({"axes": {"tensor": 3}}, {}, "num_heads=4 must be divisible by the tensor axis of the mesh (3); change num_heads"),
    ({"axes": {"expert": 3}}, {}, "num_experts=4 must be divisible by the expert axis of the mesh (3)"),
    ({"axes": {"tensor": 4}}, {"vocab_size": 514}, "vocab_size=514 must be divisible by the tensor axis of the mesh"),
]
RULES = [
    ({"overrides": {"head": ["tensor"]}}, "has unknown dim 'head'"),
    ({"overrides": {"heads": ["tensors"]}}, "ShardingRules.overrides['heads']=['tensors'] must be a list of axes"),
    ({"overrides": {"heads": "tensor"}}, "ShardingRules.overrides['heads']='tensor' must be a list of axes"),
    ({"overrides": {"heads": ["tensor", "tensor"]}}, "must name every axis once"),
    ({"overrides": 3}, "ShardingRules.overrides=3 must be a dict"),
    ({"batch_axes": ["rows"]}, "ShardingRules.batch_axes=['rows'] must be a list of axes"),
    ({"rules": (("embed", ()), ("embed", ()))}, "must name every logical dim once"),
]


def refused(make, message: str) -> None:
    with pytest.raises(CallerError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "message"), MESHES, ids=str)
def test_a_mesh_that_contradicts_itself_is_refused(settings, message):
    refused(lambda: MeshConfig(**settings), message)


@pytest.mark.parametrize(("settings", "model", "message"), RUNS, ids=str)
def test_a_mesh_that_the_model_or_the_batch_does_not_fit_is_refused(settings, model, message):
    config = dataclasses.replace(MODEL, **model)
    refused(lambda: dataclasses.replace(RUN, model=config, mesh=MeshConfig(**settings)), message)


@pytest.mark.parametrize(("settings", "message"), RULES, ids=str)
def test_rules_that_name_no_dim_or_axis_are_refused(settings, message):
    refused(lambda: ShardingRules(**settings), message)


def test_what_only_the_devices_show_is_refused_when_they_are_known():
    """With -1 the sizes are open: two devices leave `data` at 1, which ZeRO-1, a network degree and rows then miss."""
    axes = {"data": -1, "tensor": 2}
    assert MeshConfig(axes, zero1=True).sizes(8)["data"] == 4
    refused(lambda: MeshConfig(axes, zero1=True).sizes(2), "zero1=True needs a data axis above 1")
    refused(lambda: MeshConfig(axes, dcn={"data": 2}).sizes(6), "dcn['data']=2 must divide MESH's data axis (3)")
    run = dataclasses.replace(RUN, mesh=MeshConfig(axes))
    run.check_sizes(run.mesh.sizes(8))
    refused(lambda: run.check_sizes(run.mesh.sizes(6)), "microbatch_rows=4 must be divisible by")


def test_a_pass_is_cut_into_one_row_per_device_unless_said_otherwise():
    sizes = MeshConfig({"stage": 2, "fsdp": 2}).sizes(4)
    assert dataclasses.replace(RUN, mesh=MeshConfig(dict(sizes))).stage_microbatches(sizes) == 2
    coarse = MeshConfig(dict(sizes), stage_microbatches=1)
    assert dataclasses.replace(RUN, mesh=coarse).stage_microbatches(sizes) == 1


def test_slots_of_even_stages_are_in_counting_order():
    assert MeshConfig().placement(3, 1) == (0, 1, 2)
    assert MeshConfig(STAGE4).placement(8, 4) == tuple(range(8))


def test_interleaved_stages_hold_every_second_chunk():
    """Eight superblocks in four chunks of two: the first stage holds chunks 0 and 2, the second 1 and 3."""
    mesh = MeshConfig(STAGE2, virtual_stages=2)
    assert mesh.placement(8, 2) == (0, 1, 4, 5, 2, 3, 6, 7)


def test_a_short_chunk_is_padded_to_the_longest():
    """The stage with the embedding has one superblock where the others have two; interleaved, chunk by chunk."""
    pad = NO_SUPERBLOCK
    assert MeshConfig(STAGE2, stage_layers=[1, 2]).placement(3, 2) == (0, pad, 1, 2)
    mesh = MeshConfig(STAGE2, virtual_stages=2, stage_layers=(1, 2, 2, 1))
    assert mesh.chunk_sizes(6, 2) == (1, 2, 2, 1)
    assert mesh.placement(6, 2) == (0, pad, 3, 4, 1, 2, 5, pad)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("virtual", [1, 2, 3])
def test_every_superblock_has_one_slot(stages, virtual):
    mesh = MeshConfig({"stage": -1}, virtual_stages=virtual)
    held = mesh.placement(24, stages)
    assert sorted(held) == list(range(24))
    assert [held[slot] for slot in range(24 // stages // virtual)] == list(range(24 // stages // virtual))


def test_an_override_replaces_one_entry_of_the_table():
    rules = ShardingRules(overrides={"mlp": ["tensor", "fsdp"], "embed": []})
    assert rules.axes_of("mlp") == ("tensor", "fsdp")
    assert rules.axes_of("embed") == ()
    assert rules.axes_of("heads") == ShardingRules().axes_of("heads")
    assert hash(rules) == hash(ShardingRules(overrides=(("mlp", ("tensor", "fsdp")), ("embed", ()))))


def test_layouts_are_set_from_the_command_line_and_saved(tmp_path):
    overrides = [
        'MESH={"stage": 2, "tensor": 2}',
        'mesh.MeshConfig.dcn={"stage": 2}',
        "mesh.MeshConfig.stage_layers=[1, 1]",
        "mesh.MeshConfig.sequence_parallel=True",
        'rules.ShardingRules.overrides={"vocab": []}',
    ]
    run, text = build_run(["gin_configs/run/tiny.gin"], overrides)
    assert run.mesh == MeshConfig(
        {"stage": 2, "tensor": 2}, dcn={"stage": 2}, stage_layers=(1, 1), sequence_parallel=True
    )
    assert run.rules.axes_of("vocab") == ()
    saved = tmp_path / "config.gin"
    saved.write_text(text)
    assert build_run([str(saved)])[0] == run


def test_a_saved_configuration_from_before_there_were_rules_still_loads(tmp_path):
    run, text = build_run(["gin_configs/run/tiny.gin"])
    new = (
        "rules",
        *(f"mesh.MeshConfig.{field.name}" for field in dataclasses.fields(MeshConfig) if field.name != "axes"),
    )
    settings = [part for part in text.split("\n\n") if not part.startswith("# Parameters for rules.")]
    lines = [line for line in "\n\n".join(settings).splitlines() if not line.startswith(new)]
    kept = "\n".join(line for line in lines if "rules" not in line)
    assert "MESH = {}" in kept and "virtual_stages" not in kept and "ShardingRules" not in kept
    saved = tmp_path / "config.gin"
    saved.write_text(kept)
    assert build_run([str(saved)])[0] == run
