"""Predicts published measurements of serving, a row of published_runs.csv at a time, from shapes, chips and layouts.

In: a row as the CSV has it, kind `infer`. Out: the number that its `measured_metric` is about, times in seconds. What
the columns do not say (formats, layouts, how many prompt tokens were cached) is what the row's own source reports.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from gpt4moe.accounting.chips import chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import require
from gpt4moe.plan.published.measurements import NotTold
from gpt4moe.plan.serving.cost import rows_at_speed
from gpt4moe.plan.serving.layout import Efficiency, ServeLayout, max_context
from gpt4moe.plan.serving.rooflines import Server, decode_step, prefill_step

# The literature's share of the peak in large products; nothing here is fitted to the rows.
MEASURED = Efficiency(matmul=0.72, memory=0.8, link=0.75, outside_link=0.55, collective_seconds=20e-6)
HOPPER_MATMUL = 0.61

# Pope et al. 2022, tables 2 and 3: latencies of 64 decoded tokens, or of a whole prompt.
POPE_DECODED_TOKENS = 64
POPE_INT8_MOST_SEQUENCES = 64  # their low-latency settings have int8 weights, those of large batches bfloat16
POPE_CACHE_FRACTION = 0.3  # of memory, table 1

# DeepSeek, open-infra-index, day 6: tokens a second of one user (20 to 22), share of prompt tokens found in the cache,
# chips of an expert group for prompts, 32, and for decoding, 144: some experts are there twice, 128 divides all 256.
# Its paper (2412.19437, section 3.4): four nodes to a token. The length of a prompt is ours.
DEEPSEEK_USER_TOKENS_PER_SECOND = 21.0
DEEPSEEK_CACHED_FRACTION = 0.563
DEEPSEEK_EXPERT_GROUPS = {"decode": 128, "prefill": 32}
DEEPSEEK_NODES_PER_TOKEN = 4
DEEPSEEK_PROMPT_TOKENS = 4096
NODE_CHIPS = 8


def predict_row(row: dict[str, Any]) -> float:
    """Returns what the model predicts of one row, a latency in seconds.

    Raises `CallerError` for a row it cannot read, `NotTold` for one of a source whose layouts it does not know.
    """
    name = row["name"]
    for prefix, (metric, predict) in PREDICTORS.items():
        if name.startswith(prefix):
            if row.get("measured_metric", metric) != metric:
                raise NotTold(f"column measured_metric: {row['measured_metric']!r} of {prefix} rows must be {metric}")
            return predict(row)
    near = ", ".join(PREDICTORS)
    raise NotTold(f"the layout of a server is known of names that begin with {near}")


def _pope_context(row: dict[str, Any]) -> float:
    """Table 1: multi-head with heads of 128, multi-query replicated, multi-query with the batch over the chips."""
    shape, tensor = _shape(row), _number(row, "gpus")
    if "-mha-" in row["name"]:
        shape = dataclasses.replace(shape, num_kv_heads=shape.num_heads, head_dim=128)
    cache = "batch" if "batchsharded" in row["name"] else "heads"
    memory = POPE_CACHE_FRACTION * chip_named("tpu_v4").memory_bytes
    sequences = _number(row, "global_batch_tokens")
    return max_context(shape, ServeLayout(tensor, cache=cache), sequences, memory)


def _pope_latency(row: dict[str, Any]) -> float:
    found = re.search(r"(prefill|decode)-b(\d+)$", row["name"])
    require(found is not None, "name", row["name"], "must end in prefill-bN or decode-bN, N sequences")
    kind, batch, context = found[1], int(found[2]), _number(row, "seq")
    server = Server(_shape(row), chip_named("tpu_v4"), _pope_layout(row, kind, batch, context), MEASURED)
    if kind == "prefill":
        return prefill_step(server, batch, context).seconds
    mean_context = context + POPE_DECODED_TOKENS / 2
    return POPE_DECODED_TOKENS * decode_step(server, batch, mean_context).seconds


def _pope_layout(row: dict[str, Any], kind: str, batch: int, context: int) -> ServeLayout:
    """Their choices (sections 3.2 and 3.3): weights are gathered where a prompt pass has more tokens than hidden units.

    The cache lies over the batch wherever there are sequences enough.
    """
    weights = "int8" if batch <= POPE_INT8_MOST_SEQUENCES else "bfloat16"
    gathers = kind == "prefill" and batch * context > _shape(row).hidden_dim
    cache = "batch" if batch > 1 else "heads"
    return ServeLayout(
        _number(row, "tp"), weights=weights, cache=cache, feed_forward="gathered" if gathers else "stationary_2d"
    )


def _kipply(row: dict[str, Any]) -> float:
    """Seconds of a prompt or of one token of a 13B model with GPT's plain blocks."""
    server = Server(_shape(row), chip_named("a100_40"), ServeLayout(_number(row, "tp")), MEASURED)
    step = prefill_step if "prefill" in row["name"] else decode_step
    return step(server, 1, _number(row, "seq")).seconds


def _deepseek(row: dict[str, Any]) -> float:
    """Tokens a second of a node of eight chips, with two microbatches whose exchange and computing overlap."""
    kind = "decode" if "decode" in row["name"] else "prefill"
    # Decoding sends to every expert's chip at once, prompts to at most four nodes.
    nodes_per_token = DEEPSEEK_NODES_PER_TOKEN if kind == "prefill" else None
    changes = {"matmul": HOPPER_MATMUL, "expert_overlap": 1.0, "expert_nodes": nodes_per_token}
    efficiency = dataclasses.replace(MEASURED, **changes)
    layout = ServeLayout(expert=DEEPSEEK_EXPERT_GROUPS[kind], weights="fp8")
    server = Server(_shape(row), chip_named("h800"), layout, efficiency)
    nodes = layout.chips / NODE_CHIPS
    if kind == "decode":
        context = _number(row, "seq")
        rows = rows_at_speed(server, context, DEEPSEEK_USER_TOKENS_PER_SECOND)
        return rows * DEEPSEEK_USER_TOKENS_PER_SECOND / nodes
    prompt = DEEPSEEK_PROMPT_TOKENS
    seconds = prefill_step(server, layout.chips, prompt).seconds
    return layout.chips * prompt / seconds / (1 - DEEPSEEK_CACHED_FRACTION) / nodes


PREDICTORS = {
    "pope-maxctx": ("max_context", _pope_context),
    "pope-": ("latency", _pope_latency),
    "kipply-": ("latency", _kipply),
    "deepseek-v3-serving": ("tokens_per_s_per_node", _deepseek),
}
_SHAPES = {"kipply": "gpt_13b", "pope-palm62B": "palm_62b", "pope": "palm_540b", "deepseek": "deepseek_v3"}


def _shape(row: dict[str, Any]) -> Shape:
    return shape_named(next(shape for prefix, shape in _SHAPES.items() if row["name"].startswith(prefix)))


def _number(row: dict[str, Any], column: str) -> int:
    """A positive whole number of the row; the CSV writes some of them as 540350000000.0."""
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = float("nan")
    whole = value > 0 and value == int(value)
    require(whole, column, row[column], f"must be a positive whole number in {row['name']}")
    return int(value)
