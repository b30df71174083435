"""`plan search --verify`: a found layout beside the program that our trainer compiles for it, without the machine.

In: a run and a `search.Costed` of the space "ours". Out: predicted and compiled FLOPs, bytes of memory and bytes sent,
on one chip. A TPU is compiled for as it is; for other chips as many CPU devices are emulated, where they are few.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.memory import DTYPE_BYTES
from gpt4moe.accounting.pipeline import idle_fraction
from gpt4moe.config.compile import CompileConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.plan.search import gin_export
from gpt4moe.plan.search.ranking import Costed
from gpt4moe.plan.training.layer_time import ACTIVATION_BYTES
from gpt4moe.plan.training.memory import stage_parameters
from gpt4moe.plan.training.own_memory import kept_free_bytes

MOST_EMULATED = 64
TORUS_GENERATIONS = {"tpu_v4": "v4", "tpu_v5e": "v5e", "tpu_v5p": "v5p", "tpu_v6e": "v6e"}
LEAST_SENT = "sent bytes are predicted as the least that the algorithms need; what XLA gathers beyond is not in them"
PURPOSES = ("tensor", "context", "expert", "stage", "replicas")


def verify(run: RunConfig, item: Costed) -> dict:
    """Returns the rows `predicted`, `compiled` by what they are of; or `reason` where nothing can be compiled here."""
    chips = item.layout.chips
    topology = topology_of(item.job.chip, chips)
    if topology is None:
        reason = f"{chips:,} x {item.job.chip.name} can be neither emulated (at most {MOST_EMULATED}) nor compiled for"
        return {"compiled": False, "reason": reason, "rows": []}
    from gpt4moe.plan.compiled import compile as compiling  # JAX

    compiled = compiling.examine(gin_export.applied(run, item), CompileConfig(topology=topology))
    return {
        "compiled": True,
        "topology": topology,
        "mesh": compiled["mesh"],
        "fits": compiled["fits"],
        "rows": compared(item, compiled, DTYPE_BYTES[run.model.compute_dtype], _exchange_room(run, item, topology)),
        "compile_seconds": compiled["compile_seconds"],
        "note": LEAST_SENT,
    }


def compared(item: Costed, compiled: dict, value_bytes: int = ACTIVATION_BYTES, room: float = 1.0) -> list[dict]:
    """Returns rows of name, predicted, compiled, ratio for a document of `gpt4moe compile`.

    Memory is compared without what is kept free, for the runtime and for what is missed. value_bytes, room: as
    `sent_bytes` has them.
    """
    there, sent = item.memory, sent_bytes(item, value_bytes, room)
    state = there.weight_bytes + there.optimizer_bytes
    beside = there.total_bytes - kept_free_bytes(item.job.chip) - state
    found = dict.fromkeys(PURPOSES, 0.0)
    for collective in compiled["collectives"]:
        found[purpose(collective["kind"], collective["axes"])] += collective["bytes_sent"]
    pairs = [
        ("flops", compiled["executed_flops_per_chip"], compiled["flops_per_chip"]),
        ("state_bytes", state, compiled["argument_bytes"]),
        ("temporary_bytes", beside, compiled["temporary_bytes"]),
        ("total_bytes", state + beside, compiled["total_bytes"]),
        *((f"{name}_sent_bytes", sent[name], found[name]) for name in PURPOSES if sent[name] or found[name]),
    ]
    return [
        {"name": name, "predicted": ours, "compiled": theirs, "ratio": theirs / ours if ours else None}
        for name, ours, theirs in pairs
    ]


def purpose(kind: str, axes: Sequence[str]) -> str:
    """Returns what a collective over these mesh axes is for: one of `PURPOSES`."""
    if "stage" in axes or kind.startswith("send"):
        return "stage"
    if "all-to-all" in kind and "expert" in axes:
        return "expert"
    if set(axes) & {"data", "fsdp", "expert"}:
        return "replicas"
    return "context" if "context" in axes else "tensor"


def sent_bytes(item: Costed, value_bytes: int = ACTIVATION_BYTES, room: float = 1.0) -> dict[str, float]:
    """Returns the bytes that a chip sends in a step by purpose, rings all: what `step_time` reckons seconds from.

    value_bytes: of an activation or a weight on the wire; room: places of an exchange of experts over the choices in
    them. Ticks of our pipeline without work send too. Korthikanti et al. 2022 (2205.05198), section 4.2, for tensor;
    Rajbhandari et al. 2020 (1910.02054), section 7, for replicas.
    """
    shape, layout = item.job.shape, item.layout
    microbatches = layout.microbatches(item.batch_rows)
    idle = idle_fraction(layout.stage, microbatches // layout.passes, layout.virtual_stages)
    sending = float(microbatches / (1 - idle))
    layers, moe_layers = shape.num_layers / layout.stage, shape.num_moe_layers / layout.stage
    tokens = layout.microbatch_rows * item.job.sequence_length / layout.context
    activation = tokens * shape.model_dim * value_bytes
    passes = 3 if layout.remat == "full" else 2
    routed = shape.experts_per_token * (shape.capacity_factor or 1)
    sums = layers + (layers - moe_layers) + moe_layers * (routed + bool(shape.shared_hidden_dim))
    keys = max(shape.cache_width / layout.tensor, min(shape.cache_width, 2 * shape.head_dim))
    row = layout.microbatch_rows * item.job.sequence_length * keys * value_bytes
    parted = layout.tensor if layout.sequence_parallel else 1
    crossings = 2 * sending * layout.virtual_stages * (layout.stage > 1)
    return {
        "tensor": sending * passes * sums * 2 * _left(layout.tensor) * activation,
        "context": sending * (passes + 1) * layers * _left(layout.context) * row,
        "expert": sending * passes * moe_layers * 2 * _left(layout.expert) * routed * room * activation / layout.tensor,
        "stage": crossings * activation / parted,
        "replicas": _between_replicas(item, microbatches, value_bytes),
    }


def _between_replicas(item: Costed, microbatches: int, value_bytes: int) -> float:
    """Gradients and weights: gathered twice and reduced for every microbatch under ZeRO-3, else summed once."""
    layout = item.layout
    gradient_bytes = max(item.job.stack.gradient_bytes, value_bytes)
    dense, routed, _ = stage_parameters(item.job.shape, layout, layout.stage // 2)
    total = 0.0
    groups = ((dense, layout.zero_degree, layout.data), (routed, layout.expert_zero_degree, layout.expert_data))
    for count, group, copies in groups:
        gathered = _left(group) * count
        if layout.zero == 3:
            total += microbatches * gathered * (gradient_bytes + 2 * value_bytes)
        else:
            total += gathered * (gradient_bytes + (value_bytes if layout.zero else gradient_bytes))
        shard = count / (group if layout.zero else 1)
        total += 2 * _left(copies // group) * shard * gradient_bytes
    return total


def _exchange_room(run: RunConfig, item: Costed, topology: str) -> float:
    """Without a capacity, and where sizes cannot differ, each chip has room for all choices of every other."""
    is_bucket = topology.startswith("cpu") or run.mesh.expert_exchange == "bucket"
    if run.model.moe.capacity_factor is not None or not is_bucket:
        return 1.0
    return min(run.mesh.expert_bucket_factor or item.layout.expert, item.layout.expert)


def _left(size: int) -> float:
    """The share of a ring's bytes that each of its members sends on."""
    return (size - 1) / size


def topology_of(chip: Chip, num_chips: int) -> str | None:
    """Returns what `CompileConfig.topology` is for so many chips, None where they can be neither had nor emulated."""
    generation = TORUS_GENERATIONS.get(chip.name)
    if generation and importlib.util.find_spec("libtpu") is not None:
        torus = _torus(num_chips, chip.network.torus_axes)
        if torus and num_chips <= chip.network.domain_chips:
            return f"{generation}:{'x'.join(map(str, torus))}"
    return f"cpu:{num_chips}" if num_chips <= MOST_EMULATED else None


def _torus(num_chips: int, axes: int) -> tuple[int, ...] | None:
    """The most even sides that multiply to the chips, powers of two; None for another number of chips."""
    exponent = num_chips.bit_length() - 1
    if 2**exponent != num_chips or exponent < axes:
        return None
    least, more = divmod(exponent, axes)
    return tuple(2 ** (least + (axis >= axes - more)) for axis in range(axes))


def format_verification(document: dict) -> str:
    """Returns one layout's document of `verify` as lines to read."""
    if not document["compiled"]:
        return f"not compiled: {document['reason']}"
    mesh = ", ".join(f"{axis} {size}" for axis, size in document["mesh"].items())
    head = f"compiled for {document['topology']} ({mesh}) in {document['compile_seconds']} s, on one chip:"
    lines = [head, f"  {'':<22}{'predicted':>12}{'compiled':>12}{'ratio':>8}"]
    for row in document["rows"]:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
        lines.append(f"  {row['name']:<22}{row['predicted']:>12.4g}{row['compiled']:>12.4g}{ratio:>8}")
    lines.append(f"  {document['note']}")
    return "\n".join(lines)
