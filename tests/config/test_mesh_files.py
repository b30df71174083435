"""Every mesh file, on the devices that it says it is for, with a model and a batch that fit it."""

import math
import pathlib

import pytest

from gpt4moe.config.mesh import MeshConfig
from gpt4moe.configure import build_run

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted(path for path in (ROOT / "gin_configs/mesh").glob("*.gin") if path.stem != "reset")
# Devices in all, and those of one node or slice.
DEVICES = {
    "single": (1, 1),
    "cpu8": (8, 8),
    "gpu8": (8, 8),
    "hsdp": (64, 8),
    "gpu_tp8_pp15_zero1": (24_960, 8),
    "v5p_pod": (2048, 2048),
    "v6e_pod": (256, 256),
}
EVERY_REFERENCE_DIM = [
    "NUM_LAYERS = 120",
    "NUM_EXPERTS = 16",
    "VOCAB_SIZE = 100352",
    "SEQUENCE_LENGTH = 64",
    "model.ModelConfig.model_dim = 12288",
    "attention.AttentionConfig.num_heads = 96",
    "moe.MoeConfig.hidden_dim = 24576",
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_mesh_file_spans_its_devices(path, tmp_path):
    count, in_one_node = DEVICES[path.stem]
    text = path.read_text()
    assert text.startswith("# ") and "# Provides: MeshConfig, MESH" in text and "Requires: " in text
    run_file = tmp_path / "run.gin"
    tiny = (ROOT / "gin_configs/run/tiny.gin").read_text()
    run_file.write_text(tiny.replace("gin_configs/mesh/single.gin", str(path)))
    rows = math.lcm(count, 4)
    run, _ = build_run([str(run_file)], [*EVERY_REFERENCE_DIM, f"BATCH_TOKENS = {64 * rows}"])
    sizes = run.mesh.sizes(count)
    run.check_sizes(sizes)
    assert math.prod(sizes.values()) == count
    assert count // math.prod(run.mesh.dcn_sizes(sizes).values()) == in_one_node
    assert count <= 8 or f"{count:,} " in text


def test_the_reference_layout_keeps_tensors_in_a_node_and_spreads_the_rest():
    run, _ = build_run(["gin_configs/run/tiny.gin", "gin_configs/mesh/gpu_tp8_pp15_zero1.gin"], EVERY_REFERENCE_DIM)
    sizes = run.mesh.sizes(24_960)
    assert (sizes["data"], sizes["stage"], sizes["tensor"]) == (208, 15, 8)
    across = run.mesh.dcn_sizes(sizes)
    assert (across["data"], across["stage"], across["tensor"]) == (208, 15, 1)
    assert run.mesh.zero1
    assert run.mesh.chunk_sizes(run.model.num_moe_layers, 15) == (8,) * 15


def test_pods_are_joined_by_a_degree_given_on_the_command_line():
    """Four v6e pods: the torus keeps fsdp 2 of each, the slow network has 4."""
    overrides = ['mesh.MeshConfig.dcn={"fsdp": 4}', *EVERY_REFERENCE_DIM]
    run, _ = build_run(["gin_configs/run/tiny.gin", "gin_configs/mesh/v6e_pod.gin"], overrides)
    sizes = run.mesh.sizes(1024)
    assert sizes["fsdp"] == 8
    assert run.mesh.dcn_sizes(sizes)["fsdp"] == 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_mesh_file_after_a_run_replaces_all_of_its_mesh(path):
    """The v6e run sets most of what there is to set."""
    sizes = ["NUM_LAYERS = 120", "MICROBATCH_ROWS = None"]
    alone, _ = build_run(["gin_configs/run/tiny.gin", str(path)], [sizes[0], "BATCH_TOKENS = 512"])
    after, _ = build_run(["gin_configs/run/gpt4_1p8t_v6e.gin", str(path)], sizes)
    assert after.mesh == alone.mesh


def test_resetting_a_mesh_leaves_the_defaults():
    run, _ = build_run(["gin_configs/run/gpt4_1p8t_v6e.gin", "gin_configs/mesh/single.gin"], ["MICROBATCH_ROWS = None"])
    assert run.mesh == MeshConfig()
