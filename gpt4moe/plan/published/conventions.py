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


def measured_seconds(setup: Setup) -> float:
    """Returns the seconds of a step that the row's value means; raises for more than the chips' peak."""
    row = setup.row
    seconds = SECONDS[row.measured_metric](setup, row.told)
    _check_peak(setup, seconds)
    return seconds


def _check_peak(setup: Setup, seconds: float) -> None:
    """Raises for a rate above the peak, or a step of more FLOPs; where the batch is a guess of ours, that is named.

    The peak is the 8-bit one where the row's software multiplies in 8 bits.
    """
    row, chip = setup.row, setup.chip
    in_eight = setup.source.stack.matmul_bits == 8 and chip.peak_8bit_ops
    peak = chip.peak_8bit_ops if in_eight else chip.peak_flops
    if row.measured_metric.endswith("tflops_per_gpu"):
        needed = row.told * 1e12
    elif row.measured_metric.startswith(("mfu", "hfu")):
        needed = row.told / 100 * (peak if setup.source.name == "mpt" else chip.peak_flops)
    else:
        needed = flops.train_flops_per_token(setup.shape) * setup.batch_tokens / (seconds * setup.chips)
    if needed <= peak:
        return
    said = f"{row.value:g} {row.unit} means {needed / 1e12:.4g} TFLOP/s a chip, {chip.name} has {peak / 1e12:.4g}"
    if row.measured_metric == "step_time" and "global_batch_tokens" in setup.guessed:
        raise NotTold(f"{row.where}, column global_batch_tokens: is empty, and with {setup.batch_tokens} {said}")
    raise CallerError(f"{row.where}, column value: {said}; look at unit, gpus and counts")
