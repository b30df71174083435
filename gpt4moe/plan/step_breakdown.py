"""Where a step's time goes, by a plain additive model: a shape, chips and their division in, seconds by cause out.

Constants are of the literature: matrix products reach 0.72 of an A100's peak and 0.61 of an H100's (fitted to published
step times), rings 0.75 of NVLink and 0.55 of the network between servers; gradients hide behind the backward pass but
for a quarter.
"""

from __future__ import annotations

import dataclasses

from gpt4moe.accounting import flops, parameters, pipeline
from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import require, require_count, require_not_negative, require_positive

BYTES = 2
FAST_SHARE, SLOW_SHARE, MEMORY_SHARE = 0.75, 0.55, 0.8
EXPOSED_DATA = 0.25
AMPERE, LATER = 0.72, 0.61
ADAM_TRAFFIC_BYTES = 28  # a parameter's gradient, master copy and moments read, and all but the first written


@dataclasses.dataclass(frozen=True)
class Division:
    """How chips divide a run: degrees of each axis; the rest of them are replicas."""

    num_chips: int
    tensor: int = 1
    stages: int = 1
    virtual_stages: int = 1
    expert: int = 1
    microbatch_rows: int = 1

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require_count(name, value)
        least = self.tensor * self.stages * self.expert
        mend = f"tensor * stages * expert is {least}"
        require(self.num_chips >= least, "num_chips", self.num_chips, f"must be at least {least}", mend)
        whole = f"must divide the {self.replicas} replicas"
        require(self.replicas % self.expert == 0, "--expert", self.expert, whole)

    @property
    def replicas(self) -> int:
        """Copies of the model that divide a batch; experts of a layer lie over `expert` of them."""
        return self.num_chips // (self.tensor * self.stages)


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """One step: model FLOPs at the peak, and what each cause adds, in seconds."""

    ideal_seconds: float
    lost_seconds: dict[str, float]

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.ideal_seconds + sum(self.lost_seconds.values())

    @property
    def utilization(self) -> float:
        """Model FLOPs over the peak."""
        return self.ideal_seconds / self.seconds


def break_down(
    shape: Shape, chip: Chip, division: Division, batch_tokens: float, length: int, remat: str, imbalance: float
) -> Breakdown:
    """Returns the step of a batch of rows of `length` tokens.

    remat: "none" or "full"; imbalance: rows of the fullest expert over their mean. Raises `CallerError` for a chip
    without a known network and a batch too small for the replicas.
    """
    require(chip.network is not None, "chip", chip.name, "has no known network")
    require(remat in ("none", "full"), "--remat", remat, "must be none or full")
    require(imbalance >= 1, "--imbalance", imbalance, "must be at least 1")
    require_positive("--batch_tokens", batch_tokens)
    rows = batch_tokens / length / division.replicas
    need = f"must hold a microbatch for each of the {division.replicas} replicas"
    require(rows >= division.microbatch_rows, "--batch_tokens", batch_tokens, need)
    used = division.replicas * division.tensor * division.stages
    per_token = flops.train_flops_per_token(shape)
    ideal = batch_tokens * per_token / (division.num_chips * chip.peak_flops)
    compute = batch_tokens / (used * chip.peak_flops)
    core = 3 * compute * flops.attention_core_flops_per_token(shape, length)
    again = (compute * per_token + core) / 3 if remat == "full" else 0.0
    efficiency = AMPERE if chip.name.startswith(("a100", "a800")) else LATER
    products = compute * per_token + core + again
    lost = {
        "attention_core": core,
        "recomputation": again,
        "matmul": products * (1 / efficiency - 1) + compute * per_token - ideal,
        "imbalance": products / efficiency * _expert_share(shape) * (imbalance - 1),
        "tensor": _tensor_seconds(shape, chip, division, rows * length, remat),
        "expert": _expert_seconds(shape, chip, division, rows * length, remat),
    }
    idle = float(
        pipeline.idle_fraction(division.stages, max(round(rows / division.microbatch_rows), 1), division.virtual_stages)
    )
    lost["bubble"] = (ideal + sum(lost.values())) * idle / (1 - idle)
    lost |= {"data": _data_seconds(shape, chip, division), "optimizer": _optimizer_seconds(shape, chip, division)}
    return Breakdown(ideal, lost)


def _expert_share(shape: Shape) -> float:
    return 2 * parameters.experts_active(shape) / flops.forward_flops_per_token(shape)


def _link(chip: Chip, chips: int) -> float:
    """Bytes per second of one chip among so many neighbours."""
    network = chip.network
    inside = chips <= network.domain_chips
    return network.domain_bytes_per_second * FAST_SHARE if inside else network.outside_bytes_per_second * SLOW_SHARE


def _tensor_seconds(shape: Shape, chip: Chip, division: Division, tokens: float, remat: str) -> float:
    """All-reduces of activations around attention and feed-forward: two in the forward pass, two in the backward."""
    count, degree = 6 if remat == "full" else 4, division.tensor
    sent = 2 * (degree - 1) / degree * tokens * shape.model_dim * BYTES
    return count * shape.num_layers / division.stages * sent / _link(chip, degree)


def _expert_seconds(shape: Shape, chip: Chip, division: Division, tokens: float, remat: str) -> float:
    """All-to-alls of dispatch and combine."""
    count, degree = 6 if remat == "full" else 4, division.expert
    sent = (degree - 1) / degree * tokens / division.tensor * shape.experts_per_token * shape.model_dim * BYTES
    return count * shape.num_moe_layers / division.stages * sent / _link(chip, degree * division.tensor)


def _data_seconds(shape: Shape, chip: Chip, division: Division) -> float:
    """Ring all-reduce of 16-bit gradients, experts over the replicas that hold the same ones."""
    counted = parameters.count(shape)
    local = 0.0
    for size, held, replicas in (
        (counted.total - counted.experts, 1, division.replicas),
        (counted.experts, division.expert, division.replicas / division.expert),
    ):
        share = max(1 - 1 / replicas, 0.0)
        local += 2 * share * BYTES * size / (division.tensor * division.stages * held)
    return EXPOSED_DATA * local / _link(chip, division.tensor * division.replicas)


def _optimizer_seconds(shape: Shape, chip: Chip, division: Division) -> float:
    """The update by ZeRO-1: each chip a part of its replica's weights."""
    mine = parameters.count(shape).total / (division.tensor * division.stages * division.replicas)
    traffic = ADAM_TRAFFIC_BYTES * mine
    require_not_negative("optimizer", traffic)
    return traffic / (chip.bandwidth_bytes_per_second * MEMORY_SHARE)
