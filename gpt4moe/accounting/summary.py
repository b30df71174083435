"""What `gpt4moe inspect` shows: parameters by component, active parameters, FLOPs and bytes of one configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from gpt4moe.accounting import flops, memory, parameters, vision
from gpt4moe.config.model import ModelConfig


def summarize(config: ModelConfig, num_trained: int | None = None, frames: int | None = None) -> dict:
    """Returns the JSON document of `inspect`: counts in parameters, FLOPs a token, bytes.

    num_trained: parameters that are not frozen, None for all. frames: of an image (a clip or a tiled page), None for as
    many as the encoder tells apart.
    """
    counted = parameters.count(config)
    length = config.context_length
    return {
        "parameters": dataclasses.asdict(counted),
        "total": counted.total,
        "active": parameters.count_active(config),
        "trained": counted.total if num_trained is None else num_trained,
        "one_expert": counted.experts // config.moe.num_experts,
        "forward_flops_per_token": flops.forward_flops_per_token(config),
        "train_flops_per_token": flops.train_flops_per_token(config),
        "attention_core_flops_per_token": flops.attention_core_flops_per_token(config, length),
        "context_length": length,
        "train_state_bytes": memory.train_state_bytes(config, num_trained),
        "weight_bytes": memory.weight_bytes(config),
        "cache_bytes_per_token": memory.cache_bytes_per_token(config),
    } | (_images(config, frames or config.vision.encoder.max_frames) if config.vision else {})


def _images(config: ModelConfig, frames: int) -> dict:
    """What one image of so many frames costs."""
    per_value = memory.DTYPE_BYTES[config.compute_dtype]
    return {
        "frames_per_image": frames,
        "features_per_image": config.vision.features_per_image(frames),
        "forward_flops_per_image": vision.flops_per_image(config, frames),
        "cache_bytes_per_image": vision.cache_bytes_per_image(config, per_value, frames),
        "input_bytes_per_image": vision.input_bytes_per_image(config.vision.encoder, frames),
    }


def format_summary(document: dict) -> str:
    """Returns the document of `summarize` as a table to read."""
    rows = [(name, value) for name, value in document["parameters"].items() if value]
    lines = [f"{'component':<18}{'parameters':>22}{'share':>9}"]
    lines += [f"{name:<18}{value:>22,}{value / document['total']:>9.2%}" for name, value in rows]
    lines.append(f"{'total':<18}{document['total']:>22,}  ({scaled(document['total'])})")
    lines.append(f"{'active':<18}{document['active']:>22,}  ({scaled(document['active'])} a token)")
    if document["trained"] != document["total"]:
        lines.append(f"{'trained':<18}{document['trained']:>22,}  ({scaled(document['trained'])}, the rest is frozen)")
    lines.append(f"{'one expert':<18}{document['one_expert']:>22,}  ({scaled(document['one_expert'])} over all layers)")
    lines.append("")
    lines.append(f"forward matmul, with head     {scaled(document['forward_flops_per_token'])}FLOP a token")
    core = document["attention_core_flops_per_token"]
    lines.append(
        f"forward attention core        {scaled(core)}FLOP a token (causal, {document['context_length']:,} tokens)"
    )
    lines.append(f"training (3x forward matmul)  {scaled(document['train_flops_per_token'])}FLOP a token")
    lines.append(f"weights in compute dtype      {scaled(document['weight_bytes'])}B")
    lines.append(f"parameters, gradients, AdamW  {scaled(document['train_state_bytes'])}B")
    lines.append(f"key/value cache               {scaled(document['cache_bytes_per_token'])}B a token")
    if "features_per_image" in document:
        seen, fed = document["features_per_image"], scaled(document["input_bytes_per_image"])
        frames = f" ({document['frames_per_image']} frames)" if document["frames_per_image"] > 1 else ""
        lines.append(f"{f'an image{frames}':<30}{seen:,} features, {fed}B of pixels fed")
        lines.append(f"forward of an image           {scaled(document['forward_flops_per_image'])}FLOP")
        lines.append(f"keys and values of an image   {scaled(document['cache_bytes_per_image'])}B")
    return "\n".join((*lines, *_listed(document.get("paths", ()))))


def _listed(paths: Sequence[Mapping]) -> list[str]:
    """A line for every parameter of the model by its dotted path."""
    lines = [""] if paths else []
    for path in paths:
        rate = f"  {path['rate_scale']:g} of the learning rate" if path["rate_scale"] != 1 else ""
        state = rate if path["trained"] else "  frozen"
        lines.append(f"{path['name']:<40}{path['parameters']:>22,}{state}")
    return lines


def scaled(number: float) -> str:
    """Returns a number with a decimal unit prefix: 1832623704576 is `1.833 T`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:,.2f} {prefix}"
    return f"{number:,.0f} "
