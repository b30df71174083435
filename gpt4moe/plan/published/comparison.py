"""One measured row beside its prediction: training steps, bytes of a chip, and inference.

In: a `Row`. Out: a `Compared`, or a `Skipped` with the reason. Each kind of row has its predictor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence

from gpt4moe.config.check import CallerError
from gpt4moe.plan.published import conventions, units
from gpt4moe.plan.published.calibration import Entry, calibrated
from gpt4moe.plan.published.measurements import WIDTHS, NotTold, Row
from gpt4moe.plan.published.serving_rows import predict_row
from gpt4moe.plan.published.setups import Setup, setup_of

# A stack's rows of hours of whole runs are apart: restarts and stops are in them, which are no matter of a step.
WHOLE_RUN = ", whole runs"
# No software is so far from its data sheets: a row beyond has a slip in a number or a unit.
FARTHEST = 1000.0
PER_SECOND = ("tokens_per_s", "tokens_per_s_per_gpu", "tokens_per_s_per_node", "max_context")


@dataclasses.dataclass(frozen=True)
class Compared:
    """A row and what was predicted, in the row's unit. seconds: of a step, None for what is no training step.

    error: of the time, predicted over measured minus one (of the value, where it is no time or rate). is_whole_run: the
    measured number has restarts and stops in it. fits: whether the prediction's bytes fit the chip.
    """

    row: Row
    source: str
    stack: str
    predicted: float
    error: float
    predicted_seconds: float | None = None
    measured_seconds: float | None = None
    utilization: tuple[float, float] | None = None
    setup: Setup | None = None
    is_whole_run: bool = False

    @property
    def job(self) -> Hashable:
        """The same for rows that tell one measurement in two ways."""
        setup = self.setup
        return (setup.shape, setup.layout, setup.batch_tokens, setup.sequence_length) if setup else self.row.name

    @property
    def fits(self) -> bool | None:
        """Whether the bytes fit."""
        return self.setup.memory.fits if self.setup else None


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A row without a prediction, and why."""

    name: str
    reason: str


def compare(row: Row, calibration: Mapping[str, Entry] | None = None) -> Compared | Skipped:
    """Returns the row beside its prediction, or the reason with its place where it has none.

    A row has none where it leaves out what is needed, is of a chip that we do not know, or contradicts itself.
    calibration: constants by stack and chip (`calibration`), None for the uncalibrated model.
    """
    try:
        found = PREDICTORS[row.kind](row, calibration or {})
        _check_near(found)
        return found
    except CallerError as error:
        reason = str(error)
        between = ", " if reason.startswith("column ") else ": "
        return Skipped(row.name, reason if row.where in reason else f"{row.where}{between}{reason}")


def _check_near(found: Compared) -> None:
    if 1 / FARTHEST < 1 + found.error < FARTHEST:
        return
    row = found.row
    said = f"{row.value:g} {row.unit} is more than {FARTHEST:g} times from the {found.predicted:.4g} predicted"
    raise CallerError(f"{row.where}, column value: {said}; look at unit, gpus and counts")


def compare_all(
    rows: Sequence[Row], calibration: Mapping[str, Entry] | None = None
) -> tuple[list[Compared], list[Skipped]]:
    """Returns the rows beside their predictions and those without one; raises `CallerError` where all are without."""
    found = [compare(row, calibration) for row in rows]
    compared = [item for item in found if isinstance(item, Compared)]
    skipped = [item for item in found if isinstance(item, Skipped)]
    if not compared:
        others = f" (and {len(skipped) - 1} more rows without a prediction)" if len(skipped) > 1 else ""
        raise CallerError(skipped[0].reason + others)
    return compared, skipped


def _compare_training(row: Row, calibration: Mapping[str, Entry]) -> Compared:
    metric = row.measured_metric
    for name in WIDTHS:
        if getattr(row, name) is None:
            raise NotTold(f"{row.where}, column {name}: '' must be told of a model to train")
    if units.is_memory(metric):
        return _compare_memory(row)
    if metric not in conventions.SECONDS:
        raise NotTold(f"{row.where}, column measured_metric: {metric!r} is no time, rate or memory of a step")
    setup = setup_of(row)
    source, chip_name = setup.source, setup.chip.name
    stack = calibrated(source.stack, chip_name, calibration)
    setup = dataclasses.replace(setup, source=dataclasses.replace(source, stack=stack))
    measured, predicted = conventions.measured_seconds(setup), setup.step.seconds
    ratio = predicted / measured
    is_time = metric in ("step_time", "gpu_hours")
    work = conventions.model_flops_per_token(setup, causal=False) * setup.batch_tokens
    peak = setup.chips * setup.chip.peak_flops
    return Compared(
        row, source.name, f"{stack.name}/{chip_name}{WHOLE_RUN if metric == 'gpu_hours' else ''}",
        row.value * ratio if is_time else row.value / ratio, ratio - 1, predicted, measured,
        (work / predicted / peak, work / measured / peak), setup, metric == "gpu_hours",
    )  # fmt: skip


def _compare_memory(row: Row) -> Compared:
    setup = setup_of(row)
    predicted = setup.memory.total_bytes / 1e9 * row.value / row.told
    source = f"{setup.source.name}-memory"
    return Compared(row, source, f"{source}/{setup.chip.name}", predicted, predicted / row.value - 1, setup=setup)


def _compare_inference(row: Row, calibration: Mapping[str, Entry]) -> Compared:
    predicted = predict_row(dataclasses.asdict(row)) * row.value / row.told
    higher_is_better = row.measured_metric in PER_SECOND and row.measured_metric != "max_context"
    if not predicted > 0:
        raise NotTold(f"nothing can be served like this: predicted {row.measured_metric} {predicted:g}")
    ratio = row.value / predicted if higher_is_better else predicted / row.value
    source = _first_words(row)
    return Compared(row, source, f"{source}/{row.chip.name}", predicted, ratio - 1)


def _first_words(row: Row) -> str:
    """Source of an inference row: its name's first word and what it measures."""
    return f"{row.name.split('-')[0]}-{row.measured_metric}"


PREDICTORS: dict[str, Callable[[Row, Mapping[str, Entry]], Compared]] = {
    "train": _compare_training,
    "infer": _compare_inference,
}
