"""The figures of a run's report that need no more than its log: a `History` in, charts out."""

from __future__ import annotations

import math

import numpy as np

from gpt4moe.analysis.canvas import (
    colours,
    depth_colours,
    heat_maps,
    legend,
    lines,
    log_ratio,
    of_layers,
    relative_scale,
    shown_layers,
    thin,
    trace,
)
from gpt4moe.analysis.history import History
from gpt4moe.analysis.routing import DEAD_BELOW, dead_experts
from gpt4moe.drawing.figure import PALETTE, Chart

MAX_COLUMNS = 200


def run_figures(history: History, evaluation: dict | None) -> list[Chart]:
    """All figures for which the run has logged something; `evaluation` is what `evaluation.json` holds."""
    figures = [_loss(history, evaluation or {}), _throughput(history), _utilization(history), _learning_rate(history)]
    figures += [_grad_norm(history), _gate(history, "attention", "Gates of cross-attention")]
    figures += [_gate(history, "feed_forward", "Gates of its feed-forward")]
    return [figure for figure in figures if figure is not None]


def expert_figures(history: History) -> list[Chart]:
    """What the log says of routers and experts."""
    figures = [_load_maps(history), _grad_maps(history), _balance(history), _auxiliary(history), _load_entropy(history)]
    figures += [_router_entropy(history), _router_logits(history), _drops(history), _dead(history)]
    return [figure for figure in figures if figure is not None]


def _loss(history: History, evaluation: dict) -> Chart | None:
    sources = history.names(r"loss/(.+)")
    if not sources:
        return None

    def draw(axes) -> None:
        for source, colour in zip(sources, colours(), strict=False):
            series = thin(history.series(f"loss/{source}"))
            trace(axes, series.tokens, series.values, colour, f"{source}, training")
            held_out = history.series(f"eval/{source}/loss")
            if len(held_out.tokens):
                axes.plot(held_out.tokens, held_out.values, "o", color=colour, label=f"{source}, held out")
            unigram = evaluation.get("sets", {}).get(source, {}).get("unigram_loss")
            if unigram is not None:
                axes.axhline(unigram, color=colour, linestyle=":", linewidth=1.2, label=f"{source}, unigram")
        axes.set_ylabel("nats per token")
        legend(axes, columns=len(sources) if 1 < len(sources) < 5 else 3)

    caption = "Cross-entropy of each source. Points: held-out text. Dotted: what token frequencies alone reach."
    return Chart("Loss", caption, lines(draw, "loss", (9.0, 3.6)), wide=True)


def _load_maps(history: History) -> Chart | None:
    caption = "Assignments to each expert over the layer's mean. Grey is balanced, red overloaded, blue idle."
    return _maps_over_time(history, "moe/load", "Expert load", caption, "load / mean load")


def _grad_maps(history: History) -> Chart | None:
    caption = "Norm of each expert's gradient over the layer's mean. Blue learns less than its neighbours, red more."
    return _maps_over_time(history, "moe/expert_grad_norm", "Gradient norm per expert", caption, "norm / mean norm")


def _maps_over_time(history: History, key: str, title: str, caption: str, label: str) -> Chart | None:
    """Heat maps [expert x tokens] of a metric [L][E] over its mean of the layer."""
    series = thin(history.series(key), MAX_COLUMNS)
    if series.values.ndim != 3:
        return None
    mean_NL1 = series.values.mean(-1, keepdims=True)
    ratios_NLE = np.divide(series.values, mean_NL1, out=np.full_like(series.values, np.nan), where=mean_NL1 > 0)
    drawn = heat_maps(
        key,
        log_ratio(ratios_NLE).transpose(1, 2, 0),
        relative_scale(label),
        labels=("million tokens", "expert"),
        height=1.5,
        across=(0, series.tokens[-1] / 1e6),
    )
    return Chart(title, caption + of_layers(ratios_NLE.shape[1]), drawn, wide=True)


def _balance(history: History) -> Chart | None:
    load = thin(history.series("moe/load"))
    if load.values.ndim != 3:
        return None
    relative = load.values * load.values.shape[-1]

    def draw(axes) -> None:
        trace(axes, load.tokens, relative.max((1, 2)), PALETTE[4], "busiest expert of any layer")
        trace(axes, load.tokens, relative.max(2).mean(1), PALETTE[1], "busiest, mean of layers")
        trace(axes, load.tokens, relative.min(2).mean(1), PALETTE[5], "idlest, mean of layers")
        trace(axes, load.tokens, relative.min((1, 2)), PALETTE[0], "idlest expert of any layer")
        axes.set_ylabel("load / mean load")
        axes.set_ylim(bottom=0)
        legend(axes, columns=2)

    return Chart("Load balance", "1 is a perfectly even spread over the experts.", lines(draw, "balance"))


def _auxiliary(history: History) -> Chart | None:
    labels = {"load_balance_loss": "balance loss (1 is uniform)", "router_z_loss": "router z-loss"}
    caption = "Means over layers, without the weights they enter the loss with."
    return _means(history, labels, "Auxiliary losses", caption)


def _load_entropy(history: History) -> Chart | None:
    caption = "Entropy of a layer's load over ln E: 1 is an even spread, 0 is one expert for everything."
    return _by_layer(history, "moe/load_entropy", "Load entropy", caption, "entropy / ln E")


def _router_entropy(history: History) -> Chart | None:
    num_experts = np.shape(history.last("moe/load"))[-1:]
    even = math.log(num_experts[0]) if num_experts else None
    caption = "How undecided the router is about a token, mean over tokens. Dotted: ln E, all experts alike."
    return _by_layer(history, "moe/router_entropy", "Router entropy", caption, "nats", mark=even)


def _router_logits(history: History) -> Chart | None:
    caption = "Largest router logit of a token, mean over tokens. Growth without end precedes instability (ST-MoE)."
    return _by_layer(history, "moe/router_largest_logit", "Router logits", caption, "largest logit", from_zero=False)


def _drops(history: History) -> Chart | None:
    caption = "Share of assignments that found no place at their expert; 0 without a capacity."
    return _by_layer(history, "moe/dropped_fraction", "Dropped assignments", caption, "fraction")


def _dead(history: History) -> Chart | None:
    load = thin(history.series("moe/load"), MAX_COLUMNS)
    if load.values.ndim != 3:
        return None
    caption = f"Experts of each layer with less than {DEAD_BELOW:.0%} of its mean load."
    drawn = _lines_by_layer(load.tokens, dead_experts(load.values).sum(-1), "dead", "experts", whole=True)
    return Chart("Dead experts", caption + of_layers(load.values.shape[1]), drawn)


def _by_layer(history: History, key: str, title: str, caption: str, unit: str, **style) -> Chart | None:
    """One line a layer of a metric [L]; a single one where it was logged as one number."""
    series = thin(history.series(key))
    if not len(series.tokens):
        return None
    values_NL = series.values.reshape(len(series.tokens), -1)
    return Chart(
        title, caption + of_layers(values_NL.shape[1]), _lines_by_layer(series.tokens, values_NL, key, unit, **style)
    )


def _lines_by_layer(
    tokens: np.ndarray,
    values_NL: np.ndarray,
    name: str,
    unit: str,
    *,
    mark: float | None = None,
    from_zero: bool = True,
    whole: bool = False,
    of: str = "layer",
) -> str:
    """SVG of one line a layer (or what `of` says); `mark`: a dotted line at this height; `whole`: of counts."""
    layers = shown_layers(values_NL.shape[1])

    def draw(axes) -> None:
        for layer, colour in zip(layers, depth_colours(len(layers)), strict=True):
            trace(axes, tokens, values_NL[:, layer], colour, f"{of} {layer}")
        if mark is not None:
            axes.axhline(mark, color="#808080", linestyle=":", linewidth=1.2)
        if from_zero:
            axes.set_ylim(bottom=0)
        if whole:
            axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(unit)
        legend(axes, columns=min(len(layers), 4))

    return lines(draw, name)


def _throughput(history: History) -> Chart | None:
    return _means(history, {"tokens_per_second": "tokens/s"}, "Throughput", "Training tokens per second of wall clock.")


def _utilization(history: History) -> Chart | None:
    labels = {"model_flops_utilization": "model FLOPs utilisation", "goodput": "goodput"}
    caption = "Matrix-product FLOPs of the model over the peak; goodput is the share of time spent in steps."
    return _means(history, labels, "Utilisation", caption)


def _learning_rate(history: History) -> Chart | None:
    return _means(history, {"learning_rate": "learning rate"}, "Learning rate", "What the schedule gave each step.")


def _grad_norm(history: History) -> Chart | None:
    return _means(history, {"grad_norm": "gradient norm"}, "Gradient norm", "Global norm before clipping.")


def _gate(history: History, part: str, title: str) -> Chart | None:
    caption = (
        "Tanh of the gate: what each block adds to the text model is multiplied by it. Of a vector, its mean size."
    )
    given = {"of": "block", "from_zero": False, "mark": 0.0}
    return _by_layer(history, f"vision/{part}_gate", title, caption, "tanh of the gate", **given)


def _means(history: History, labels: dict[str, str], title: str, caption: str) -> Chart | None:
    """One figure of the metrics in `labels` that were logged, averaged over everything but time."""
    logged = {label: thin(history.series(key)) for key, label in labels.items()}
    logged = {label: series for label, series in logged.items() if len(series.tokens)}
    if not logged:
        return None

    def draw(axes) -> None:
        for (label, series), colour in zip(logged.items(), colours(), strict=False):
            trace(axes, series.tokens, series.values.reshape(len(series.tokens), -1).mean(1), colour, label)
        axes.set_ylim(bottom=0)
        if len(logged) > 1:
            legend(axes, columns=2)
        else:
            axes.set_ylabel(next(iter(logged)))

    return Chart(title, caption, lines(draw, title))
