"""What `gpt4moe compile` compiles a run for: the machine, and the shape of a decode step."""

from __future__ import annotations

import dataclasses
import re

from gpt4moe.config.check import require, require_count, require_text

PROGRAMS = ("train", "decode")
PROMPT_LENGTH = 16  # tokens that have been read before the decode step
WEIGHT_DTYPES = ("float32", "bfloat16")
_FORM = re.compile(r"cpu:[1-9]\d*|v\d+[a-z]?:\d+(x\d+)*")


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """A machine that need not be there, and what a decode step works on.

    topology: "v5p:8x16x16", a TPU and its torus, or "cpu:8", emulated devices (None: `--topology` must say). slices:
    how many such tori are joined by the data-centre network. decode_rows, decode_length: rows decoded at once, cache
    slots of each. weight_dtype: of the weights that decoding reads.
    """

    topology: str | None = None
    slices: int = 1
    decode_rows: int = 128
    decode_length: int = 8192
    weight_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        require_text("topology", self.topology)
        mend = "e.g. v5p:8x8x8, v6e:16x16 or cpu:8"
        form = self.topology is None or _FORM.fullmatch(self.topology) is not None
        require(form, "topology", self.topology, "must be a TPU with its torus, or cpu with a number", mend)
        for name, least in (("slices", 1), ("decode_rows", 1), ("decode_length", PROMPT_LENGTH)):
            require_count(name, getattr(self, name), least)
        emulated = self.topology is not None and self.topology.startswith("cpu")
        require(not emulated or self.slices == 1, "slices", self.slices, "must be 1 for emulated devices")
        dtype = self.weight_dtype
        require(dtype in WEIGHT_DTYPES, "weight_dtype", dtype, f"must be in {WEIGHT_DTYPES}")
