"""What the reference article takes for granted, as settings: claims in, `Premises` out; `NAME=VALUE` moves one.

A premise that the article states is read from its claim, whose number stands beside it; the others are what its
numbers imply or what its sources say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gpt4moe.accounting.chips import Chip, chip_named
from gpt4moe.accounting.published import shape_named
from gpt4moe.accounting.shape import Shape
from gpt4moe.config.check import CallerError, near, require, require_count, require_positive
from gpt4moe.plan.article.claims import Claim

SHAPE = "gpt4_1p8t"
# Widths of the model that `--set` moves beside the premises.
WIDTHS = (
    "num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "num_experts",
    "experts_per_token", "expert_hidden_dim",
)  # fmt: skip
CHIPS = ("gpu", "h100")
PERCENTS = ("mfu_low_percent", "mfu_high_percent", "speculative_acceptance_percent")


def stated(claim: int) -> Any:
    """A premise that is the value of this claim."""
    return dataclasses.field(metadata={"claim": claim})


@dataclasses.dataclass(frozen=True)
class Premises:
    """The article's premises; units are in the names, counts and ratios have none.

    words: of text that a person reads. dense: the model without experts that the article holds against it. gpu, h100:
    chips by their names in `accounting.chips`; gpu_memory_gb None: the chip's own. h100_*: of the second run.
    tensor, stages: of training; inference_*: of the serving cluster. small_batch, large_batch, cache_*: of the
    article's section on experts. vision_*, text_*: of the section on images.
    """

    slow_words_per_minute: float = stated(3)
    fast_words_per_minute: float = stated(4)
    list_dollars_per_1k_tokens: float = stated(10)
    gpt3_parameters: float = stated(13)
    training_tokens: float = stated(22)
    context_tokens: float = stated(29)
    long_context_tokens: float = stated(30)
    batch_tokens: float = stated(31)
    tensor: int = stated(33)
    stages: int = stated(34)
    gpus: int = stated(38)
    days_low: float = stated(39)
    days_high: float = stated(40)
    mfu_low_percent: float = stated(41)
    mfu_high_percent: float = stated(42)
    h100s: int = stated(45)
    h100_days: float = stated(46)
    speculative_tokens: int = stated(73)
    vision_tokens: float = stated(74)
    tokens_per_word: float = 2.0  # what claims 5 and 6 imply; 1.33 is usual for English
    dense_parameters: float = 1e12
    dense_tokens_per_second: float = 20.0
    gpt3_tokens: float = 300e9  # Brown et al. 2020, table 2.1
    chinchilla_tokens_per_parameter: float = 20.0  # Hoffmann et al. 2022, table 3
    gpu: str = "a100_40"
    gpu_memory_gb: float | None = None
    gpus_per_node: int = 8
    slow_gbit_per_node: float = 200.0
    fast_gbit_per_node: float = 1600.0
    dollars_per_gpu_hour: float = 1.0
    h100: str = "h100"
    dollars_per_h100_hour: float = 2.0
    weight_bytes: float = 2.0  # of a 16-bit weight; the article's 8-bit cases have half
    small_batch: int = 256
    large_batch: int = 512
    cache_batch: int = 512
    cache_context_tokens: int = 2048
    cache_head_dim: int = 128
    inference_tensor: int = 8
    inference_stages: int = 16
    inference_batch: int = 4096  # "4k"
    least_batch: int = 8
    speculative_acceptance_percent: float = 70.0
    speculative_draft_cost: float = 0.05  # a step of the draft over one of the model
    vision_bytes_per_patch: float = 600.0
    text_bytes_per_token: float = 4.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in CHIPS:
                chip_named(value)
            elif isinstance(value, int) or field.type == "int":
                require_count(field.name, value)
            elif value is not None:
                require_positive(field.name, value)
        two_widths = self.h100_chip.peak_8bit_ops is not None
        require(two_widths, "h100", self.h100, "must be a chip with a peak at 8 bits")
        for name in PERCENTS:
            require(getattr(self, name) < 100, name, getattr(self, name), "must lie below 100")

    @property
    def chip(self) -> Chip:
        """The chip of the first run, with the memory that was set."""
        chip = chip_named(self.gpu)
        memory = chip.memory_bytes if self.gpu_memory_gb is None else self.gpu_memory_gb * 1e9
        return dataclasses.replace(chip, memory_bytes=memory)

    @property
    def h100_chip(self) -> Chip:
        """The chip of the second run."""
        return chip_named(self.h100)


def article_premises(claims: Mapping[int, Claim]) -> Premises:
    """Returns what the article itself assumes."""
    fields = {field.name: field.metadata["claim"] for field in dataclasses.fields(Premises) if field.metadata}
    return Premises(**{name: _typed(name, claims[claim].number) for name, claim in fields.items()})


def article_shape() -> Shape:
    """Returns the model of the article: gin_configs/model/gpt4_1p8t.gin."""
    return shape_named(SHAPE)


def move(premises: Premises, shape: Shape, settings: Sequence[str]) -> tuple[Premises, Shape]:
    """Returns premises and shape with each `NAME=VALUE` of `settings` applied, the last of a name.

    Raises `CallerError` for a name that is not there, with those near it, and for a value that cannot be.
    """
    changes, widths = {}, {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        require(bool(separator and text), "--set", setting, "must have the form NAME=VALUE")
        known = [*(field.name for field in dataclasses.fields(Premises)), *WIDTHS]
        if name not in known:
            raise CallerError(f"--set {name}={text} is no premise; near: {near(name, known)}")
        (widths if name in WIDTHS else changes)[name] = _parsed(name, text)
    for name, width in widths.items():
        require_count(name, width)
    if "num_layers" in widths and shape.num_moe_layers == shape.num_layers:
        widths["num_moe_layers"] = widths["num_layers"]
    return dataclasses.replace(premises, **changes), dataclasses.replace(shape, **widths)


def _parsed(name: str, text: str) -> float | int | str:
    if name in CHIPS:
        return text
    try:
        number = float(text)
    except ValueError:
        raise CallerError(f"--set {name}={text} must be a number") from None
    return _typed(name, number)


def _typed(name: str, number: float) -> float | int:
    """A whole number as an int where counts are expected; one that is not whole is left for the check of counts."""
    types = {field.name: field.type for field in dataclasses.fields(Premises)} | dict.fromkeys(WIDTHS, "int")
    return int(number) if types[name] == "int" and number.is_integer() else number
