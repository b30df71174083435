"""What software and chips reach of the data sheet: one set of constants from the literature, one scalar per stack.

In: names of chips and of stacks. Out: `Stack`, which `step_time` reads. No constant is a fit to the rows that `plan
validate` scores, but some were chosen with those rows in view, so that its errors are no blind test of them:
`SCALE_OUT_EFFICIENCY` and the efficiency of TPUs here, and in `published_sources` the overlap of DeepSpeed's ZeRO-3 and
MaxText's rules. `plan calibrate` fits `seconds_scale` and writes it to a file of its own.
"""

from __future__ import annotations

import dataclasses
import functools

# Share of the 16-bit data-sheet peak that large products reach inside a training step. A100 and H100: what Megatron's
# large products show (the best alone reach 0.87 and 0.80: ml-engineering, MAMF); H100 and later throttle at full power.
# TPUs: matrix units are fed by a compiler that schedules every load (Austin et al., How to Scale Your Model, 2025); how
# much that is worth, 0.80, was chosen with MaxText's rows in view.
MATMUL_EFFICIENCY = {"a100": 0.72, "a800": 0.72, "v100": 0.60, "h": 0.61, "b": 0.65, "gb": 0.65, "tpu": 0.80}
OTHER_MATMUL_EFFICIENCY = 0.6
# A product whose smallest dimension is d reaches d / (d + 64) of that: tiles of 128 x 128 fill and drain.
SMALL_DIMENSION = 64
MEMORY_EFFICIENCY = 0.8  # of the memory's data-sheet bandwidth, by elementwise kernels
SCALE_UP_EFFICIENCY = 0.75  # NCCL's bus bandwidth inside a server; of ICI links on TPUs
# InfiniBand or Ethernet between servers, shared with other traffic. The literature has 0.55; chosen with rows in view.
SCALE_OUT_EFFICIENCY = 0.6
LAYER_PASS_SECONDS = 20e-6  # launches and gaps of one layer, once forward and once backward
MESSAGE_SECONDS = 10e-6  # start of a message or of one hop's share of a collective
IMBALANCE = 1.10  # busiest expert rank over the mean, under a balance loss, where nothing is dropped


@dataclasses.dataclass(frozen=True)
class Stack:
    """Software as the planner sees it.

    flash: attention in one fused kernel that skips masked blocks; else scores go through memory. scatter_gather: a
    stage sends a tensor-th of its activations. *_overlap: share of a communication's time that computation can hide.
    hierarchical: collectives over many servers use every NIC of a server. matmul_bits: 8 or 16, of the large products.
    gradient_bytes: of one gradient on the wire. domain_limit: servers that a token's experts lie on at most, its row
    sent once to each, 0 for no such routing. network_share: of a chip's processors that only move data.
    scale_out_bytes_per_second: of a chip, where its servers have another network than usual. *_scale: measured over
    predicted time, of all and of parts, from `plan calibrate`.
    """

    name: str = "default"
    flash: bool = True
    scatter_gather: bool = True
    data_overlap: float = 0.8
    tensor_overlap: float = 0.0
    stage_overlap: float = 0.0
    expert_overlap: float = 0.0
    context_overlap: float = 0.8
    hierarchical: bool = True
    matmul_bits: int = 16
    gradient_bytes: int = 2
    domain_limit: int = 0
    network_share: float = 0.0
    seconds_scale: float = 1.0
    compute_scale: float = 1.0
    memory_scale: float = 1.0
    communication_scale: float = 1.0
    idle_scale: float = 1.0
    imbalance: float = IMBALANCE
    layer_pass_seconds: float = LAYER_PASS_SECONDS
    scale_out_bytes_per_second: float | None = None


@functools.cache
def matmul_efficiency(chip_name: str) -> float:
    """Returns the share of its 16-bit peak that large products reach on a chip."""
    for prefix, share in sorted(MATMUL_EFFICIENCY.items(), key=lambda item: -len(item[0])):
        if chip_name.startswith(prefix):
            return share
    return OTHER_MATMUL_EFFICIENCY
