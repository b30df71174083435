"""What a published number means in seconds of one step, or in bytes of one chip: the conventions of each metric.

In: a `Setup`. Out: the measured value as seconds (or bytes). Conventions: Narayanan et al. 2021 (2104.04473), equation
3, counts what is computed again; PaLM (2204.02311), appendix B, does not; MaxText halves the attention core.
"""

from __future__ import annotations

from collections.abc import Callable

from gpt4moe.accounting import flops
from gpt4moe.config.check import CallerError
from gpt4moe.plan.published.measurements import NotTold
from gpt4moe.plan.published.setups import Setup

HOUR_SECONDS = 3600
HOURS = {"h": 1.0, "hours": 1.0, "kh": 1e3, "Mh": 1e6}
TERA = {"G": 1e-3, "T": 1.0, "P": 1e3}


def model_flops_per_token(setup: Setup, *, causal: bool, recompute: bool = False) -> float:
    """Returns training FLOPs of one token, matmuls with head and attention core; the layers once more if recomputed."""
    shape = setup.shape
    core = flops.attention_core_flops_per_token(shape, setup.sequence_length, causal=causal)
    forward = flops.forward_flops_per_token(shape)
    again = forward - 2 * shape.vocab_size * shape.model_dim + core if recompute else 0.0
    return 3 * (forward + core) + again


def _from_rate(setup: Setup, flops_per_second: float, *, causal: bool, recompute: bool = False) -> float:
    work = model_flops_per_token(setup, causal=causal, recompute=recompute) * setup.batch_tokens
    return work / (setup.chips * flops_per_second)


def _hardware(setup: Setup, value: float) -> float:
    full = setup.layout.remat == "full"
    return _from_rate(setup, value * 1e12, causal=False, recompute=full)


def _tflops(setup: Setup, value: float) -> float:
    """FLOP/s that do not say which: those of Megatron's line of code count what it computes again."""
    again = setup.source.counts_recompute and setup.layout.remat == "full"
    return _from_rate(setup, value * 1e12, causal=setup.source.causal, recompute=again)


def _utilization(setup: Setup, value: float, causal: bool | None = None) -> float:
    """Of the 16-bit peak; llm-foundry divides by the 8-bit one where it multiplies in 8 bits."""
    half = setup.source.causal if causal is None else causal
    in_eight = setup.source.name == "mpt" and setup.source.stack.matmul_bits == 8
    peak = setup.chip.peak_8bit_ops if in_eight else setup.chip.peak_flops
    return _from_rate(setup, value / 100 * peak, causal=half)


def _tokens_per_chip(setup: Setup, value: float) -> float:
    return setup.batch_tokens / (value * setup.chips)


def _chip_hours(setup: Setup, value: float) -> float:
    """Hours of all chips for the tokens of the run, restarts among them."""
    row = setup.row
    known = [start for start in setup.source.tokens if row.name.lower().startswith(start)]
    if not known:
        raise NotTold(f"gpu_hours need the tokens of the run, which are not known here ({row.where})")
    steps = setup.source.tokens[max(known, key=len)] / setup.batch_tokens
    return value * HOUR_SECONDS / setup.chips / steps


SECONDS: dict[str, Callable[[Setup, float], float]] = {
    "step_time": lambda setup, value: value,
    "hw_tflops_per_gpu": _hardware,
    "tflops_per_gpu": _tflops,
    "model_tflops_per_gpu": lambda setup, value: _from_rate(setup, value * 1e12, causal=setup.source.causal),
    "mfu": _utilization,
    "hfu": lambda setup, value: _hardware(setup, value / 100 * setup.chip.peak_flops / 1e12),
    "mfu_noncausal_bf16peak": lambda setup, value: _utilization(setup, value, causal=False),
    "tokens_per_s_per_gpu": _tokens_per_chip,
    "tokens_per_s": lambda setup, value: setup.batch_tokens / value,
    "gpu_hours": _chip_hours,
}
MEMORY_UNITS = {"GB": 1e9, "GiB": 2**30, "MB": 1e6, "B": 1.0}
MEMORY_METRICS = ("memory", "memory_gb", "mem_gb", "memory_per_gpu", "peak_memory", "peak_memory_gb", "max_memory")


def is_memory(metric: str) -> bool:
    """Whether the metric is bytes of one chip."""
    return metric in MEMORY_METRICS or metric.startswith("memory")


def measured_seconds(setup: Setup) -> float:
    """Returns the seconds of a step that the row's value means; raises for more than the chips' peak."""
    row = setup.row
    seconds = SECONDS[row.measured_metric](setup, _scaled(setup))
    peak = setup.chip.peak_8bit_ops or setup.chip.peak_flops
    least = flops.train_flops_per_token(setup.shape) * setup.batch_tokens / (setup.chips * peak)
    if seconds < least:
        told = f"{row.value:g} {row.unit} is {least / seconds:.3g} times what the chips compute at their peak"
        raise CallerError(f"{row.where}, column value: {told}; look at unit, gpus and counts")
    return seconds


def _scaled(setup: Setup) -> float:
    """The value in the unit of its metric: seconds, hours, percent, TFLOP/s; rows have other prefixes, or fractions."""
    row, value = setup.row, setup.row.value
    metric, unit = row.measured_metric, row.unit
    if metric == "step_time":
        return value * row.unit_seconds
    if metric == "gpu_hours":
        if unit not in HOURS:
            raise NotTold(f"{row.where}, column unit: {unit!r} of gpu_hours must be in {tuple(HOURS)}")
        return value * HOURS[unit]
    if metric.startswith(("mfu", "hfu")) and unit != "%" and value <= 1:
        return 100 * value
    if "tflops" in metric and "flop" in unit.lower():
        return value * TERA.get(unit[0].upper(), 1.0)
    return value
