"""What `gpt4moe plan speculate` answers: the gain of speculative decoding at each batch, and the best draft length."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from gpt4moe.config.check import CallerError, require_count
from gpt4moe.plan.serving.layout import Efficiency, ServeLayout
from gpt4moe.plan.serving.rooflines import Server, critical_rows
from gpt4moe.plan.serving.speculation import (
    Draft,
    best_draft,
    expected_tokens,
    roofline_verification,
    speed_up,
    weight_bound_verification,
)
from gpt4moe.plan.words.chosen import chip_from, shape_from
from gpt4moe.plan.words.command import Build


def answer(args: argparse.Namespace, build: Build) -> tuple[dict, Callable[[dict], str]]:
    """Returns the JSON document, gains as ratios of tokens a second, and what makes text of it."""
    shape, chip = shape_from(args, build), chip_from(args)
    draft = Draft(args.draft_tokens, args.acceptance, args.draft_cost)
    layout = ServeLayout(args.tensor or 1, args.stage or 1, args.expert or 1, args.weights)
    efficiency = Efficiency(args.matmul_efficiency, args.memory_efficiency, args.link_efficiency)
    server = Server(shape, chip, layout, efficiency)
    document = {
        "shape": shape.name,
        "chip": chip.name,
        "chips": layout.chips,
        "context": args.context,
        "draft_tokens": draft.tokens,
        "acceptance": draft.acceptance,
        "draft_cost": draft.cost,
        "tokens_a_verification": expected_tokens(draft),
        "dense_gain": speed_up(draft),
        "critical_tokens": critical_rows(chip, layout.weights, shape),
        "rows": [_row(server, args.context, draft, rows) for rows in _batches(args.batch)],
    }
    return document, _to_text


def _row(server: Server, context: int, draft: Draft, rows: int) -> dict:
    """One batch: the gain if only reading weights took time, with the whole roofline, and at the best draft length."""
    by_weights = weight_bound_verification(server.shape, rows, draft.tokens)
    by_roofline = roofline_verification(server, rows, context, draft.tokens)
    best, gain = best_draft(draft, lambda tokens: roofline_verification(server, rows, context, tokens))
    return {
        "batch": rows,
        "weight_bound_gain": speed_up(draft, by_weights),
        "roofline_gain": speed_up(draft, by_roofline),
        "verification": by_roofline,
        "best_draft_tokens": best.tokens,
        "best_gain": gain,
    }


def _batches(text: str) -> list[int]:
    try:
        batches = [int(item) for item in text.split(",")]
    except ValueError:
        raise CallerError(f"batch={text!r} must be whole numbers with commas between, such as 1,8,64") from None
    for rows in batches:
        require_count("batch", rows)
    return batches


def _to_text(document: dict) -> str:
    chips = f"{document['chips']} x {document['chip']}"
    lines = [
        f"{document['shape']} on {chips}, context {document['context']:,}: drafts of {document['draft_tokens']}, each "
        f"token accepted with chance {document['acceptance']:g}, a draft step {document['draft_cost']:g} of a step",
        f"{document['tokens_a_verification']:.2f} tokens a verification; a dense model that waits for weights gains "
        f"{document['dense_gain']:.2f}x; computing takes over from {document['critical_tokens']:,.0f} tokens a step",
        "",
        f"{'batch':>7}{'weights only':>14}{'whole roofline':>16}{'verification':>14}{'best draft':>12}{'gain':>8}",
    ]
    lines += [
        f"{row['batch']:>7,}{row['weight_bound_gain']:>13.2f}x{row['roofline_gain']:>15.2f}x{row['verification']:>14.2f}"
        f"{row['best_draft_tokens']:>12}{row['best_gain']:>7.2f}x"
        for row in document["rows"]
    ]
    return "\n".join(lines)
