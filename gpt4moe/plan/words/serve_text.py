"""The document of `gpt4moe plan serve` as text to read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gpt4moe.accounting.summary import scaled

MOST_ROWS = 24
HEAD = (
    "tok/s/user", "$/1k", "chips", "tensor", "stage", "expert", "cache", "weights", "rows", "seqs", "most", "tok/s",
    "MFU", "HBM", "stage ms: weights/cache/FLOPs/links", "first token",
)  # fmt: skip


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
        *_table([HEAD, *(_cells(row) for row in rows)]),
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


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells, each column as wide as its widest, two spaces between."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _cells(row: dict) -> tuple[str, ...]:
    stage = row["stage_seconds"]
    links = stage["exchange_seconds"] + stage["hop_seconds"]
    parts = (stage["weights_seconds"], stage["cache_seconds"], stage["flops_seconds"], links)
    digits = ".1f" if stage["seconds"] >= 1e-3 else ".2g"  # of milliseconds
    return (
        f"{row['user_tokens_per_second']:.2f}",
        dollars(row["dollars_per_1k_tokens"]),
        *(f"{row[name]}" for name in ("chips", "tensor", "stage", "expert", "cache", "weights")),
        *(f"{row[name]:,.0f}" for name in ("rows", "sequences", "max_sequences", "tokens_per_second")),
        f"{row['model_flops_utilization']:.1%}",
        f"{row['bandwidth_utilization']:.0%}",
        f"{1e3 * stage['seconds']:{digits}} ({'/'.join(f'{1e3 * part:{digits}}' for part in parts)})",
        f"{row['first_token_seconds']:.2f} s",
    )


def dollars(amount: float) -> str:
    """Returns a price with five places behind the point, or where that leaves fewer than two digits, with three."""
    return f"{amount:.5f}" if amount >= 1e-4 or not amount else f"{amount:.2e}"


def _cheapest(item: dict) -> str:
    speed, row = item["min_speed"], item["service"]
    if row is None:
        return f"no layout gives every user {speed:.2f} tokens a second"
    axes = " x ".join(f"{axis} {row[axis]}" for axis in ("tensor", "stage", "expert"))
    price, blended = dollars(row["dollars_per_1k_tokens"]), dollars(row["blended_dollars_per_1k_tokens"])
    return (
        f"cheapest at {speed:.2f} tok/s a user: ${price} per 1k tokens (${blended} with prompts) on "
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
        f"  dollars per 1k    {dollars(found['dollars_per_1k_tokens'])} over {found['elapsed_hours']:.2f} h"
        f"{day if found['lent_fraction'] else ''}",
    ]


def _percentiles(found: dict) -> str:
    return ", ".join(f"p{share} {seconds:.3f} s" for share, seconds in found.items()) or "none"
