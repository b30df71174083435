"""Why a layout is not the first: what does not fit, or where its step loses time against the best one's.

In: `search.Costed`s. Out: words. Also what about a model's widths is slow under every layout.
"""

from __future__ import annotations

from collections.abc import Callable

from gpt4moe.accounting.chips import Chip
from gpt4moe.accounting.shape import Shape
from gpt4moe.plan.search.ranking import Costed
from gpt4moe.plan.training.communication import ALONE, Group, links
from gpt4moe.plan.training.layer_time import ACTIVATION_BYTES, Place, expert_rows
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.stacks import SMALL_DIMENSION, Stack

GIGABYTE = 1e9
LEAST_LOSS = 0.02  # of the best's time a token, to be named
MOST_REASONS = 3
# A product whose smallest dimension reaches less than this of its rate is small: 4 tiles' fill and drain.
SMALL_PRODUCT = 0.8
KERNEL_HEAD_MULTIPLE, TILE = 64, 128


def why(item: Costed, best: Costed | None) -> str:
    """Returns why `item` is not the best: the bytes it lacks, or its largest losses of time a token."""
    idle = f", {item.idle_chips:,} chips idle" if item.idle_chips else ""
    if not item.memory.fits:
        return _does_not_fit(item) + idle
    if best is None or item is best:
        return "best" + idle
    losses = _losses(item, best)
    named = [REASONS[part](item) for part, loss in losses[:MOST_REASONS] if loss >= LEAST_LOSS]
    return (", ".join(named) or "about as good") + idle


def losses_of_time(item: Costed, best: Costed) -> dict[str, float]:
    """Returns by cause the time a token that `item` takes beyond `best`, as a share of `best`'s."""
    per_token = {part: seconds / item.batch_tokens for part, seconds in item.step.parts.items()}
    others = {part: seconds / best.batch_tokens for part, seconds in best.step.parts.items()}
    return {part: (per_token[part] - others[part]) / best.seconds_per_token for part in per_token}


def expert_bound(shape: Shape, layout: Layout, chip: Chip, stack: Stack) -> float:
    """Returns the time of the all-to-all over that of the experts' products, both at the rates of the data sheet.

    (C / W) a / (g F) with a the mean bytes of a value sent and brought back, g matrices of width F: above 1 no overlap
    hides it. 0 where no token leaves its chip.
    """
    if layout.expert == 1 or not shape.num_moe_layers:
        return 0.0
    group = Group(layout.expert, layout.expert_tensor, layout.chips // layout.stage)
    found, network = links(chip, group, stack), chip.network or ALONE
    if found.outer > 1:
        limit = stack.domain_limit / shape.experts_per_token if stack.domain_limit else 1.0
        share, rate = (1 - 1 / found.outer) * min(limit, 1.0), network.outside_bytes_per_second
        rate = stack.scale_out_bytes_per_second or rate
    else:
        share, rate = 1 - 1 / layout.expert, network.domain_bytes_per_second
    sent = (stack.matmul_bits / 8 + ACTIVATION_BYTES) * share / rate
    return sent * chip.peak_flops / (2 * shape.matrices * shape.expert_hidden_dim)


def slow_widths(shape: Shape, layout: Layout) -> list[str]:
    """Returns what is slow about a model's widths whatever the layout, and under this one."""
    found = []
    if not shape.latent and shape.head_dim % KERNEL_HEAD_MULTIPLE:
        constraint = f"is no multiple of {KERNEL_HEAD_MULTIPLE}: attention kernels and tiles are slow"
        found.append(f"head_dim={shape.head_dim} {constraint} (BLOOM: a third of the step at 108 against 216)")
    widths = {
        "model_dim": shape.model_dim,
        "vocab_size / tensor": shape.vocab_size / layout.tensor,
        "expert_hidden_dim / expert_tensor": shape.expert_hidden_dim / layout.expert_tensor,
        "hidden_dim / tensor": shape.hidden_dim / layout.tensor,
    }
    found += [
        f"{name}={width:g} is no multiple of {TILE}: tiles are cut" for name, width in widths.items() if width % TILE
    ]
    return found


def smallest_product(item: Costed) -> tuple[str, float]:
    """Returns the name and size of the smallest dimension among the large products of a chip."""
    job, layout = item.job, item.layout
    place = Place(job.shape, layout, job.chip, job.stack, job.sequence_length)
    sizes = {"tokens": place.tokens, "heads": job.shape.num_heads * job.shape.head_dim / layout.tensor}
    if job.shape.num_moe_layers:
        sizes |= {
            "rows of an expert": expert_rows(place),
            "an expert's hidden dim": job.shape.expert_hidden_dim / layout.expert_tensor,
        }
    if job.shape.num_dense_layers:
        sizes["hidden dim"] = job.shape.hidden_dim / layout.tensor
    name = min(sizes, key=sizes.get)
    return name, sizes[name]


def _does_not_fit(item: Costed) -> str:
    there = item.memory
    parts = sorted(there.parts.items(), key=lambda part: -part[1])
    large = ", ".join(f"{name} {size / GIGABYTE:.1f}" for name, size in parts[:3])
    stage = f" on stage {there.most_loaded_stage}" if item.layout.stage > 1 else ""
    return f"does not fit by {-there.spare_bytes / GIGABYTE:.1f} GB{stage}: {large}"


def _losses(item: Costed, best: Costed) -> list[tuple[str, float]]:
    return sorted(losses_of_time(item, best).items(), key=lambda loss: -loss[1])


def _share(item: Costed, part: str) -> str:
    return f"{100 * item.step.parts[part] / item.step.seconds:.0f} %"


def _named(words: str, part: str) -> Callable[[Costed], str]:
    return lambda item: f"{words} {_share(item, part)}"


def _products(words: str, part: str) -> Callable[[Costed], str]:
    """Products take longer where they are small; else the stages are uneven or experts' loads are."""

    def say(item: Costed) -> str:
        name, size = smallest_product(item)
        small = size / (size + SMALL_DIMENSION) < SMALL_PRODUCT
        return f"small products ({name} {size:.0f})" if small else f"{words} {_share(item, part)}"

    return say


def _expert(item: Costed) -> str:
    bound = expert_bound(item.job.shape, item.layout, item.job.chip, item.job.stack)
    return f"EP bound by {bound:.1f}x" if bound > 1 else f"expert communication {_share(item, 'expert_communication')}"


REASONS: dict[str, Callable[[Costed], str]] = {
    "matmul": _products("products", "matmul"),
    "expert_matmul": _products("experts' products", "expert_matmul"),
    "attention_core": _named("attention core", "attention_core"),
    "recompute": _named("computed again", "recompute"),
    "head": _named("head on the last stage", "head"),
    "elementwise": _named("elementwise", "elementwise"),
    "overhead": _named("launches", "overhead"),
    "optimizer": _named("optimizer", "optimizer"),
    "tensor_communication": _named("tensor communication", "tensor_communication"),
    "context_communication": _named("context communication", "context_communication"),
    "expert_communication": _expert,
    "stage_communication": _named("messages between stages", "stage_communication"),
    "data_communication": _named("gradients and weights between replicas", "data_communication"),
    "bubble": _named("bubble", "bubble"),
}
