"""How a model is spread over chips: sizes of every kind of parallelism, and the checks that they divide the model.

In: degrees, and the shape they are for. Out: a `Layout`, or a `CallerError` that names what does not divide.
"""

from __future__ import annotations

import dataclasses
import functools

from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import require, require_count, require_flag
from gpt4moe.plan.training.schedules import SCHEDULES

REMAT = ("none", "selective", "dots", "full")
DEGREES = (
    "tensor", "context", "stage", "virtual_stages", "expert", "expert_tensor", "data", "microbatch_rows", "passes",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. Chips are tensor * context * data * stage.

    expert and expert_tensor say how those same chips of one stage hold the experts: a group of expert * expert_tensor
    of them has every expert once (Megatron's folding; our mesh's `expert` axis is a part of `data` here).
    virtual_stages: chunks of layers a stage. zero: 0 replicates all, 1 shards optimizer state, 2 gradients too, 3
    weights too (FSDP), over `zero_group` replicas (0: all of data, and over context); of experts over
    `expert_zero_group` chips (0: the copies of an expert among those replicas). microbatch_rows: sequences of one
    microbatch of one replica. passes: how often a step fills and empties the pipeline, with as many microbatches each.
    remat: what is computed again in the backward pass: nothing, the attention core, all but a layer's products with
    matrices ("dots" of our trainer, which computes routed experts again), whole layers. sequence_parallel: norms and
    residuals are sharded over tensor.
    """

    tensor: int = 1
    context: int = 1
    stage: int = 1
    virtual_stages: int = 1
    expert: int = 1
    expert_tensor: int = 1
    data: int = 1
    zero: int = 1
    zero_group: int = 0
    microbatch_rows: int = 1
    remat: str = "selective"
    sequence_parallel: bool = True
    schedule: str = "1f1b"
    passes: int = 1
    expert_zero_group: int = 0

    def __post_init__(self) -> None:
        for name in DEGREES:
            degree = getattr(self, name)
            if type(degree) is not int or degree < 1:  # a search makes ten thousands of layouts
                require_count(f"Layout.{name}", degree)
        require(self.zero in range(4), "Layout.zero", self.zero, "must be 0, 1, 2 or 3")
        require(self.remat in REMAT, "Layout.remat", self.remat, f"must be in {REMAT}")
        require(self.schedule in SCHEDULES, "Layout.schedule", self.schedule, f"must be in {tuple(SCHEDULES)}")
        require_flag("Layout.sequence_parallel", self.sequence_parallel)
        require_count("Layout.zero_group", self.zero_group, least=0)
        whole = self.data % self.zero_degree == 0
        require(whole, "Layout.zero_group", self.zero_group, f"must divide data ({self.data})")
        require_count("Layout.expert_zero_group", self.expert_zero_group, least=0)
        several = self.virtual_stages == 1 or SCHEDULES[self.schedule].has_virtual_stages
        mend = "take schedule interleaved"
        require(several, "Layout.virtual_stages", self.virtual_stages, f"must be 1 under {self.schedule}", mend)
        group, per_stage = self.expert * self.expert_tensor, self.chips // self.stage
        constraint = f"times expert_tensor ({self.expert_tensor}) must divide the chips of a stage ({per_stage})"
        require(per_stage % group == 0, "Layout.expert", self.expert, constraint)

    @property
    def chips(self) -> int:
        """Chips of the whole job."""
        return self.tensor * self.context * self.data * self.stage

    @property
    def zero_degree(self) -> int:
        """Replicas over which ZeRO shards."""
        return self.zero_group or self.data

    @property
    def state_degree(self) -> int:
        """Chips over which ZeRO shards what is no expert's."""
        return self.zero_group or self.data * self.context

    @property
    def expert_data(self) -> int:
        """Copies of every expert: chips of a stage over those that hold all experts once."""
        return self.tensor * self.context * self.data // (self.expert * self.expert_tensor)

    @property
    def expert_zero_degree(self) -> int:
        """Copies of an expert over which ZeRO shards."""
        return self.expert_zero_group or max(self.expert_data * self.zero_degree // self.data, 1)

    def microbatches(self, batch_rows: int) -> int:
        """Returns the microbatches of one replica in a step of `batch_rows` sequences; raises where it is no whole."""
        span = self.data * self.microbatch_rows
        whole = batch_rows >= span and batch_rows % span == 0
        constraint = f"must be a multiple of data * microbatch_rows ({self.data} * {self.microbatch_rows})"
        require(whole, "batch_rows", batch_rows, constraint, "change the batch, data or microbatch_rows")
        return batch_rows // span

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Returns the layers of each stage; where they do not divide, the last and the first hold one less.

        Those two also hold head and embedding (so do Llama 3, section 3.3.2, and Skywork-MoE).
        """
        return _stage_layers(num_layers, self.stage)

    def check(self, shape: Shape) -> None:
        """Raises `CallerError` where the shape does not divide over the layout."""
        _divides("num_heads", shape.num_heads, "tensor", self.tensor)
        if shape.num_dense_layers:
            _divides("hidden_dim", shape.hidden_dim, "tensor", self.tensor)
        kv_heads, over = shape.num_kv_heads, self.tensor
        fits = kv_heads % over == 0 or over % kv_heads == 0
        require(fits, "num_kv_heads", kv_heads, f"must divide the tensor degree ({over}) or be divisible by it")
        if shape.num_moe_layers:
            _divides("num_experts", shape.num_experts, "expert", self.expert)
            _divides("expert_hidden_dim", shape.expert_hidden_dim, "expert_tensor", self.expert_tensor)
        else:
            single = self.expert * self.expert_tensor == 1
            require(single, "Layout.expert", self.expert, "must be 1 for a model without experts")
        least = f"must be at least stage * virtual_stages ({self.stage} * {self.virtual_stages})"
        require(shape.num_layers >= self.stage * self.virtual_stages, "num_layers", shape.num_layers, least)


def _divides(setting: str, value: int, axis: str, degree: int) -> None:
    require(value % degree == 0, setting, value, f"must be divisible by the {axis} degree ({degree})")


@functools.lru_cache(maxsize=4096)
def _stage_layers(num_layers: int, stages: int) -> tuple[int, ...]:
    least, more = divmod(num_layers, stages)
    order = sorted(range(stages), key=lambda index: (index == stages - 1, index == 0))
    longer = set(order[:more])
    return tuple(least + (index in longer) for index in range(stages))
