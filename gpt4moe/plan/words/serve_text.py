"""The document of `gpt4moe plan serve` as text to read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gpt4moe.accounting.summary import scaled

MOST_ROWS = 24
HEAD = (
    f"{'tok/s/user':>10}{'$/1k':>10}{'chips':>7}{'tensor':>8}{'stage':>7}{'expert':>8}{'cache':>7}{'weights':>10}"
    f"{'rows':>7}{'seqs':>8}{'most':>9}{'tok/s':>10}{'MFU':>7}{'HBM':>6}{'stage ms: weights/cache/FLOPs/links':>37}"
    f"{'first token':>13}"
)


def to_text(document: dict) -> str:
    """Returns the frontier as a table, the cheapest layouts at a reader's speed, the simulation where there is one."""
    total, active = (scaled(document[f"{kind}_parameters"]).strip() for kind in ("total", "active"))
    tokens = ", ".join(f"{number:,.0f} in {name}" for name, number in document["critical_tokens"].items())
    rows = _thinned(document["frontier"])
    lines = [
        f"{document['shape']}: {total} parameters, {active} a token; up to {document['num_chips']} x "
        f"{document['chip']} at ${document['dollars_per_chip_hour']:.2f} an hour; context {document['context']:,}",
        f"usable memory {scaled(document['usable_bytes'])}B; weights take longer to read than to use below {tokens} "
        "tokens a step",
        f"{document['considered']:,} layouts and batches fit, {document['too_large']:,} layouts do not"
        f"{_short(document)}; no other beats these {len(document['frontier'])}"
        f"{f' ({len(rows)} shown)' if len(rows) < len(document['frontier']) else ''}:",
        "",
        HEAD,
        *(_line(row) for row in rows),
        "",
        *(_cheapest(item) for item in document["cheapest"]),
        *_uneven(document),
    ]
    if "simulation" in document:
        lines += ["", *_simulation(document["simulation"])]
    return "\n".join([*lines, *([f"plot: {document['plot']}"] if "plot" in document else [])])


def _short(document: dict) -> str:
    short = document["nearest_short_bytes"]
    return f" (the nearest by {short / 1e9:,.1f} GB a chip)" if short else ""


def _thinned(rows: Sequence[dict]) -> list[dict]:
    """At most `MOST_ROWS` of them, evenly, the first and the last among them."""
    if len(rows) <= MOST_ROWS:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (MOST_ROWS - 1))] for index in range(MOST_ROWS)]


def _line(row: dict) -> str:
    stage = row["stage_seconds"]
    links = stage["exchange_seconds"] + stage["hop_seconds"]
    parts = (stage["weights_seconds"], stage["cache_seconds"], stage["flops_seconds"], links)
    times = f"{1e3 * stage['seconds']:.1f} ({'/'.join(f'{1e3 * part:.1f}' for part in parts)})"
    return (
        f"{row['user_tokens_per_second']:>10.2f}{row['dollars_per_1k_tokens']:>10.5f}{row['chips']:>7}"
        f"{row['tensor']:>8}{row['stage']:>7}{row['expert']:>8}{row['cache']:>7}{row['weights']:>10}{row['rows']:>7,}"
        f"{row['sequences']:>8,}{row['max_sequences']:>9,.0f}{row['tokens_per_second']:>10,.0f}"
        f"{row['model_flops_utilization']:>7.1%}{row['bandwidth_utilization']:>6.0%}{times:>37}"
        f"{row['first_token_seconds']:>11.2f} s"
    )


def _cheapest(item: dict) -> str:
    speed, row = item["min_speed"], item["service"]
    if row is None:
        return f"no layout gives every user {speed:.2f} tokens a second"
    axes = " x ".join(f"{axis} {row[axis]}" for axis in ("tensor", "stage", "expert"))
    dollars, blended = row["dollars_per_1k_tokens"], row["blended_dollars_per_1k_tokens"]
    return (
        f"cheapest at {speed:.2f} tok/s a user: ${dollars:.5f} per 1k tokens (${blended:.5f} with prompts) on "
        f"{row['chips']} chips, {axes}, {row['weights']}, {row['rows']:,} rows; "
        f"{row['prefill_chips_per_decode_chip']:.2f} chips for prompts to one that decodes; continuous batching gains "
        f"{row['continuous_batching_gain']:.1f}x over static, the fullest expert has {row['fullest_expert_rows']:,.0f}"
    )


def _uneven(document: dict) -> list[str]:
    """That stages were taken as equal where layers do not divide: the fullest one is slower than this says."""
    layers, stages = document["num_layers"], {row["stage"] for row in document["frontier"]}
    uneven = [stage for stage in sorted(stages) if layers % stage]
    slower = (math.ceil(layers / stage) * stage / layers - 1 for stage in uneven)
    return [
        f"{layers} layers do not divide by {stage} stages, which are taken as equal: the fullest has {by:.1%} more"
        for stage, by in zip(uneven, slower, strict=True)
    ]


def _simulation(found: dict) -> list[str]:
    first, gap = found["first_token_seconds"], found["token_gap_seconds"]
    day = f", {found['lent_chip_hours']:,.1f} chip-hours ({found['lent_fraction']:.1%}) lent to training"
    refused = f", {found['refused']:,} refused: longer than the whole cache" if found["refused"] else ""
    return [
        f"simulated: {found['completed']:,} requests at {found['requests_per_second']:.2f} a second on "
        f"{found['replicas']} x {found['replica_chips']} chips, {found['batching']} batching, "
        f"{found['rows']} rows a microbatch{refused}",
        f"  tokens a second   {found['tokens_per_second']:,.0f}; stages busy {found['utilization']:.1%}; "
        f"full load is {found['full_load_tokens_per_second']:,.0f} of such requests, "
        f"{found['roofline_tokens_per_second']:,.0f} at --context",
        f"  first token       {_percentiles(first)}, of which waiting {found['mean_wait_seconds']:.3f} s on average",
        f"  between tokens    {_percentiles(gap)}",
        f"  dollars per 1k    {found['dollars_per_1k_tokens']:.5f} over {found['elapsed_hours']:.2f} h"
        f"{day if found['lent_fraction'] else ''}",
    ]


def _percentiles(found: dict) -> str:
    return ", ".join(f"p{share} {seconds:.3f} s" for share, seconds in found.items()) or "none"
