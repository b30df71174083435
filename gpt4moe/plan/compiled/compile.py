"""Compiles the real program of a run for a machine that need not be there, and reads what it would take of each chip.

In: a run and the machine. Out: the JSON document of `gpt4moe compile`: bytes, FLOPs, collectives, times.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Mapping

import jax
from jax.sharding import Mesh

from gpt4moe.accounting.chips import find_chip
from gpt4moe.config.check import require
from gpt4moe.config.compile import PROGRAMS, CompileConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.plan.compiled import expected, hlo, topology, work
from gpt4moe.plan.compiled.decode import lower_decode
from gpt4moe.plan.compiled.doctor import host_memory_bytes
from gpt4moe.train.state import abstract_state
from gpt4moe.train.step import lower_step

LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax")
# XLA writes the same program at several moments; the later file has the compiler's estimates of cycles too.
PROGRAM_FILES = ("*after_codegen.txt", "*after_optimizations.txt")
_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMGT])\)")
_PREFIX = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip. temporary: at the fullest moment; aliased: of the output, those that lie in its arguments."""

    argument: int
    temporary: int
    output: int
    aliased: int
    generated_code: int

    @property
    def total(self) -> int:
        """What must fit: everything that is there at once."""
        return self.argument + self.temporary + self.output - self.aliased + self.generated_code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program as the compiler left it: its text, memory on a chip, its own cost analysis, seconds to compile."""

    text: str
    memory: Memory
    cost: Mapping[str, float]
    seconds: float


def examine(
    run: RunConfig, config: CompileConfig, program: str = "train", say: Callable[[str], None] = lambda line: None
) -> dict:
    """Returns the JSON document of `compile`: what one step of `program` takes of each chip of the topology.

    `say` hears of the long part before it begins. Raises `CallerError`, before it, for what cannot be.
    """
    require(program in PROGRAMS, "--program", program, f"must be in {PROGRAMS}")
    mend = "give --topology=v5p:8x8x8, or bind CompileConfig.topology in the run file"
    require(config.topology is not None, "topology", None, "must be given", mend)
    if program == "decode":
        run = dataclasses.replace(run, mesh=run.mesh.for_generation())
    devices = topology.devices(config)
    mesh = make_mesh(run.mesh, devices)
    _check_sizes(run, config, program, mesh)
    say(f"compiling {program} for {mesh.size} x {config.topology.partition(':')[0]}: up to some minutes")
    started = time.perf_counter()
    lowered = _lower(run, config, mesh, program)
    lowering_seconds = time.perf_counter() - started
    compiled = compile_lowered(lowered)
    counted = _count(run, config, mesh, program, compiled.text)
    return {
        "program": program,
        "topology": config.topology,
        "slices": config.slices,
        "chips": mesh.size,
        "topology_chips": len(devices),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        **_memory_report(compiled.memory, mesh),
        **expected.beside(run, config, mesh, program, counted),
        **_time_report(compiled, counted, mesh),
        "collectives": [dataclasses.asdict(item) for item in counted.collectives],
        "products": [dataclasses.asdict(item) for item in counted.products],
        "unknown_loops": list(counted.unknown_loops),
        "lowering_seconds": round(lowering_seconds, 1),
        "compile_seconds": round(compiled.seconds, 1),
        "date": datetime.date.today().isoformat(),
        "versions": _versions(),
    }


def compile_lowered(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles a program and keeps what can be learnt of it, even where it does not fit.

    The text is XLA's own dump: a TPU compiler newer than JAX makes instructions that JAX cannot read back.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        started = time.perf_counter()
        try:
            with topology.without_flags():
                executable, failure = lowered.compile(compiler_options=options), ""
        except jax.errors.JaxRuntimeError as error:
            executable, failure = None, str(error)
            if not failure.startswith("RESOURCE_EXHAUSTED"):
                raise
        seconds = time.perf_counter() - started
        text = _program_text(pathlib.Path(folder)) or executable.as_text()
    if executable is None:
        return Compiled(text, _memory_beyond(text, failure), {}, seconds)
    stats, cost = executable.memory_analysis(), executable.cost_analysis() or {}
    memory = Memory(
        argument=stats.argument_size_in_bytes,
        temporary=stats.temp_size_in_bytes,
        output=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        generated_code=stats.generated_code_size_in_bytes,
    )
    return Compiled(text, memory, cost, seconds)


def format_document(document: dict) -> str:
    """Returns the document of `examine` as lines to read."""
    parts = ("argument", "temporary", "output", "generated_code")
    gigabytes = ", ".join(f"{name} {document[f'{name}_bytes'] / 1e9:.2f}" for name in parts)
    need, have = document["total_bytes"] / 1e9, document["memory_bytes"] / 1e9
    verdict = f"fits, {have - need:.1f} GB to spare" if document["fits"] else f"does NOT fit, by {need - have:.1f} GB"
    mesh = ", ".join(f"{axis} {size}" for axis, size in document["mesh"].items())
    machine = f"{document['slices']} x {document['topology']}"
    chips, there = document["chips"], document["topology_chips"]
    count = f"{chips} chip{'s' if chips > 1 else ''}" if chips == there else f"{chips} of {there} chips"
    ratio, of_model = document["compiled_over_executed"], document["compiled_over_model_flops"]
    useful, without = document["useful_fraction"], document["useful_fraction_without_recomputation"]
    lines = [
        f"{document['program']} on {count} ({machine}): {mesh}",
        f"memory      {verdict}: {need:.1f} of {have:.1f} GB a chip ({document['memory_note']})",
        f"            {gigabytes}; {document['aliased_bytes'] / 1e9:.2f} of the output lies in the arguments",
        f"FLOPs       {document['flops_per_chip']:.4g} a chip: {ratio:.4f} of the analytic count, {of_model:.3f} of 6N",
        f"useful      {useful:.3f}; {without:.3f} of what is not recomputed",
        f"time        {_time_line(document)}",
        f"compiling   {document['compile_seconds']} s",
        f"{'collective':<20}{'axes':<24}{'count':>8}{'GB sent a chip':>16}",
    ]
    lines += [
        f"{item['kind']:<20}{' '.join(item['axes']):<24}{item['count']:>8,}{item['bytes_sent'] / 1e9:>16,.3f}"
        for item in document["collectives"]
    ]
    return "\n".join(lines)


def _time_line(document: dict) -> str:
    if document["compute_seconds"] is None:
        return "the compiler gives no estimate for this device"
    return (
        f"{document['compute_seconds']:.3f} s of computations by the compiler's cycles, at least "
        f"{document['flops_seconds']:.3f} s at the chip's peak, {document['argument_seconds']:.3f} s to read arguments"
    )


def _check_sizes(run: RunConfig, config: CompileConfig, program: str, mesh: Mesh) -> None:
    """Raises `CallerError` where rows, sequence or layers do not divide over the mesh."""
    if program == "train":
        run.check_sizes(dict(mesh.shape))
        return
    run.check_dims(dict(mesh.shape))
    run.mesh.chunk_sizes(run.model.num_moe_layers, mesh.shape["stage"])
    span = math.prod(mesh.shape[axis] for axis in run.rules.batch_axes)
    constraint = f"must be divisible by the {'*'.join(run.rules.batch_axes)} axes ({span})"
    require(config.decode_rows % span == 0, "decode_rows", config.decode_rows, constraint)


def _lower(run: RunConfig, config: CompileConfig, mesh: Mesh, program: str) -> jax.stages.Lowered:
    if program == "train":
        return lower_step(run, len(run.data.sources), abstract_state(run, mesh))
    return lower_decode(run, config, mesh)


def _count(run: RunConfig, config: CompileConfig, mesh: Mesh, program: str, text: str) -> work.Work:
    between = run.mesh.dcn_sizes(mesh.shape) if config.slices > 1 else dict.fromkeys(mesh.shape, 1)
    within = {axis: size // between[axis] for axis, size in mesh.shape.items()}
    slow = [axis for axis, degree in between.items() if degree > 1]
    return work.count(hlo.parse(text), within, expected.rounds(run, config, mesh, program), slow)


def _program_text(folder: pathlib.Path) -> str:
    """The largest program that was compiled; "" where the backend writes none."""
    for pattern in PROGRAM_FILES:
        files = sorted(folder.glob(pattern), key=lambda path: path.stat().st_size)
        if files:
            return files[-1].read_text()
    return ""


def _memory_beyond(text: str, failure: str) -> Memory:
    """Memory of a program that was refused: its temporaries as the compiler states them, the rest by its types."""
    stated = _TEMPORARIES.search(failure)
    temporary = int(float(stated[1]) * _PREFIX[stated[2]]) if stated else 0
    entry = hlo.parse(text).entry_computation
    parameters = [item for item in entry.instructions.values() if item.opcode == "parameter"]
    arguments = int(sum(shape.bytes for item in parameters for shape in item.shapes))
    return Memory(argument=arguments, temporary=temporary, output=arguments, aliased=arguments, generated_code=0)


def _memory_report(memory: Memory, mesh: Mesh) -> dict:
    chip = find_chip(mesh.devices.flat[0].device_kind)
    available = chip.memory_bytes if chip else host_memory_bytes() / mesh.size
    on_chip = "of the data sheet's memory; what the runtime reserves is not counted"
    note = on_chip if chip else "an equal share of this host's memory"
    return {f"{name}_bytes": size for name, size in dataclasses.asdict(memory).items()} | {
        "total_bytes": memory.total,
        "memory_bytes": int(available),
        "memory_note": note,
        "fits": memory.total <= available,
        "missing_bytes": max(int(memory.total - available), 0),
    }


def _time_report(compiled: Compiled, counted: work.Work, mesh: Mesh) -> dict:
    """`optimal_seconds` is XLA's, which counts the body of a loop once; ours multiplies its cycles by the rounds."""
    chip = find_chip(mesh.devices.flat[0].device_kind)
    clock = chip.clock_hertz if chip else None
    return {
        "compute_seconds": counted.cycles / clock if clock and counted.cycles else None,
        "flops_seconds": counted.flops / chip.peak_flops if chip else None,
        "argument_seconds": compiled.memory.argument / chip.bandwidth_bytes_per_second if chip else None,
        "optimal_seconds_loops_once": compiled.cost.get("optimal_seconds"),
        "cost_analysis_flops_loops_once": compiled.cost.get("flops"),
    }


def _versions() -> dict[str, str]:
    there = {distribution.name for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in LIBRARIES if name in there}
