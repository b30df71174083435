"""From the text of an optimised XLA program to its computations: instructions, shapes, calls and loop lengths.

In: the text of one HLO module, as `jax.stages.Compiled.as_text()` gives it or XLA dumps it. Out: a `Module` that
`plan.work` walks. Only what counting needs is read: result shapes, operands, called computations, attributes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

DTYPE_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip

# What the first line of a computation, of an instruction and of an end begin with.
_BEGINNINGS = ("%", "ENTRY ", "  %", "  ROOT ", "}, ")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]")
_NAMED = re.compile(r"%([\w.\-]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: its element type and dims."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes, without the padding of a tiled layout; types the table lacks (8-bit floats) take one each."""
        return self.size * DTYPE_BITS.get(self.dtype, 8) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation: its opcode, result arrays (several for a tuple), names of its operands, and the rest as text."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    argument: str  # what stands between the parentheses: the value of a constant, the number of a parameter
    attributes: str

    def attribute(self, name: str) -> str | None:
        """The text of `name=...` up to the next attribute, None where there is none."""
        found = re.search(rf"\b{name}=(.*?)(?=, \w+=|$)", self.attributes)
        return found[1] if found else None

    def called(self, name: str) -> str:
        """The computation that attribute `name` names."""
        return re.search(rf"\b{name}=%([\w.\-]+)", self.attributes)[1]

    @property
    def calls(self) -> tuple[str, ...]:
        """Every computation that it calls, branches of a conditional included."""
        branches = re.search(r"branch_computations=\{(.*?)\}", self.attributes)
        return tuple(_CALLED.findall(self.attributes)) + tuple(_NAMED.findall(branches[1]) if branches else ())


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; `root` is the name of the result's."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """The instruction that made operand `index`."""
        return self.instructions[instruction.operands[index]]

    def source(self, name: str) -> Instruction:
        """The instruction a value comes from, past copies and changes of type."""
        instruction = self.instructions[name]
        while instruction.opcode in ("copy", "convert", "bitcast", "reshape") and instruction.operands:
            instruction = self.instructions[instruction.operands[0]]
        return instruction


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, the entry's name, and the source functions behind each stack frame."""

    computations: Mapping[str, Computation]
    entry: str
    frames: Mapping[int, tuple[str, ...]]

    @property
    def entry_computation(self) -> Computation:
        """The one that the program starts in; its parameters are the program's arguments."""
        return self.computations[self.entry]

    def trips(self, loop: Instruction, caller: Computation) -> int | None:
        """How often the body of a `while` runs; None where that is known only at run time."""
        known = _TRIP_COUNT.search(loop.attributes)
        if known:
            return int(known[1])
        bound = self._bound(self.computations[loop.called("condition")])
        if bound is None:
            return None
        counter, limit = bound
        start = _constant(caller, _element(caller, loop.operands[0], counter))
        step = self._step(self.computations[loop.called("body")], counter)
        return max(math.ceil((limit - (start or 0)) / step), 0)

    def _bound(self, condition: Computation) -> tuple[int, int] | None:
        """(which element of the loop's tuple counts, what it must stay below) of `element < constant`."""
        root = condition.instructions[condition.root]
        arguments = {name: name for name in condition.instructions}
        inner = condition
        if root.opcode == "fusion":
            inner = self.computations[root.called("calls")]
            parameters = [i for i in inner.instructions.values() if i.opcode == "parameter"]
            arguments = {i.name: root.operands[int(i.argument)] for i in parameters}
            root = inner.instructions[inner.root]
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        traced = [inner.source(name) for name in root.operands]
        left, right = (condition.source(arguments[i.name]) if i.name in arguments else i for i in traced)
        if left.opcode != "get-tuple-element" or right.opcode != "constant":
            return None
        return int(left.attribute("index")), int(right.argument)

    def _step(self, body: Computation, counter: int) -> int:
        """What a round adds to the counter: above 1 where the compiler has unrolled the loop."""
        added = body.source(body.instructions[body.root].operands[counter])
        inner = body
        if added.opcode == "fusion":
            inner = self.computations[added.called("calls")]
            added = inner.instructions[inner.root]
        steps = [_constant(inner, name) for name in added.operands] if added.opcode == "add" else []
        return next((step for step in steps if step), 1)


def parse(text: str) -> Module:
    """Returns the module that `text` spells."""
    computations, entry = {}, ""
    name, instructions, root = "", {}, ""
    for line in _whole_lines(text):
        header = _COMPUTATION.match(line)
        if header:
            name, instructions, root = header[2], {}, ""
            entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, instructions, root)
        elif line.startswith("  ") and " = " in line:
            instruction = _instruction(line)
            instructions[instruction.name] = instruction
            root = instruction.name if line.startswith("  ROOT ") else root
    return Module(computations, entry, _frames(text))


def shapes(text: str) -> tuple[Shape, ...]:
    """Returns every array that the text of a type names, in order."""
    return tuple(
        Shape(dtype, tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim))
        for dtype, dims in _SHAPE.findall(text)
    )


def _whole_lines(text: str) -> Iterator[str]:
    """The lines of a module; one that an attribute (a kernel's metadata) runs over several of is put together."""
    whole = ""
    for line in text.splitlines():
        if line.startswith(_BEGINNINGS) or line == "}":
            yield whole
            whole = line
        else:
            whole += line.strip()
    yield whole


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    result_end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    opcode, _, rest_of_call = rest[result_end:].strip().partition("(")
    call_end = _closing("(" + rest_of_call) - 1
    argument = rest_of_call[: call_end - 1]
    return Instruction(
        name=name.lstrip("%"),
        opcode=opcode,
        shapes=shapes(rest[:result_end]),
        operands=tuple(_NAMED.findall(argument)),
        argument=argument,
        attributes=rest_of_call[call_end:].lstrip(", "),
    )


def _closing(text: str) -> int:
    """The position after the parenthesis that closes the one `text` begins with."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _element(computation: Computation, name: str, index: int) -> str:
    """The name of element `index` of a tuple, or of the tuple itself where it is not made here."""
    made = computation.source(name)
    return made.operands[index] if made.opcode == "tuple" else made.name


def _constant(computation: Computation, name: str) -> int | None:
    made = computation.source(name)
    return int(made.argument) if made.opcode == "constant" and made.argument.lstrip("-").isdigit() else None


def _frames(text: str) -> dict[int, tuple[str, ...]]:
    """The functions on each stack frame as `file.py:function`, innermost first."""
    table = functools.partial(_table, text)
    files, functions = table("FileNames"), table("FunctionNames")
    locations = {key: [int(n) for n in re.findall(r"=(\d+)", line)[:2]] for key, line in table("FileLocations").items()}
    places = {
        key: f"{files[file].strip(chr(34)).rpartition('/')[2]}:{functions[function].strip(chr(34))}"
        for key, (file, function) in locations.items()
    }
    # A frame without a parent names itself.
    links = {key: [int(n) for n in re.findall(r"=(\d+)", line)] for key, line in table("StackFrames").items()}
    chains: dict[int, tuple[str, ...]] = {}
    for key, (location, *parent) in links.items():
        chain, seen = [places[location]], {key}
        above = parent[0] - 1 if parent else 0
        while above in links and above not in seen:
            seen.add(above)
            chain.append(places[links[above][0]])
            above = links[above][1] - 1 if len(links[above]) > 1 else 0
        chains[key] = tuple(chain)
    return chains


def _table(text: str, title: str) -> dict[int, str]:
    found = re.search(rf"^{title}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
    rows = (line.partition(" ") for line in found[1].splitlines()) if found else ()
    return {int(number): rest for number, _, rest in rows}
