"""What a search found as figures and as one self-contained HTML page: `Found` and its document in, a file out."""

from __future__ import annotations

import html
from collections.abc import Sequence

from gpt4moe.drawing.figure import PALETTE
from gpt4moe.drawing.page import charts, page
from gpt4moe.plan.search.ranking import Costed, Found
from gpt4moe.plan.training.step_time import KINDS
from gpt4moe.plan.words import pictures
from gpt4moe.plan.words.pictures import BAD, GOOD, LESS, Picture

MOST_POINTS = 400  # of layouts that fit, and of those that do not
MOST_MEMORY = 3  # times a chip's, of layouts that are shown
MOST_FAMILIES = 12
# What of a step the bars tell apart, and the parts of `step_time` in each.
CAUSES = {
    "products": ("matmul", "expert_matmul", "attention_core", "head"),
    "computed again": ("recompute",),
    "memory": KINDS["memory"],
    "tensor and context": ("tensor_communication", "context_communication"),
    "experts' exchange": ("expert_communication",),
    "replicas and stages": ("data_communication", "stage_communication"),
    "bubble": KINDS["idle"],
}
STYLE = "td:last-child, th:last-child { text-align: left; white-space: normal; min-width: 260px }\n"
COLUMNS = ("family", "tensor", "context", "stages", "experts", "replicas", "ZeRO", "microbatches", "remat")
NUMBERS = ("s a step", "MFU", "GB", "why not first")


def write_report(found: Found, document: dict, path: str) -> None:
    """Writes figures and tables of a search; raises `CallerError` where the file cannot be."""
    file = pictures.writable(path, ".html")
    said = (
        f"<p>{document['examined']:,} layouts of {html.escape(document['shape'])}, {document['fitting']:,} fit "
        f"{document['memory_gb']:g} GB; batches of {document['batch_tokens']:,} tokens, "
        f"stack {html.escape(document['stack'])}. Made by <code>gpt4moe plan search --report</code>.</p>"
    )
    drawn = charts([pictures.to_chart(picture) for picture in figures(found)])
    tables = [_table("Best", document["best"]), _table("Best of each family", document["families"])]
    tables += [_table("Asked", [document["asked"]])] if document["asked"] else []
    title = f"{document['shape']} on {document['num_chips']:,} x {document['chip']}"
    file.write_text(page(title, [said, drawn, *tables], style=STYLE), encoding="utf-8")


def figures(found: Found) -> list[Picture]:
    """Returns bytes against time of the candidates, the best by tensor and stages, and where the families lose."""
    drawn = [_candidates(found)]
    return [*drawn, _grid(found), _families(found)] if found.ranked else drawn


def _candidates(found: Found) -> Picture:
    """A dot for each layout: seconds a million tokens against the fullest chip's bytes."""
    limit = found.job.chip.memory_bytes / 1e9
    near = [item for item in found.missed if item.memory.total_bytes < MOST_MEMORY * 1e9 * limit]
    near = near or (found.missed if not found.ranked else [])  # where nothing comes near, all of them
    groups = ((_thinned(found.ranked), "fits", LESS), (_thinned(near), "does not", BAD))

    def draw(axes) -> None:
        for items, label, color in groups:
            axes.scatter(*_places(items), s=7, color=color, alpha=0.5, linewidths=0, label=label)
        for item in found.ranked[:1]:
            axes.scatter(*_places([item]), s=60, marker="*", color=GOOD, label="best")
        axes.axvline(limit, color="grey", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="GB on the fullest chip")
        axes.set_ylabel("seconds for a million tokens")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
            axis.set_tick_params(which="minor", labelsize=7)
        axes.legend(frameon=False, fontsize=8)

    caption = (
        f"Each dot is a layout, {len(groups[0][0]):,} of {len(found.ranked):,} that fit and "
        f"{len(groups[1][0]):,} of {len(near):,} near them that do not; the line is a chip's {limit:g} GB."
    )
    return Picture("Time against memory", caption, draw)


def _places(items: Sequence[Costed]) -> tuple[list[float], list[float]]:
    return [item.memory.total_bytes / 1e9 for item in items], [1e6 * item.seconds_per_token for item in items]


def _thinned(items: Sequence[Costed]) -> Sequence[Costed]:
    """At most `MOST_POINTS` of them, evenly in their rank."""
    return items[:: -(-len(items) // MOST_POINTS)] if items else items


def best_by_degrees(found: Found) -> dict[tuple[int, int], Costed]:
    """Returns the best layout that fits for every pair of tensor degree and stages."""
    best: dict[tuple[int, int], Costed] = {}
    for item in found.ranked:
        best.setdefault((item.layout.tensor, item.layout.stage), item)
    return best


def _grid(found: Found) -> Picture:
    """A field for each tensor degree and number of stages: the utilisation of the best layout there."""
    best = best_by_degrees(found)
    tensors, stages = (sorted({key[place] for key in best}) for place in (0, 1))
    shares = [item.model_flops_utilization for item in best.values()]
    least, most = min(shares), max(shares)

    def draw(axes) -> None:
        for (tensor, stage), item in best.items():
            place, share = (stages.index(stage), tensors.index(tensor)), item.model_flops_utilization
            axes.add_patch(_field(place, (share - least) / (most - least or 1)))
            axes.text(*place, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(stages)), stages, rotation=60 if len(stages) > 12 else 0, fontsize=8)
        axes.set_yticks(range(len(tensors)), tensors)
        axes.set(xlim=(-0.5, len(stages) - 0.5), ylim=(-0.5, len(tensors) - 0.5), xlabel="stages", ylabel="tensor")
        axes.grid(visible=False)

    return Picture("Best by tensor and stages", "Percent of the peak that the best layout there reaches.", draw)


def _field(place: tuple[int, int], share: float):
    from matplotlib.patches import Rectangle

    return Rectangle((place[0] - 0.48, place[1] - 0.48), 0.96, 0.96, color=GOOD, alpha=0.1 + 0.7 * share, linewidth=0)


def _families(found: Found) -> Picture:
    """A bar for the best of each family that fits: its time for as many tokens, cause by cause, over the best's."""
    shown = [item for item in found.families.values() if item.memory.fits][:MOST_FAMILIES]
    best = found.ranked[0].seconds_per_token

    def draw(axes) -> None:
        left = [0.0] * len(shown)
        for (cause, parts), color in zip(CAUSES.items(), PALETTE, strict=False):
            widths = [sum(item.step.parts[part] for part in parts) / item.batch_tokens / best for item in shown]
            axes.barh(range(len(shown)), widths, left=left, color=color, label=cause)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(shown)), [item.family for item in shown], fontsize=7)
        axes.invert_yaxis()
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set(xlabel="time over the best's", xlim=(0, min(max(left), 4.0)))
        axes.legend(frameon=False, fontsize=6, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0))

    caption = "The best of each family that fits, cut off at four times the best; why the others lose is in the table."
    return Picture("Where the others lose", caption, draw)


def _table(title: str, rows: Sequence[dict]) -> str:
    head = "".join(f"<th>{name}</th>" for name in (*COLUMNS, *NUMBERS))
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<h2>{title}</h2>{table}"


def _cells(row: dict) -> str:
    layout, why = row["layout"], html.escape(row["why"])
    if layout is None:
        return f"<td>{row['family']}</td>{'<td></td>' * (len(COLUMNS) + len(NUMBERS) - 2)}<td>{why}</td>"
    values = (
        row["family"],
        layout["tensor"],
        layout["context"],
        f"{layout['stage']} x {layout['virtual_stages']}",
        f"{layout['expert']} x {layout['expert_tensor']}",
        layout["data"],
        layout["zero"],
        f"{layout['microbatch_rows']} x {row['microbatches']}",
        row["trainer_remat"] or layout["remat"],
        f"{row['step_seconds']:.3g}",
        f"{row['model_flops_utilization']:.1%}",
        f"{row['memory_bytes'] / 1e9:.1f}",
        why,
    )
    return "".join(f"<td>{value}</td>" for value in values)
