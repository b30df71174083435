"""From the peak of the chips to the tokens that a run delivers: seconds by cause in, one bar for each cause out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from gpt4moe.config.check import require, require_not_negative, require_positive

# In the order in which a reader meets them: what the chip does, what its neighbours cost, what the job costs.
CAUSES = {
    "idle_chips": "chips for which there is no whole replica",
    "attention_core": "scores and weighted values, which model FLOPs leave out",
    "recompute": "computed again in the backward pass, to save memory",
    "matmul": "matrix products below the peak",
    "elementwise": "norms, activations and other work that memory bounds",
    "overhead": "launches and gaps between kernels",
    "tensor_communication": "all-reduces among the chips of a layer",
    "context_communication": "keys and values among the chips of a sequence",
    "expert_communication": "tokens on their way to experts and back",
    "imbalance": "chips that wait for the fullest expert",
    "stage_communication": "activations between stages",
    "bubble": "stages without work at both ends of a step",
    "data_communication": "gradients and weights among replicas, where no work hides it",
    "optimizer": "the update of the weights",
    "failures": "saves, lost work and restarts",
}
PEAK = "peak"


@dataclasses.dataclass(frozen=True)
class Bar:
    """One cause of a step's time. share: of the whole time; utilization: of the peak when causes so far are counted."""

    cause: str
    meaning: str
    seconds: float
    share: float
    utilization: float


def waterfall(ideal_seconds: float, lost_seconds: Mapping[str, float], goodput: float = 1.0) -> list[Bar]:
    """Returns the bars of a step, the peak first.

    ideal_seconds: model FLOPs at the chips' peak; lost_seconds: what each cause adds, known or not, those of `CAUSES`
    in their order and then the others; goodput: what failures leave of the time, which becomes the last bar.
    """
    require_positive("ideal_seconds", ideal_seconds)
    require(0 < goodput <= 1, "goodput", goodput, "must lie above 0 and be at most 1")
    for cause, seconds in lost_seconds.items():
        if cause != "matmul":  # products in 8 bits may take less than the ideal, which is of the 16-bit peak
            require_not_negative(cause, seconds)
    step = ideal_seconds + sum(lost_seconds.values())
    lost = {cause: lost_seconds[cause] for cause in (*CAUSES, *lost_seconds) if cause in lost_seconds}
    if goodput < 1:
        lost["failures"] = step / goodput - step + lost.pop("failures", 0.0)
    total, so_far = ideal_seconds + sum(lost.values()), ideal_seconds
    bars = [Bar(PEAK, "model FLOPs at the peak of the chips", ideal_seconds, ideal_seconds / total, 1.0)]
    for cause, seconds in lost.items():
        so_far += seconds
        bars.append(Bar(cause, CAUSES.get(cause, cause), seconds, seconds / total, ideal_seconds / so_far))
    return bars


def format_bars(bars: Sequence[Bar]) -> str:
    """Returns the bars as a table to read; what takes less than a thousandth is left out."""
    lines = [f"{'cause':<22}{'seconds':>10}{'share':>8}{'of peak':>9}  "]
    for bar in bars:
        if abs(bar.share) >= 1e-3:
            line = f"{bar.cause:<22}{bar.seconds:>10.3f}{bar.share:>8.1%}{bar.utilization:>9.1%}  {bar.meaning}"
            lines.append(line)
    return "\n".join(lines)
