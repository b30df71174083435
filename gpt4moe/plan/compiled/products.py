"""FLOPs of one instruction of a compiled program, where it is a matrix product; a multiply-add is two.

XLA:TPU writes products as convolutions, XLA:CPU as dots or calls of a matrix library; a Pallas kernel hides its own.
"""

from __future__ import annotations

import functools
import math
import re

from gpt4moe.plan.compiled.hlo import Computation, Instruction

# Library calls of XLA:CPU (oneDNN) whose operands are two matrices.
MATMUL_CALLS = ("matmul", "gemm")
# Products that each splash attention kernel makes of every pair of blocks it visits.
SPLASH_PRODUCTS = {"splash_mqa_fwd": 2, "splash_mqa_dq": 3, "splash_mqa_dkv": 4}
# What the names of our kernels begin with that multiply blocks of rows, as many as are in use.
GROUPED_KERNELS = "grouped_"
_ROW_TILE = re.compile(r'ragged_dot_tiling="(\d+),')
_KERNEL_FLOPS = re.compile(r'"flops": ?"?(\d+)')


def product_flops(instruction: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of an instruction that stands in `computation`, 0 where it is no product."""
    if instruction.opcode == "dot":
        left = computation.operand(instruction, 0).shapes[0]
        contracted = _numbers(instruction.attribute("lhs_contracting_dims"))
        return 2.0 * instruction.shapes[0].size * math.prod(left.dims[dim] for dim in contracted)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.opcode == "custom-call":
        return _custom_call_flops(instruction, computation)
    return 0.0


def row_tiles(instruction: Instruction, computation: Computation) -> float | None:
    """Tiles of rows that a TPU's grouped product has room for, None for any other instruction.

    `ragged_dot` is cut into tiles; a kernel of ours takes blocks [X, C, D], its first operand of three dims.
    """
    if instruction.opcode != "custom-call":
        return None
    if instruction.name.startswith(GROUPED_KERNELS):
        operands = (computation.instructions[name].shapes[0] for name in instruction.operands)
        return next(shape.dims[0] for shape in operands if len(shape.dims) == 3)
    found = _ROW_TILE.search(instruction.attributes)
    return instruction.shapes[0].dims[0] / int(found[1]) if found else None


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """Two per multiply-add that meets a real element: not padding, not the holes of a dilated operand."""
    labels = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels"))
    left, kernel = (computation.operand(instruction, index).shapes[0] for index in (0, 1))
    output = instruction.shapes[0]
    spatial = sorted(letter for letter in labels[1] if letter.isdigit())
    window = _window(instruction.attribute("window"), len(spatial))
    met = math.prod(
        _positions(
            left.dims[labels[1].index(dim)],
            kernel.dims[labels[2].index(dim)],
            output.dims[labels[3].index(dim)],
            *(window[name][int(dim)] for name in ("stride", "pad", "lhs_dilate", "rhs_dilate")),
        )
        for dim in spatial
    )
    features = kernel.dims[labels[2].index("i")] * output.dims[labels[3].index("f")]
    groups = int(instruction.attribute("batch_group_count") or 1)
    return 2.0 * met * features * left.dims[labels[1].index("b")] / groups


def _window(text: str | None, rank: int) -> dict[str, list]:
    """The fields of `window={...}`, spatial dim by spatial dim, defaults where XLA leaves them out."""
    fields = dict(item.split("=") for item in (text or "").strip("{}").split())
    lists = {
        name: [int(n) for n in fields[name].split("x")]
        for name in ("stride", "lhs_dilate", "rhs_dilate")
        if name in fields
    }
    low = [int(pair.split("_")[0]) for pair in fields["pad"].split("x")] if "pad" in fields else [0] * rank
    return {name: lists.get(name, [1] * rank) for name in ("stride", "lhs_dilate", "rhs_dilate")} | {"pad": low}


@functools.lru_cache(maxsize=4096)
def _positions(size: int, kernel: int, output: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs (output position, kernel position) along one spatial dim that meet an element of the input."""
    span = (size - 1) * lhs_dilate + 1
    met = 0
    for tap in range(kernel):
        reached = (at * stride + tap * rhs_dilate - pad for at in range(output))
        met += sum(0 <= position < span and position % lhs_dilate == 0 for position in reached)
    return met


def _custom_call_flops(instruction: Instruction, computation: Computation) -> float:
    """Products inside a call: of a matrix library, of a known kernel, or what the call itself states."""
    target = instruction.attribute("custom_call_target") or ""
    if any(word in target for word in MATMUL_CALLS):
        return _library_flops(instruction, computation)
    kernel = next((name for name in SPLASH_PRODUCTS if instruction.name.startswith(name)), None)
    if kernel:
        return SPLASH_PRODUCTS[kernel] * _causal_product_flops(instruction, computation)
    stated = _KERNEL_FLOPS.search(instruction.attributes)
    return float(stated[1]) if stated else 0.0


def _library_flops(instruction: Instruction, computation: Computation) -> float:
    """[.., I, J] by [.., J, K], either transposed: J is what the operands hold beyond the result's I and K."""
    left, right = (computation.operand(instruction, index).shapes[0] for index in (0, 1))
    output = next(shape for shape in instruction.shapes if shape.size)
    batch = math.prod(output.dims[:-2])
    return 2.0 * math.sqrt(left.size * right.size * output.size / batch)


def _causal_product_flops(instruction: Instruction, computation: Computation) -> float:
    """One product of all heads' queries with the keys up to the end of their block; blocks are those of the mask."""
    operands = [computation.instructions[name].shapes[0] for name in instruction.operands]
    mask, query = (next(shape for shape in operands if shape.dtype == kind) for kind in ("s8", "bf16"))
    heads, length, head_dim = query.dims
    block = length // mask.dims[-2]
    return 2.0 * heads * head_dim * length * (length + block) / 2


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text or "")]
