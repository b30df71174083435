"""The figures that need the choices of tokens: `Experts` in, charts and tables of tokens out."""

from __future__ import annotations

import html
import math

import numpy as np

from gpt4moe.analysis import routing
from gpt4moe.analysis.canvas import (
    Scale,
    depth_colours,
    heat_maps,
    legend,
    lines,
    log_ratio,
    of_layers,
    relative_scale,
    shown_layers,
)
from gpt4moe.analysis.experts import Experts
from gpt4moe.analysis.report import Choices
from gpt4moe.analysis.specialization import MIN_OCCURRENCES, assignments, over_uniform, top_tokens
from gpt4moe.drawing.figure import Chart

TOP_TOKENS = 8
TOGETHER = Scale(
    "viridis", 0, 1, (0, 0.25, 0.5, 0.75, 1), ("0", "25 %", "50 %", "75 %", "100 %"), "of the row's tokens"
)


def choices(experts: Experts, *, has_page: bool) -> Choices:
    """What the report shows of them; `has_page`: there is a page of coloured text beside it."""
    return Choices(tuple(choice_figures(experts)), vocabulary(experts), has_page)


def choice_figures(experts: Experts) -> list[Chart]:
    """Saturation, co-activation and specialisation; none where no text is held out."""
    if experts.held_out is None:
        return []
    charts = [_saturation(experts), _coactivation(experts)]
    charts += [_specialization(experts, name, groups) for name, groups in experts.groups().items()]
    return [chart for chart in charts if chart is not None]


def vocabulary(experts: Experts) -> str:
    """HTML: by layer and expert, the tokens of which the largest share goes there."""
    if (seen := experts.held_out) is None:
        return ""
    layers = top_tokens(seen.expert_ids_LUK, seen.token_ids_U, seen.num_experts, TOP_TOKENS)
    names = {index: name for name, index in experts.tokenizer.specials.items()}

    def cell(top) -> str:
        text = names.get(top.token_id) or experts.tokenizer.decode([top.token_id])
        shown = html.escape(text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣"))
        return f'<span class="token"><code>{shown}</code> {top.share:.0%}</span>'

    tables = []
    for layer in shown_layers(len(layers)):
        rows = [f"<tr><td>{e}</td><td>{' '.join(map(cell, tops))}</td></tr>" for e, tops in enumerate(layers[layer])]
        head = "<thead><tr><th>expert</th><th>tokens</th></tr></thead>"
        table = f'<div class="scroll"><table class="vocabulary">{head}<tbody>{"".join(rows)}</tbody></table></div>'
        tables.append(f"<details><summary>layer {layer}</summary>{table}</details>")
    uniform = seen.choices_per_token / seen.num_experts
    note = (
        f"The tokens of which the largest share goes to an expert, among those that occur {MIN_OCCURRENCES} times or "
        f"more in the captured text; {uniform:.0%} is uniform.{of_layers(len(layers))}"
    )
    return f"<h2>Tokens of each expert</h2><p>{note}</p>{''.join(tables)}"


def _saturation(experts: Experts) -> Chart:
    step, seen = experts.step, experts.held_out
    if not experts.saturation:
        kept = "Only this checkpoint is kept; TrainConfig.keep_last says how many are."
        return Chart(
            "Router saturation", f"Choices of earlier checkpoints that are those of step {step:,d}. {kept}", ""
        )
    tokens = np.array(sorted(experts.saturation))
    shares_NL = np.stack([experts.saturation[token][1] for token in tokens])
    layers, chance = shown_layers(shares_NL.shape[1]), seen.choices_per_token / seen.num_experts

    def draw(axes) -> None:
        for layer, colour in zip(layers, depth_colours(len(layers)), strict=True):
            axes.plot(tokens, shares_NL[:, layer], "o-", color=colour, label=f"layer {layer}")
        axes.axhline(chance, color="#808080", linestyle=":", linewidth=1.2)
        axes.set_ylim(0, 1)
        axes.set_ylabel("share of choices")
        legend(axes, columns=min(len(layers), 4))

    caption = (
        f"Share of the experts chosen at step {step:,d} that earlier checkpoints chose for the same held-out tokens: 1 "
        f"is settled. Dotted: agreement by chance, K/E.{of_layers(shares_NL.shape[1])}"
    )
    return Chart("Router saturation", caption, lines(draw, "saturation"))


def _coactivation(experts: Experts) -> Chart | None:
    seen = experts.held_out
    share_LEE = routing.coactivation(seen.expert_ids_LUK, seen.num_experts)
    if not np.nan_to_num(share_LEE).any():  # one expert a token
        return None
    most = math.ceil(np.nanmax(share_LEE) * 20) / 20
    ticks = (0, most / 2, most)
    scale = Scale("viridis", 0, most, ticks, tuple(f"{tick:.3g}" for tick in ticks), "share of the row's tokens")
    drawn = heat_maps("coactivation", share_LEE, scale, labels=("also go to expert", "tokens of expert"), height=2.3)
    caption = (
        "Share of the tokens of the row's expert that also go to the column's. Experts that pair up by chance have "
        f"{(seen.choices_per_token - 1) / (seen.num_experts - 1):.0%}.{of_layers(len(share_LEE))}"
    )
    return Chart("Co-activation", caption, drawn, wide=True)


def _specialization(experts: Experts, name: str, groups) -> Chart:
    seen = experts.held_out
    ratios_LGE = over_uniform(assignments(seen.expert_ids_LUK, groups, seen.num_experts))
    drawn = heat_maps(
        f"specialization {name}",
        log_ratio(ratios_LGE),
        relative_scale("share / uniform"),
        labels=("expert", name),
        height=max(0.55 + 0.19 * len(groups.names), 1.3),
        row_names=[n if len(n) < 20 else n[:19] + "…" for n in groups.names],
    )
    tokens = ", ".join(f"{n} ({count:,d})" for n, count in zip(groups.names, np.bincount(groups.groups_U), strict=True))
    caption = (
        "Share of a group's assignments at each expert over the uniform share. Where rows look alike, the group does "
        "not matter. "
        f"Tokens: {tokens}.{of_layers(len(ratios_LGE))}"
    )
    return Chart(f"Specialisation by {name}", caption, drawn, wide=True)
