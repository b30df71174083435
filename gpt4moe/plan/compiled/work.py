"""What a compiled program does on one chip: FLOPs of its matrix products, collectives by mesh axis, compute cycles.

In: a parsed `plan.hlo.Module` and the mesh it was compiled for. Out: a `Work`. XLA's own cost analysis counts the body
of a loop once; here every loop counts as often as it runs.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from gpt4moe.plan.compiled.groups import varying_axes
from gpt4moe.plan.compiled.hlo import Computation, Instruction, Module
from gpt4moe.plan.compiled.products import product_flops, row_tiles

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
SEND = "send between slices"
# Files whose functions ask for what their caller wants: our products, and the shape checker that tests switch on.
PASSED_ON = ("product.py:", "_decorator.py:")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Products:
    """Matrix products that one function of the source asks for: their FLOPs on one chip, and of these the recomputed.

    pass_name: "forward", "backward" or "recomputed" (a rematerialised forward pass).
    """

    source: str
    pass_name: str
    flops: float


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same mesh axes.

    count: how often one runs; bytes_sent: by one chip, over all of them, under a ring algorithm.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes_sent: float


@dataclasses.dataclass(frozen=True)
class Work:
    """Totals of one run of the program on one chip.

    cycles: the compiler's estimate for computations, collectives not among them (0 where it gives none).
    unknown_loops: functions with a loop whose length neither the program nor the caller knew, counted once.
    """

    products: tuple[Products, ...]
    collectives: tuple[Collective, ...]
    cycles: float
    unknown_loops: tuple[str, ...]

    @property
    def flops(self) -> float:
        """FLOPs of all matrix products, two a multiply-add."""
        return sum(item.flops for item in self.products)

    @property
    def recomputed_flops(self) -> float:
        """FLOPs spent again on what the forward pass had already computed."""
        return sum(item.flops for item in self.products if item.pass_name == "recomputed")


@dataclasses.dataclass(frozen=True)
class Step:
    """One instruction where it runs: how often, and the computation it stands in."""

    instruction: Instruction
    computation: Computation
    times: int
    in_fusion: bool


def count(
    module: Module, axes: Mapping[str, int], rounds: Mapping[str, int] | None = None, slow: Sequence[str] = ()
) -> Work:
    """Returns the work of a program compiled for a mesh of these axis sizes.

    A machine of several slices gets a program for one: `axes` are then the sizes within a slice, and `slow` the axes
    that lie between slices, over which the program sends through the host.

    `rounds` says how often a loop runs whose length the program does not know, by the function that asks for it
    (`step.py:_sum_over`); one that it lacks counts once and is named in `unknown_loops`. A grouped product,
    which states the FLOPs of all rows it has room for, counts as many of its tiles as `rounds` gives for its name.
    """
    products, sent, counts = collections.Counter(), collections.Counter(), collections.Counter()
    cycles, unknown = 0.0, set()
    for step in _walk(module, rounds or {}):
        instruction = step.instruction
        flops = product_flops(instruction, step.computation)
        if flops:
            source = _source(module, instruction)
            tiles = row_tiles(instruction, step.computation)
            in_use = (rounds or {}).get(_own_name(instruction)) if tiles else None
            share = 1 if in_use is None else in_use / tiles
            products[(source, _pass_name(instruction))] += flops * step.times * share
        kind = _collective_kind(step)
        if kind:
            group_size, spanned = (2, tuple(slow)) if kind == SEND else varying_axes(instruction, axes)
            if spanned:  # a group of one moves nothing
                sent[kind, spanned] += step.times * _bytes_sent(kind, instruction, step.computation, group_size)
                counts[kind, spanned] += step.times
        if not step.in_fusion:
            found = _CYCLES.search(instruction.attributes)
            cycles += step.times * int(found[1]) if found else 0
        if instruction.opcode == "while" and _trips(module, step, rounds or {}) is None:
            unknown.add(_source(module, instruction))
    ordered = sorted(products.items(), key=lambda item: -item[1])
    return Work(
        products=tuple(Products(*where, flops) for where, flops in ordered),
        collectives=tuple(Collective(*key, counts[key], sent[key]) for key in sorted(sent, key=lambda key: -sent[key])),
        cycles=cycles,
        unknown_loops=tuple(sorted(unknown)),
    )


def _walk(module: Module, rounds: Mapping[str, int]) -> Iterator[Step]:
    """Every instruction that runs, with how often."""

    def of(name: str, times: int, in_fusion: bool) -> Iterator[Step]:
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            step = Step(instruction, computation, times, in_fusion)
            yield step
            if instruction.opcode == "while":
                trips = _trips(module, step, rounds)
                trips = 1 if trips is None else trips
                yield from of(instruction.called("body"), times * trips, in_fusion)
            elif instruction.opcode == "conditional":
                yield from _longest([list(of(branch, times, in_fusion)) for branch in instruction.calls])
            elif _runs_its_calls(instruction):
                for called in instruction.calls:
                    yield from of(called, times, in_fusion or instruction.opcode == "fusion")

    yield from of(module.entry, 1, False)


def _trips(module: Module, step: Step, rounds: Mapping[str, int]) -> int | None:
    known = module.trips(step.instruction, step.computation)
    asked = (frame for frame in _frames(module, step.instruction) if frame in rounds)
    return rounds.get(next(asked, ""), None) if known is None else known


def _runs_its_calls(instruction: Instruction) -> bool:
    """Whether the called computations are work, and not the scalar function of a reduction."""
    return instruction.opcode in ("fusion", "call", "async-start")


def _longest(branches: list[list[Step]]) -> list[Step]:
    """The branch of a conditional with the most matrix products: what the chip does when it has work."""
    return max(branches, key=lambda steps: sum(product_flops(s.instruction, s.computation) * s.times for s in steps))


def _collective_kind(step: Step) -> str | None:
    kind = step.instruction.opcode.removesuffix("-start")
    if kind == "send":
        return SEND if "is_host_transfer=true" in step.instruction.attributes else None
    # XLA:TPU fuses an all-reduce with the slice of its result, and moves what a reduce-scatter moves.
    if kind == "all-reduce" and step.computation.name.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return kind if kind in COLLECTIVES else None


def _bytes_sent(kind: str, instruction: Instruction, computation: Computation, group_size: int) -> float:
    """Bytes that one chip sends: ring all-gather and reduce-scatter, of which an all-reduce is both."""
    operands = [computation.instructions[name] for name in instruction.operands]
    size = sum(shape.bytes for operand in operands for shape in operand.shapes)
    share = (group_size - 1) / group_size
    whole = dict.fromkeys(("collective-permute", "collective-broadcast", SEND), 1)
    factors = {"all-gather": group_size - 1, "all-reduce": 2 * share} | whole
    return size * factors.get(kind, share)


def _source(module: Module, instruction: Instruction) -> str:
    """The function that asked for an instruction: the innermost one that does not only pass it on."""
    callers = [frame for frame in _frames(module, instruction) if not frame.startswith(PASSED_ON)]
    if instruction.opcode == "custom-call" and not callers:
        return _own_name(instruction)
    return callers[0] if callers else "unknown"


def _own_name(instruction: Instruction) -> str:
    return re.sub(r"[.\d]+$", "", instruction.name)


def _frames(module: Module, instruction: Instruction) -> tuple[str, ...]:
    found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
    return module.frames.get(int(found[1]), ()) if found else ()


def _pass_name(instruction: Instruction) -> str:
    if "rematted_computation" in instruction.attributes:
        return "recomputed"
    return "backward" if "transpose(" in instruction.attributes else "forward"
