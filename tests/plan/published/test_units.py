"""Units of measured values: what is converted, into what, and what is refused."""

import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.plan.published.measurements import PUBLISHED_RUNS, read_rows
from gpt4moe.plan.published.units import in_unit_of, is_memory


@pytest.mark.parametrize(
    ("metric", "value", "unit", "told"),
    [
        ("hw_tflops_per_gpu", 138_000, "GFLOP/s", 138),
        ("tflops_per_gpu", 0.138, "PFLOPS per GPU", 138),
        ("model_tflops_per_gpu", 138, "TFLOPs/s/GPU", 138),
        ("model_tflops_per_gpu", 138, "", 138),
        ("step_time", 5000, "ms", 5),
        ("step_time", 5, "s/step", 5),
        ("step_time", 2, "minutes", 120),
        ("latency", 22, "ms", 0.022),
        ("mfu", 0.52, "fraction", 52),
        ("mfu", 0.52, "", 52),
        ("mfu", 52, "percent", 52),
        ("mfu", 52, "", 52),
        ("hfu", 0.9, "%", 0.9),
        ("tokens_per_s_per_gpu", 1.5, "k tokens/s/chip", 1500),
        ("tokens_per_s", 6e4, "tokens per min", 1000),
        ("gpu_hours", 1.3, "M GPU hours", 1.3e6),
        ("gpu_hours", 10, "GPU-days", 240),
        ("memory_gb", 60, "GiB", 64.424509440),
        ("peak_memory", 60_000, "MB per GPU", 60),
        ("max_context", 43, "k tokens", 43_000),
        ("loss", 2.1, "nats", 2.1),
    ],
)
def test_values_in_the_unit_of_their_metric(metric, value, unit, told):
    assert in_unit_of(metric, value, unit) == pytest.approx(told)


@pytest.mark.parametrize(
    ("metric", "unit", "says"),
    [
        ("step_time", "TFLOP/s", "'TFLOP/s' is no unit of step_time; give s or ms"),
        ("tflops_per_gpu", "TFLOP/s/node", "'TFLOP/s/node' is no unit of tflops_per_gpu; give TFLOP/s or GFLOP/s"),
        ("tokens_per_s", "tok/s/GPU", "'tok/s/GPU' is no unit of tokens_per_s; give tok/s or tokens/min"),
        ("memory", "apples", "'apples' is no unit of memory; give GB or GiB"),
        ("mfu", "TFLOP/s", "'TFLOP/s' is no unit of mfu; give % or fraction"),
    ],
)
def test_units_of_another_kind(metric, unit, says):
    with pytest.raises(CallerError) as caught:
        in_unit_of(metric, 1.0, unit)
    assert str(caught.value) == says


def test_published_rows_are_in_these_units():
    rows = read_rows(PUBLISHED_RUNS)
    assert {row.unit for row in rows if row.told == row.value} == {"TFLOP/s", "s", "%", "h", "tok/s", "tokens", "count"}
    assert {row.unit for row in rows if row.told != row.value} == {"ms"}
    assert is_memory("memory_gb") and is_memory("peak_memory_gb") and not is_memory("mfu")
