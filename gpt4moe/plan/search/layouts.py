"""Every layout of a model on so many chips that a trainer can run, and counts of what was left out, by reason.

In: a `Job`. Out: `Candidate`s, a layout but for what is computed again (`search` takes the least that fits) and its
batch. `megatron_layouts` is the general space, `our_layouts` what this project's trainer can run.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator

from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import CallerError, require, require_count, require_not_negative
from gpt4moe.plan.money.goodput import MOST_CHIPS, Reliability
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.memory import Numerics
from gpt4moe.plan.training.stacks import Stack

MICROBATCH_ROWS = (1, 2, 4, 8)
MOST_TENSOR = 64  # on a torus, whose fast domain is thousands of chips
OUR_SCHEDULE = "circular"  # in `schedules`: that of `accounting.pipeline`
ROUNDER = 1.5  # times as many ways to divide are worth leaving chips idle
LEAST_ROW_TOKENS = 1024  # of a row on one chip of a context group


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be laid out. batch_rows: sequences of a step; tolerance: share by which a layout's batch may differ.

    ramp_rows: smaller batches before, which divide too. dollars_per_hour: of one chip, None where no one says.
    reliability: of one chip, None for a job that never fails. most_idle: share of the chips that may be left out.
    """

    shape: Shape
    chip: Chip
    num_chips: int
    batch_rows: int
    sequence_length: int
    stack: Stack
    numerics: Numerics
    tolerance: float = 0.0
    ramp_rows: tuple[int, ...] = ()
    dollars_per_hour: float | None = None
    reliability: Reliability | None = None
    most_idle: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_chips", "batch_rows", "sequence_length"):
            require_count(f"--{name}", getattr(self, name))
        require_not_negative("--batch_tolerance", self.tolerance)
        require(self.num_chips <= MOST_CHIPS, "--num_chips", self.num_chips, f"must be at most {MOST_CHIPS:,}")
        require(0 <= self.most_idle < 1, "--most_idle", self.most_idle, "must be at least 0 and below 1")

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_rows * self.sequence_length

    def rows_near(self, replicas: int, microbatch_rows: int) -> int | None:
        """Returns the batch nearest to what is asked that divides over so many replicas; None beyond the tolerance."""
        span = replicas * microbatch_rows
        if any(rows % span for rows in self.ramp_rows):
            return None
        rows = max(round(self.batch_rows / span), 1) * span
        return rows if abs(rows - self.batch_rows) <= self.tolerance * self.batch_rows else None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout and the sequences of its step; remat and passes are still open."""

    layout: Layout
    batch_rows: int

    @property
    def microbatches(self) -> int:
        """Of one replica in a step."""
        return self.batch_rows // (self.layout.data * self.layout.microbatch_rows)


@dataclasses.dataclass(frozen=True)
class Space:
    """What a trainer can run. several_passes: a step may fill its pipeline several times."""

    name: str
    layouts: Callable[[Job, Counter], Iterator[Candidate]]
    numerics: str
    several_passes: bool = False


def megatron_layouts(job: Job, left_out: Counter) -> Iterator[Candidate]:
    """Yields layouts as Megatron-Core and FSDP stacks have them: interleaved 1F1B, experts over any chips of a stage.

    Left out: ZeRO-0, which ZeRO-1 beats in memory at the same traffic, and ZeRO-2 in a pipeline of several
    microbatches, whose gradients would be summed one by one.
    """
    for tensor, context, stage, data in _grids(job, left_out):
        experts = list(_expert_degrees(job.shape, tensor, tensor * context * data, left_out))
        for rows, batch_rows in _microbatches(job, context, data, left_out):
            microbatches = batch_rows // (data * rows)
            for virtual in _virtual_stages(job.shape.num_layers, stage, microbatches, left_out):
                schedule = "interleaved" if virtual > 1 else "1f1b"
                with_two = stage == 1 or microbatches == 1
                if not with_two and data > 1:
                    left_out["ZeRO-2 in a pipeline, which sums the gradients of every microbatch"] += 1
                for zero, group in _zero_levels(job.chip, tensor * context, data, with_two=with_two):
                    for expert, expert_tensor in experts:
                        layout = Layout(
                            tensor, context, stage, virtual, expert, expert_tensor, data, zero, group, rows,
                            sequence_parallel=tensor > 1, schedule=schedule,
                        )  # fmt: skip
                        yield Candidate(layout, batch_rows)


def our_layouts(job: Job, left_out: Counter) -> Iterator[Candidate]:
    """Yields layouts of this project's mesh: rows lie over data, fsdp and expert, hidden dims over tensor.

    Parameters lie over fsdp, else optimizer state over data (zero1), experts over expert; all chunks of a stage are
    equal, and microbatches go through chunk after chunk (`accounting.pipeline`).
    """
    shape = job.shape
    for tensor, context, stage, data in _grids(job, left_out):
        if shape.vocab_size % tensor or (shape.num_moe_layers and shape.expert_hidden_dim % tensor):
            left_out["tensor does not divide vocabulary or hidden dims"] += 1
            continue
        parted = tensor > 1 and job.sequence_length % (context * tensor) == 0
        for rows, batch_rows in _microbatches(job, context, data, left_out):
            microbatches = batch_rows // (data * rows)
            for virtual in _virtual_stages(shape.num_moe_layers, stage, microbatches, left_out, equal=True):
                for expert in _common_divisors(data, shape.num_experts):
                    for fsdp in _divisors(data // expert):
                        if shape.model_dim % fsdp:
                            left_out["fsdp does not divide model_dim"] += 1
                            continue
                        replicas = data // expert // fsdp
                        zero, group = (3, fsdp) if fsdp > 1 else (int(replicas > 1), replicas)
                        layout = Layout(
                            tensor, context, stage, virtual, expert, tensor if shape.num_moe_layers else 1, data, zero,
                            group, rows, sequence_parallel=parted, schedule=OUR_SCHEDULE, expert_zero_group=group,
                        )  # fmt: skip
                        yield Candidate(layout, batch_rows)


def rounder_chips(job: Job) -> int | None:
    """Returns the number of chips below the job's that divides in most ways, within what may be left idle.

    Whole servers are left; None where no number has half as many ways again as the job's own.
    """
    network = job.chip.network
    server = network.domain_chips if network and not network.torus_axes else 1
    least, most = math.ceil(job.num_chips * (1 - job.most_idle)), job.num_chips - 1
    counts = range(most // server * server, least - 1, -server)
    ways = {count: _num_ways(dataclasses.replace(job, num_chips=count)) for count in counts if count > 0}
    best = max(ways, key=ways.get, default=None)
    return best if best and ways[best] > ROUNDER * _num_ways(job) else None


def _num_ways(job: Job) -> int:
    """Grids whose stages are equal and whose replicas the batch divides over."""
    layers = job.shape.num_layers
    grids = _grids(job, Counter())
    return sum(layers % stage == 0 and job.rows_near(data, 1) is not None for _, _, stage, data in grids)


def _grids(job: Job, left_out: Counter) -> Iterator[tuple[int, int, int, int]]:
    """Tensor, context, stage and data degrees whose product is the chips."""
    domain = min(job.chip.network.domain_chips if job.chip.network else 1, MOST_TENSOR)
    for tensor in _divisors(job.num_chips):
        if domain % tensor:
            left_out[f"tensor does not divide the {domain} chips that fast links join"] += 1
            continue
        try:
            Layout(tensor, expert_tensor=1).check(dataclasses.replace(job.shape, num_moe_layers=0, hidden_dim=tensor))
        except CallerError:
            left_out["tensor does not divide the heads"] += 1
            continue
        if job.shape.num_dense_layers and job.shape.hidden_dim % tensor:
            left_out["tensor does not divide vocabulary or hidden dims"] += 1
            continue
        for context in _divisors(job.num_chips // tensor):
            length = job.sequence_length
            if context > 1 and (length % context or length // context < LEAST_ROW_TOKENS):
                left_out[f"rows cut below {LEAST_ROW_TOKENS:,} tokens a chip"] += 1
                continue
            for stage in _divisors(job.num_chips // (tensor * context)):
                if stage > job.shape.num_layers:
                    left_out["more stages than layers"] += 1
                    continue
                yield tensor, context, stage, job.num_chips // (tensor * context * stage)


def _microbatches(job: Job, context: int, data: int, left_out: Counter) -> Iterator[tuple[int, int]]:
    """Sequences of a microbatch, and the batch that divides into such."""
    for rows in MICROBATCH_ROWS:
        if rows > 1 and context > 1:
            left_out["several rows on chips that share each of them"] += 1
            continue
        batch_rows = job.rows_near(data, rows)
        if batch_rows is None:
            left_out["the batch does not divide over replicas and microbatches"] += 1
            continue
        yield rows, batch_rows


def _virtual_stages(
    num_chunks: int, stage: int, microbatches: int, left_out: Counter, *, equal: bool = False
) -> Iterator[int]:
    """Chunks a stage; several need equal ones, and as many microbatches as stages."""
    if num_chunks % stage:
        if equal and stage > 1:
            left_out["layers do not divide over the stages"] += 1
            return
        yield 1
        if stage < num_chunks // stage * stage and microbatches >= stage:  # chunks of a layer, the ends hold one less
            yield num_chunks // stage
        return
    for virtual in _divisors(num_chunks // stage) if stage > 1 else (1,):
        if virtual > 1 and microbatches < stage:
            left_out["fewer microbatches than interleaved stages"] += 1
            continue
        yield virtual


def _zero_levels(chip: Chip, inner: int, data: int, *, with_two: bool) -> Iterator[tuple[int, int]]:
    """ZeRO levels and their groups: all replicas (0), or those of one fast domain."""
    if data == 1:
        yield 0, 0
        return
    yield from ((level, 0) for level in ((1, 2, 3) if with_two else (1, 3)))
    domain = chip.network.domain_chips // inner if chip.network else 1
    if 1 < domain < data and data % domain == 0:
        yield 3, domain


def _expert_degrees(shape: Shape, tensor: int, per_stage: int, left_out: Counter) -> Iterator[tuple[int, int]]:
    """Chips that share out experts, and chips that share one of them."""
    if not shape.num_moe_layers:
        yield 1, 1
        return
    for expert in _divisors(shape.num_experts):
        for expert_tensor in sorted({1, tensor}):
            if per_stage % (expert * expert_tensor) or shape.expert_hidden_dim % expert_tensor:
                left_out["experts do not divide over the chips of a stage"] += 1
                continue
            yield expert, expert_tensor


def _common_divisors(number: int, other: int) -> list[int]:
    return _divisors(math.gcd(number, other))


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


SPACES = {
    space.name: space
    for space in (
        Space("megatron", megatron_layouts, "mixed_adam"),
        Space("ours", our_layouts, "float32_adam", several_passes=True),
    )
}
