"""Completes a published row: shape, chip, batch and layout, what it leaves open chosen as its authors would.

In: a `Row`. Out: a `Setup`, ready for `step_time` and `memory`. A row without a layout gets the fastest one that fits
among a few hundred; a name may say `mbs4`, `zero3`, `full` or `selective`, `2x64` (slices of chips).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re

from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import CallerError
from gpt4moe.plan.published.measurements import Row
from gpt4moe.plan.published.shapes import shape_of_row
from gpt4moe.plan.published.sources import ALL_ROWS, Source, source_of
from gpt4moe.plan.training import memory, step_time
from gpt4moe.plan.training.layout import REMAT, Layout

USUAL_SEQUENCE_LENGTH = 4096
USUAL_TOKENS_PER_CHIP = 8192
MICROBATCH_ROWS = (1, 2, 4, 8)
_MICROBATCH = re.compile(r"(?<![a-z])(?:mbs|mb|micro)[-_=]?(\d+)")
_ZERO = re.compile(r"zero[-_]?(\d)")
_SLICES = re.compile(r"-(\d+)x(\d+)?$")


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run as the planner costs it. guessed: what the row did not say."""

    row: Row
    source: Source
    shape: Shape
    chip: Chip
    layout: Layout
    batch_tokens: int
    sequence_length: int
    guessed: tuple[str, ...] = ()

    @property
    def chips(self) -> int:
        """Chips of the run."""
        return self.layout.chips

    @functools.cached_property
    def step(self) -> step_time.StepTime:
        """The predicted step, uncalibrated."""
        return step_time.estimate(
            self.shape, self.layout, self.chip, self.batch_tokens, self.sequence_length, self.source.stack
        )

    @property
    def memory(self) -> memory.MemoryEstimate:
        """The predicted bytes of a chip."""
        rows = self.batch_tokens // self.sequence_length
        return _memory(self.shape, self.layout, self.chip, self.sequence_length, self.source, rows)


def setup_of(row: Row) -> Setup:
    """Returns the completed run; raises `CallerError` with the row's place where it cannot be one."""
    source = source_of(row)
    shape = shape_of_row(row, source.vocab_size, is_gpt=source.is_gpt)
    gpus = row.gpus or (row.tp or 1) * (row.pp or 1) * (row.dp or 1)
    guessed = [name for name in ("seq", "global_batch_tokens", "tp", "pp", "dp") if getattr(row, name) is None]
    if row.gpus is None and row.dp is None:
        gpus, guessed = source.gpus, [*guessed, "gpus"]
    chip = _with_slices(row, gpus)
    length = row.seq or USUAL_SEQUENCE_LENGTH
    told = row.global_batch_tokens or source.batch_tokens
    if told and told < length:
        raise CallerError(f"{row.where}, column global_batch_tokens: {told} must be at least seq ({length})")
    if not told and source.zero == 3:  # no accumulation: FSDP's habit
        source = dataclasses.replace(source, microbatch_rows=ALL_ROWS)
    rows = (told or gpus * max(USUAL_TOKENS_PER_CHIP, length)) // length
    given = row.tp is not None and row.pp is not None
    layouts = _given(row, source, shape, gpus, rows) if given else _open(chip, source, shape, gpus, rows)
    try:
        layout, rows = _best(layouts, shape, chip, rows, length, source)
    except CallerError as error:
        raise CallerError(f"{row.where}, columns tp, pp, dp: {error}") from None
    return Setup(row, source, shape, chip, layout, rows * length, length, tuple(guessed))


def _with_slices(row: Row, gpus: int) -> Chip:
    """The chip in a domain as large as the slices that a TPU row's name tells."""
    found, chip = _SLICES.search(row.name), row.chip
    if not found or not chip.network or not chip.network.torus_axes:
        return chip
    size = int(found[2] or gpus // int(found[1]))
    return dataclasses.replace(chip, network=dataclasses.replace(chip.network, domain_chips=size))


def _given(row: Row, source: Source, shape: Shape, gpus: int, batch_rows: int) -> list[Layout]:
    """The layouts that the row allows: one, where neither microbatch nor remat are open."""
    tensor, stage = row.tp, row.pp
    data = row.dp or max(gpus // (tensor * stage), 1)
    context = max(gpus // (tensor * stage * data), 1)
    if tensor * stage * data * context != gpus:
        raise CallerError(
            f"{row.where}, column dp: {data} times tp ({tensor}) and pp ({stage}) must divide gpus ({gpus})"
        )
    zero = _ZERO.search(row.name)
    level = int(zero[1]) if zero and zero[1] in "0123" else source.zero
    chunks = _chunks(source, shape, stage)
    schedule = source.schedule or ("interleaved" if chunks > 1 else "1f1b")
    base = Layout(
        tensor, context, stage, 1 if source.schedule else chunks, data=data, zero=level, schedule=schedule,
        sequence_parallel=source.sequence_parallel and tensor > 1, **_experts(source, shape, tensor * context * data),
    )  # fmt: skip
    return _with_open(base, row, source, max(batch_rows // data, 1))


def _with_open(base: Layout, row: Row, source: Source, local_rows: int) -> list[Layout]:
    """The layout with every microbatch and remat that the row leaves open."""
    told = _MICROBATCH.search(row.name)
    sizes = (int(told[1]),) if told else _microbatches(source, base.stage, local_rows)
    remats = (source.remat,) if source.remat else ("none", "selective", "full")
    sequence_parallel = base.sequence_parallel
    if row.name.endswith("full") or "-full-" in row.name:
        remats, sequence_parallel = ("full",), False
    elif "selective" in row.name:
        remats = ("selective",)
    return [
        dataclasses.replace(base, microbatch_rows=size, remat=remat, sequence_parallel=sequence_parallel)
        for size in sizes
        for remat in remats
    ]


def _microbatches(source: Source, stage: int, local_rows: int) -> tuple[int, ...]:
    if stage > 1:
        return (1,)
    return (min(source.microbatch_rows, local_rows),) if source.microbatch_rows else MICROBATCH_ROWS


def _experts(source: Source, shape: Shape, per_stage: int) -> dict[str, int]:
    if not shape.num_moe_layers:
        return {}
    expert = source.expert or math.gcd(shape.num_experts, per_stage)
    return {"expert": expert, "expert_tensor": source.expert_tensor}


def _chunks(source: Source, shape: Shape, stage: int) -> int:
    """Virtual stages: as the source says, else chunks of two layers, of one where a stage's layers are odd."""
    if source.chunks and stage in source.chunks:
        return source.chunks[stage]
    of_stage = shape.num_layers // stage
    if stage == 1 or shape.num_layers % stage:
        return 1
    return of_stage if of_stage % 2 or of_stage == 2 else of_stage // 2


def _open(chip: Chip, source: Source, shape: Shape, gpus: int, batch_rows: int) -> list[Layout]:
    """Layouts that a row without one might have had: tensor and stages within reason, ZeRO-1 or FSDP."""
    on_tpu = chip.name.startswith("tpu")
    stages = (1,) if on_tpu or source.zero == 3 else (1, 2, 4, 8, 16)
    remats = (source.remat,) if source.remat else ("none", "selective", "full")
    found = []
    tensors = (1, 2, 4, 8, 16) if on_tpu else (1, 2, 4, 8)
    for tensor, stage, remat in itertools.product(tensors, stages, remats):
        if gpus % (tensor * stage) or shape.num_layers < stage:
            continue
        zero, per_stage = (3 if source.zero == 3 or stage == 1 else source.zero), gpus // stage
        chunks, data = _chunks(source, shape, stage), per_stage // tensor
        base = Layout(
            tensor, 1, stage, chunks, data=data, zero=zero, remat=remat, sequence_parallel=tensor > 1,
            schedule="interleaved" if chunks > 1 else "1f1b", **_experts(source, shape, per_stage),
        )  # fmt: skip
        sizes = _microbatches(source, stage, max(batch_rows // data, 1))
        found += [dataclasses.replace(base, microbatch_rows=size) for size in sizes]
    return found


def _best(
    layouts: list[Layout], shape: Shape, chip: Chip, batch_rows: int, length: int, source: Source
) -> tuple[Layout, int]:
    """The fastest layout that fits, and the rows of its step; where none fits, of those whose state at least does.

    Batches of such rows are guessed too large, or activations lie elsewhere; state cannot. Rows are made a whole number
    of microbatches: published batches are rounded.
    """
    found, refused = [], None
    for layout in layouts:
        span = layout.data * layout.microbatch_rows
        rows = max(batch_rows // span, 1) * span
        if layout.microbatch_rows > 1 and rows > 1.1 * batch_rows:
            continue
        try:
            step = step_time.estimate(shape, layout, chip, rows * length, length, source.stack)
        except CallerError as error:
            refused = error
            continue
        needed = _memory(shape, layout, chip, length, source, rows)
        elsewhere = needed.activation_bytes if source.offloads and layout.remat == "full" else 0.0
        order = (0.0, 0)
        if needed.spare_bytes + elsewhere < 0:
            order = (max(needed.state_bytes - chip.memory_bytes, 1.0), -REMAT.index(layout.remat))
        found.append((order, step.seconds / rows, layout, rows))
    if not found:
        raise refused or CallerError("the batch is less than one microbatch of every replica; raise it")
    _, _, layout, rows = min(found, key=lambda item: item[:2])
    return layout, rows


def _memory(
    shape: Shape, layout: Layout, chip: Chip, length: int, source: Source, batch_rows: int
) -> memory.MemoryEstimate:
    numerics = dataclasses.replace(memory.NUMERICS[source.numerics], flash=source.stack.flash)
    microbatches = layout.microbatches(batch_rows)
    return memory.estimate(shape, layout, chip, sequence_length=length, microbatches=microbatches, numerics=numerics)
