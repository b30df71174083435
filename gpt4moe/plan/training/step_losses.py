"""What keeps a step from the peak of its chips, by cause: `step_time`'s estimate in, seconds lost to each cause out.

Causes are the parts of `step_time.KINDS`, but that products lose only what they take beyond the peak, and that the
fullest expert and chips without a replica are causes of their own.
"""

from __future__ import annotations

import dataclasses

from gpt4moe.accounting import flops
from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import require, require_positive
from gpt4moe.plan.training import step_time
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.stacks import Stack
from gpt4moe.plan.training.step_time import StepTime

# Parts that hold the model FLOPs; which of a stage's layers and head they fall into differs from stage to stage.
PRODUCTS = ("matmul", "expert_matmul", "head")


@dataclasses.dataclass(frozen=True)
class StepLosses:
    """One step of `batch_tokens` tokens on `num_chips` chips.

    ideal_seconds: model FLOPs at the 16-bit peak of all chips; lost_seconds: what each cause adds, `matmul` negative
    where products in 8 bits beat that peak.
    """

    step: StepTime
    batch_tokens: int
    ideal_seconds: float
    lost_seconds: dict[str, float]

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.step.seconds

    @property
    def utilization(self) -> float:
        """Model FLOPs over the peak of all chips, those without a replica among them."""
        return self.ideal_seconds / self.seconds


def whole_batch(layout: Layout, batch_tokens: float, sequence_length: int) -> int:
    """Returns the tokens of the most whole microbatches of every replica that `batch_tokens` hold.

    Raises `CallerError` where they do not hold one of each.
    """
    require_positive("--batch_tokens", batch_tokens)
    require_positive("--sequence_length", sequence_length)
    span = layout.data * layout.microbatch_rows
    rows = int(batch_tokens // sequence_length) // span * span
    need = f"must hold a microbatch for each of the {layout.data} replicas ({span * sequence_length} tokens)"
    require(rows > 0, "--batch_tokens", batch_tokens, need)
    return rows * sequence_length


def step_losses(
    shape: Shape, layout: Layout, chip: Chip, batch_tokens: int, sequence_length: int, *,
    stack: Stack | None = None, num_chips: int | None = None,
) -> StepLosses:  # fmt: skip
    """Returns where the time of one step goes.

    num_chips: of the job, None for those of the layout. Raises `CallerError` where shape or batch do not divide.
    """
    stack, num_chips = stack or Stack(), num_chips or layout.chips
    step = step_time.estimate(shape, layout, chip, batch_tokens, sequence_length, stack)
    even = step_time.estimate(
        shape, layout, chip, batch_tokens, sequence_length, dataclasses.replace(stack, imbalance=1.0)
    )
    needed = batch_tokens * flops.train_flops_per_token(shape) / chip.peak_flops
    ideal, in_use = needed / num_chips, needed / layout.chips
    lost = {cause: seconds for cause, seconds in even.parts.items() if cause not in PRODUCTS}
    products = sum(even.parts[cause] for cause in PRODUCTS)
    lost |= {
        "idle_chips": in_use - ideal,
        "matmul": products - in_use,
        "imbalance": step.seconds - even.seconds,
    }
    return StepLosses(step, batch_tokens, ideal, lost)
