"""What a parallel layout replaces in the model: operations whose data it must move itself, each behind one contract.

`Layout()` is one device. `gpt4moe.parallel.layout` gives those of a mesh; the model knows no mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from gpt4moe.model.attention_kernel import attend, attend_across
from gpt4moe.model.cache import attend_through
from gpt4moe.model.experts import apply_experts
from gpt4moe.model.vocabulary import cross_entropy
from gpt4moe.types import Array

# A model of at most this many superblocks is laid out without a loop: no copy of each layer's parameters in and of its
# gradients and activations out, a sixth of the step of a small model on a CPU. Deeper ones compile once for all layers.
MOST_UNROLLED = 8


def scan_layers(superblock: Callable, parameters, cache, x_BTD: Array, tokens) -> tuple:
    """Returns (x_BTD, cache, reports, idle slots) after all superblocks, one after the other.

    `superblock(x_BTD, parameters, cache, tokens) -> (x_BTD, cache, report)` is one of them; parameters, cache and
    reports lead with a dim over superblocks. Given indices as a fifth argument it takes its parameters from there in a
    stack. Idle slots are those of a pipeline; None here.
    """

    def step(x_BTD: Array, layers: tuple) -> tuple:
        x_BTD, layer_cache, report = superblock(x_BTD, *layers, tokens)
        return x_BTD, (layer_cache, report)

    few = is_unrolled(jax.tree.leaves(parameters)[0].shape[0])
    x_BTD, (cache, reports) = jax.lax.scan(step, x_BTD, (parameters, cache), unroll=few)
    return x_BTD, cache, reports, None


def is_unrolled(num_superblocks: int) -> bool:
    """Whether `scan_layers` lays out so many superblocks without a loop."""
    return num_superblocks <= MOST_UNROLLED


def unchanged(x: Array) -> Array:
    """Returns `x`."""
    return x


@dataclasses.dataclass(frozen=True)
class Layout:
    """One function for each operation, with the signature of its default.

    slots: which superblock each slot of the parameter stacks holds, -1 where it holds none (None: in order).
    residual: lays out the residual stream [B, T, D] between layers. by_row: lays out images [B * images, ...] with
    their rows. row_multiple: what a number of rows must divide by.
    """

    attend: Callable = attend
    attend_across: Callable = attend_across
    attend_through: Callable = attend_through
    apply_experts: Callable = apply_experts
    cross_entropy: Callable = cross_entropy
    run_layers: Callable = scan_layers
    residual: Callable = unchanged
    by_row: Callable = unchanged
    slots: tuple[int, ...] | None = None
    row_multiple: int = 1

    def order(self, num_superblocks: int) -> list[int]:
        """The slot of every superblock."""
        slots = self.slots or range(num_superblocks)
        return sorted((slot for slot in range(len(slots)) if slots[slot] >= 0), key=lambda slot: slots[slot])


ONE_DEVICE = Layout()
