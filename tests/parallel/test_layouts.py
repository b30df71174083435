"""Every layout gives the single device's losses, gradients, gradient norm and parameters, from bit-equal beginnings.

Inputs have no router ties; Adam's epsilon is 1e-6, so that a gradient that differs in its last bits moves a parameter
by no more than its share.
"""

import dataclasses
import functools
from fractions import Fraction

import jax
import numpy as np
import pytest
from flax import nnx

from gpt4moe.accounting import pipeline
from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.data import DataConfig, ImageConfig, SourceConfig
from gpt4moe.config.mesh import MeshConfig, grouped_placement
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.optimizer import OptimizerConfig
from gpt4moe.config.rules import ShardingRules
from gpt4moe.config.run import RunConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.config.train import TrainConfig
from gpt4moe.config.vision import CrossAttentionConfig, EncoderConfig, ResamplerConfig, VisionConfig
from gpt4moe.model import layout, routers
from gpt4moe.parallel import sharding
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.train import feed, state
from gpt4moe.train.step import make_step
from gpt4moe.types import Batch

LENGTH, ROWS, VOCAB, SOURCES, STEPS, IMAGES = 16, 8, 320, 2, 3, 2
CAPACITY = {"capacity": 0.8, "dropless": None}
MODELS = {
    "plain": {},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "dense": {"moe": MoeConfig(1, 1, 16, normalize_gates=False, load_balance_weight=0.0, router_z_weight=0.0)},
    # The first and then every second layer dense, a shared expert, a head of its own, a key and value head for every
    # query head.
    "mixed": {"leading_dense_layers": 1, "moe_every": 2, "dense_hidden_dim": 16, "tie_embeddings": False},
}
# Noise of every row's own, loads of the whole batch that move a bias and weigh the balance loss; on two microbatches
# the batch's counts go from one to the next.
ROUTED = {"num_experts": 8, "experts_per_token": 2, "hidden_dim": 8, "load_balance_weight": 0.1, "bias_rate": 0.01}
ROUTED |= {"router": routers.noisy_top_k, "router_z_weight": 0.1}
MODELS |= {
    "routed": {"moe": MoeConfig(**ROUTED, load_balance_scope="microbatch")},
    "routed over the batch": {"moe": MoeConfig(**ROUTED, load_balance_scope="batch")},
    "group-limited": {"moe": MoeConfig(8, 2, 8, router=routers.group_limited, num_groups=4, groups_per_token=2)},
}
# Every layer, or every second one, reads the images of its rows; the gates are open.
ENCODER = EncoderConfig(height=8, width=12, patch_size=4, dim=16, num_layers=2, num_heads=2, hidden_dim=16)
CROSS = CrossAttentionConfig(every=1, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=16, gate_init=0.7)
RESAMPLER = ResamplerConfig(num_latents=4, num_layers=1, num_heads=2, hidden_dim=16)
MODELS |= {
    "vision": {"vision": VisionConfig(ENCODER, CROSS)},
    "vision in groups": {"vision": VisionConfig(ENCODER, dataclasses.replace(CROSS, every=2, offset=1), RESAMPLER)},
}
# What is added to every key alike moves no weight of a softmax: its gradient is rounding and nothing else.
NO_EFFECT = "['vision_encoder']['blocks']['key']['bias']"
TOLERANCE = dict.fromkeys(MODELS, 1e-5) | {"bfloat16": 2e-2}
EXPERTS_ON_TENSOR = {"experts": ["expert", "tensor"], "mlp": []}


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A layout: its mesh, other mesh settings, its own entries of the rules; and what it is tried on."""

    axes: dict
    settings: dict = dataclasses.field(default_factory=dict)
    rules: dict = dataclasses.field(default_factory=dict)
    model: str = "plain"
    layers: int = 4
    query_chunk: int = LENGTH
    microbatch_rows: int = ROWS
    dispatchers: tuple[str, ...] = tuple(CAPACITY)


LAYOUTS = {
    "DP2": Row({"data": 2}),
    "DP8": Row({"data": 8}),
    "FSDP2": Row({"fsdp": 2}),
    "FSDP8": Row({"fsdp": 8}),
    "TP2": Row({"tensor": 2}),
    "TP2, bfloat16": Row({"tensor": 2}, model="bfloat16", dispatchers=("dropless",)),
    "TP4": Row({"tensor": 4}),
    "TP4 sequence parallel": Row({"tensor": 4}, {"sequence_parallel": True}),
    "EP2": Row({"expert": 2}),
    "EP2 x FSDP2, bfloat16": Row({"expert": 2, "fsdp": 2}, model="bfloat16", dispatchers=("dropless",)),
    "EP4": Row({"expert": 4}),
    "EP8": Row({"expert": 8}),
    "CP2": Row({"context": 2}, query_chunk=3),  # three blocks of the eight queries of a device
    "CP4": Row({"context": 4}),
    "PP2": Row({"stage": 2}),
    "PP4": Row({"stage": 4}, {"stage_microbatches": 4}),
    "PP2 interleaved x2": Row({"stage": 2}, {"virtual_stages": 2}),
    "PP2 interleaved x2, two passes": Row(
        {"stage": 2}, {"virtual_stages": 2}, microbatch_rows=ROWS // 2, dispatchers=("capacity",)
    ),
    "PP4 interleaved x2": Row({"stage": 4}, {"virtual_stages": 2}, layers=8),
    "PP2 uneven": Row({"stage": 2}, {"stage_layers": (1, 3)}),
    "PP2 uneven interleaved": Row({"stage": 2}, {"virtual_stages": 2, "stage_layers": (1, 2, 1, 1)}, layers=5),
    "ZeRO-1": Row({"data": 4}, {"zero1": True}),
    "ZeRO-1 x TP4": Row({"data": 2, "tensor": 4}, {"zero1": True}),
    "HSDP": Row({"data": 2, "fsdp": 4}, {"dcn": {"data": 2}}),
    "TP2 x EP2 x FSDP2": Row({"tensor": 2, "expert": 2, "fsdp": 2}, {"sequence_parallel": True}),
    "PP2 x TP2 x EP2": Row({"stage": 2, "tensor": 2, "expert": 2}),
    "PP2 x TP2 x ZeRO-1": Row({"stage": 2, "tensor": 2, "data": 2}, {"zero1": True, "sequence_parallel": True}),
    "PP2 x TP2, mixed layers, vocabulary over both": Row(
        {"stage": 2, "tensor": 2},
        rules={"vocab": ["tensor", "stage"]},
        model="mixed",
        layers=5,
        dispatchers=("capacity",),
    ),
    "TP2 x EP2, mixed layers, keys and values split": Row(
        {"tensor": 2, "expert": 2}, rules={"kv_heads": ["tensor"]}, model="mixed", layers=5, dispatchers=("capacity",)
    ),
    "EP2 x TP2, dense": Row({"expert": 2, "tensor": 2}, model="dense", dispatchers=("dropless",)),
    "CP2 x TP2": Row({"context": 2, "tensor": 2}),
    "CP2 x EP2 x TP2": Row({"context": 2, "expert": 2, "tensor": 2}, {"sequence_parallel": True}),
    "PP2 x CP2 x EP2": Row({"stage": 2, "context": 2, "expert": 2}, {"virtual_stages": 2}),
    "routed, EP4": Row({"expert": 4}, model="routed", dispatchers=("dropless",)),
    "group-limited, EP4": Row({"expert": 4}, model="group-limited", dispatchers=("dropless",)),  # two experts a device
    "routed, PP2": Row({"stage": 2}, model="routed", dispatchers=("dropless",)),
    "routed, CP2 x EP2 x TP2": Row({"context": 2, "expert": 2, "tensor": 2}, model="routed", dispatchers=("dropless",)),
    "routed over the batch, FSDP2 x TP2, two passes": Row(
        {"fsdp": 2, "tensor": 2}, model="routed over the batch", microbatch_rows=ROWS // 2, dispatchers=("dropless",)
    ),
    "experts over EP2 x TP2": Row({"expert": 2, "tensor": 2, "data": 2}, rules=EXPERTS_ON_TENSOR),
    "experts over EP2 x TP2, sequence parallel": Row(
        {"expert": 2, "tensor": 2, "context": 2}, {"sequence_parallel": True}, EXPERTS_ON_TENSOR
    ),
    "vision, DP2": Row({"data": 2}, model="vision", dispatchers=("dropless",)),
    "vision, CP2 x TP2 x FSDP2": Row(
        {"context": 2, "tensor": 2, "fsdp": 2}, {"sequence_parallel": True}, model="vision", dispatchers=("dropless",)
    ),
    "vision, EP2 x ZeRO-1, two passes": Row(
        {"expert": 2, "data": 2}, {"zero1": True}, model="vision", microbatch_rows=ROWS // 2, dispatchers=("dropless",)
    ),
    "vision, PP2": Row({"stage": 2}, model="vision", dispatchers=("dropless",)),
    "vision in groups, FSDP2": Row({"fsdp": 2}, model="vision in groups", dispatchers=("dropless",)),
    "vision in groups, PP2 interleaved x2": Row(
        {"stage": 2}, {"virtual_stages": 2}, model="vision in groups", layers=8, dispatchers=("dropless",)
    ),
    "vision in groups, PP2 uneven x TP2": Row(
        {"stage": 2, "tensor": 2},
        {"stage_layers": (2, 4)},
        model="vision in groups",
        layers=6,
        dispatchers=("dropless",),
    ),
}


@functools.cache
def one_device(model, layers, microbatch_rows):
    return Row({}, model=model, layers=layers, microbatch_rows=microbatch_rows)


def run_of(dispatch, row):
    """Layers of eight experts, both auxiliary losses; grouped-query attention in all but the mixed model."""
    mixed = row.model == "mixed"
    moe = {"capacity_factor": CAPACITY[dispatch], "load_balance_weight": 0.1, "router_z_weight": 0.1}
    model = ModelConfig(
        num_layers=row.layers,
        model_dim=16,
        vocab_size=VOCAB,
        context_length=LENGTH,
        attention=AttentionConfig(4, 4 if mixed else 2, qk_norm=True, query_chunk=row.query_chunk),
        **{
            "moe": MoeConfig(8, 2, hidden_dim=8, shared_hidden_dim=8 if mixed else 0, **moe),
            "compute_dtype": "float32",
            "remat": "full",
        }
        | MODELS[row.model],
    )
    tokenizer = TokenizerConfig(VOCAB, byte_level_only=True)
    images = ImageConfig(ENCODER.height, ENCODER.width, per_row=IMAGES) if model.vision else None
    data = DataConfig((SourceConfig("text", paths=("unused",)),), LENGTH, tokenizer, images=images)
    train = TrainConfig(STEPS, 10**9, ROWS * LENGTH, seed=0, checkpoint_every=100, microbatch_rows=row.microbatch_rows)
    optimizer, rules = OptimizerConfig(1e-2, epsilon=1e-6), ShardingRules(overrides=row.rules)
    return RunConfig(model, data, optimizer, train, MeshConfig(row.axes, **row.settings), rules)


def batch_at(step, with_images):
    """Rows of two segments and some padding, weights at random; each segment with an image before its second token."""
    draw = np.random.default_rng(step)
    shape = (ROWS, LENGTH)
    place_BT = np.broadcast_to(np.arange(LENGTH), shape)
    ends_B1, splits_B1 = draw.integers(LENGTH // 2, LENGTH + 1, (ROWS, 1)), draw.integers(1, LENGTH // 2, (ROWS, 1))
    segment_ids = np.where(place_BT >= ends_B1, 0, 1 + (place_BT >= splits_B1)).astype(np.int32)
    images = {}
    if with_images:
        image_index = np.where(place_BT >= splits_B1 + 1, 1, np.where((place_BT >= 1) & (place_BT < splits_B1), 0, -1))
        pixels = draw.integers(0, 256, (ROWS, IMAGES, ENCODER.height, ENCODER.width, 3)).astype(np.uint8)
        seen = dict.fromkeys(("image_index", "first_image"), image_index.astype(np.int32))
        images = {"images": pixels, "image_valid": np.ones((ROWS, IMAGES), bool), **seen}
    return Batch(
        **images,
        tokens=draw.integers(0, VOCAB, shape).astype(np.int32),
        targets=draw.integers(0, VOCAB, shape).astype(np.int32),
        loss_weights=(draw.uniform(0, 1, shape) * (segment_ids > 0)).astype(np.float32),
        positions=np.where(place_BT >= splits_B1, place_BT - splits_B1, place_BT).astype(np.int32),
        segment_ids=segment_ids,
        source_ids=draw.integers(0, SOURCES, shape).astype(np.int32),
    )


@dataclasses.dataclass(frozen=True)
class Course:
    """Three steps: parameters before and after, gradients of the first step as clipped, what every step measured."""

    first: dict
    last: dict
    gradients: dict
    metrics: list


def run_and_mesh(dispatch, row):
    run = run_of(dispatch, row)
    return run, make_mesh(run.mesh, jax.devices()[: int(np.prod(list(row.axes.values()), dtype=int))])


@functools.cache
def beginning(row):
    """The state before the first step, the same for every dispatcher."""
    run, mesh = run_and_mesh("dropless", row)
    return state.create_state(run, state.abstract_state(run, mesh))


@functools.cache
def course(dispatch, row):
    run, mesh = run_and_mesh(dispatch, row)
    abstract = state.abstract_state(run, mesh)
    at = jax.tree.map(lambda leaf: leaf.copy(), beginning(row))
    first = leaves_in_order(at.params, run, mesh)
    step, passes = make_step(run, SOURCES, abstract), ROWS // row.microbatch_rows
    rows, metrics = feed.abstract_microbatches(run, sharding.batch_sharding(mesh, run.rules)), []
    for number in range(STEPS):
        batch = jax.tree.map(
            lambda leaf, room: jax.device_put(leaf.reshape(room.shape), room.sharding),
            batch_at(number, run.model.vision is not None),
            rows,
        )
        at, measured = step(at, batch, np.int32(passes), np.float32(0))
        metrics.append(jax.device_get(measured))
        if number == 0:
            moments = next(leaf for leaf in at.opt_state[1] if hasattr(leaf, "mu")).mu
            gradients = {
                path: leaf / (1 - run.optimizer.b1) for path, leaf in leaves_in_order(moments, run, mesh).items()
            }
    return Course(first, leaves_in_order(at.params, run, mesh), gradients, metrics)


def leaves_in_order(params, run, mesh):
    """Arrays by path, stacks with their superblocks in order."""
    slots = state.run_layout(run, mesh).slots or tuple(range(run.model.num_moe_layers))
    each = run.model.superblocks_per_cross_attention
    groups = grouped_placement(slots, each)
    orders = {
        "layers": [slots.index(block) for block in range(run.model.num_moe_layers)],
        "cross_layers": [groups.index(block) for block in range(run.model.num_cross_attention_layers)],
    }
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf.get_value())[
            orders.get(leaf.get_metadata()["logical_axes"][0], slice(None))
        ]
        for path, leaf in flat
    }


def difference(got, want):
    return float(np.linalg.norm(np.float64(got) - want) / max(np.linalg.norm(want), 1e-30))


def assert_idle_as_counted(run, mesh, idle_slots):
    """What the stages counted over all passes of a step is what the formula says."""
    stages, virtual = mesh.shape["stage"], run.mesh.virtual_stages
    sizes, pieces = run.mesh.chunk_sizes(run.model.num_moe_layers, stages), run.stage_microbatches(mesh.shape)
    idle, slots = (int(number) for number in idle_slots)
    ticks = pipeline.num_ticks(stages, pieces, virtual) * ROWS // run.microbatch_rows
    assert slots == ticks * stages * max(sizes)
    assert Fraction(idle, slots) == pipeline.uneven_idle_fraction(sizes, stages, pieces)


CASES = [pytest.param(row, name, id=f"{label}-{name}") for label, row in LAYOUTS.items() for name in row.dispatchers]


@pytest.mark.parametrize(("row", "dispatch"), CASES)
def test_a_layout_equals_one_device(row, dispatch, monkeypatch):
    monkeypatch.setattr(layout, "MOST_UNROLLED", 0)  # a loop compiles faster
    alone = row.microbatch_rows if row.model.startswith("routed") else ROWS  # noise belongs to a microbatch's rows
    got, want = course(dispatch, row), course(dispatch, one_device(row.model, row.layers, alone))
    tolerance = TOLERANCE[row.model]
    for path, leaf in want.first.items():
        np.testing.assert_array_equal(got.first[path], leaf, err_msg=path)
    # After a step in bfloat16 some tokens choose other experts: the router's logits are nearly equal somewhere.
    compared = 1 if row.model == "bfloat16" else STEPS
    for mine, theirs in zip(got.metrics[:compared], want.metrics[:compared], strict=True):
        # After a step the parameters differ by as much as they may, and so do these.
        of_gradients = tolerance if mine is got.metrics[0] else 10 * tolerance
        assert difference(mine.grad_norm, theirs.grad_norm) < of_gradients
        assert difference(mine.expert_grad_norm_LE, theirs.expert_grad_norm_LE) < of_gradients
        for path, leaf in jax.tree_util.tree_leaves_with_path(theirs.sums):
            mine_leaf = functools.reduce(lambda tree, key: getattr(tree, key.name), path, mine.sums)
            assert difference(mine_leaf, leaf) < tolerance, path
        if "stage" in row.axes:
            assert_idle_as_counted(*run_and_mesh(dispatch, row), mine.sums.idle_slots)
    gradients, last = ({p: leaf for p, leaf in of.items() if p != NO_EFFECT} for of in (want.gradients, want.last))
    wrong = {path: difference(got.gradients[path], leaf) for path, leaf in gradients.items()}
    assert max(wrong.values()) < tolerance, wrong
    wrong = {path: difference(got.last[path], leaf) for path, leaf in last.items()}
    assert max(wrong.values()) < 10 * tolerance, wrong
    if run_and_mesh(dispatch, row)[0].model.vision:
        names = [f"['cross_attention']['{part}_gate']" for part in ("attention", "feed_forward")]
        gates_2L = np.tanh([got.last[name] for name in names])
        assert len(np.unique(gates_2L)) == gates_2L.size  # so that their order shows
        np.testing.assert_allclose(got.metrics[-1].gates_2L, gates_2L, rtol=1e-5)
    assert want.metrics[0].grad_norm > 1.0  # clipping is at work
    assert (np.sum(want.metrics[0].sums.moe.dropped) > 0) == (dispatch == "capacity")
