"""What the sources of published runs say of their software, and how they count: one entry a source.

In: a row. Out: `Source`. Each entry's comment says where it is from; none is a fit, but ZeRO-3's overlap and MaxText's
rules were chosen with their rows in view. A row of no known source has Megatron-Core's habits on GPUs and MaxText's on
TPUs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gpt4moe.config.check import require
from gpt4moe.plan.published.measurements import Row
from gpt4moe.plan.training.stacks import Stack


@dataclasses.dataclass(frozen=True)
class Source:
    """Habits of one source of rows.

    chunks: virtual stages by stages, None: chunks of two layers, one where a stage's are odd. remat None: the least
    that fits. microbatch_rows None: 1 in a pipeline, else what fits. causal: its FLOPs count half of the attention
    core, else all. counts_recompute: its FLOP/s have those computed again. tokens: of a whole run, by name's beginning.
    offloads: inputs of layers that are computed again can wait in the host's memory. vocab_size: of its GPT models.
    is_gpt: all are, whatever known model has the same widths. gpus, batch_tokens: where its rows tell none.
    """

    name: str
    stack: Stack
    remat: str | None = "selective"
    sequence_parallel: bool = True
    zero: int = 1
    chunks: Mapping[int, int] | None = None
    microbatch_rows: int | None = None
    causal: bool = False
    counts_recompute: bool = False
    tokens: Mapping[str, float] = dataclasses.field(default_factory=dict)
    gpus: int = 512
    batch_tokens: int | None = None
    expert: int | None = None
    expert_tensor: int = 1
    schedule: str | None = None
    numerics: str = "mixed_adam"
    offloads: bool = False
    vocab_size: int = 51_200
    is_gpt: bool = False


ALL_ROWS = 1_000_000  # of a replica: no accumulation
_ONE_CHUNK = dict.fromkeys(range(1, 1025), 1)
# Megatron of 2021: scores in memory, nothing overlaps. Megatron-Core: all does that can.
_OLD = Stack("megatron-2021", flash=False, data_overlap=0.0)
_NEW = Stack("megatron-core", data_overlap=0.9, tensor_overlap=0.5, stage_overlap=1.0)
# XLA prefetches FSDP's gathers behind layers; it waits for the sums of tensor parallelism. These overlaps, the batch of
# rows that tell none, and waiting in the host's memory: some 27 variants were tried on the rows, and these kept.
_XLA = Stack("maxtext", tensor_overlap=0.0, data_overlap=1.0)
_RECOMPUTES = {"remat": "full", "sequence_parallel": False, "counts_recompute": True, "is_gpt": True}
_LLAMA3_RUNS = {
    "zero": 2, "gpus": 16_384, "batch_tokens": 16_777_216,
    "tokens": {"llama3-": 15e12, "llama3.1": 15e12, "llama3.1-405b": 15.6e12},
}  # fmt: skip
_MAXTEXT = {"remat": None, "zero": 3, "gpus": 256, "numerics": "bfloat16", "offloads": True}


def _source(name: str, stack: Stack, habits: Mapping[str, Any] | None = None, **more: Any) -> Source:
    """A source with habits that it shares with others, and more of its own."""
    return Source(name, stack, **(habits or {}) | more)


def _named(stack: Stack, name: str, **changes: Any) -> Stack:
    return dataclasses.replace(stack, name=name, **changes)


# By the beginning of a row's name in small letters; the longest decides.
SOURCES = {
    # Narayanan et al. 2021, section 5.1: interleaved, scatter-gather, everything computed again, 16-bit gradients.
    "megatron-sc21": _source("megatron-sc21", _OLD, _RECOMPUTES, zero=0),
    # Its table 2 beside ZeRO-3 of DeepSpeed 0.3: each parameter's gather goes through one NIC a chip. How much of it
    # hides, 0.6, is told nowhere and was chosen with these six rows in view.
    "megatron-sc21-zero3": _source(
        "megatron-sc21", _named(_OLD, "deepspeed-zero3", hierarchical=False, data_overlap=0.6), _RECOMPUTES,
        zero=3, microbatch_rows=ALL_ROWS,
    ),
    # Korthikanti et al. 2022, table 3: chunks, microbatch of 4 for 22B; rows without "full" are sequence + selective.
    "korthikanti": _source(
        "korthikanti", _named(_OLD, "megatron-2022"), zero=0, chunks={8: 3, 35: 3, 64: 1}, microbatch_rows=4,
        is_gpt=True,
    ),
    # Jiang et al. 2024 (MegaScale), section 6 and its ablation: the baseline lacks fused attention and overlaps.
    "megascale-megatronlm": _source(
        "megascale-megatronlm", _named(_OLD, "megatron-2023"), chunks={8: 6, 35: 3}, vocab_size=64_000, is_gpt=True
    ),
    "megascale": _source(
        "megascale", _named(_NEW, "megascale", data_overlap=1.0), chunks={8: 6, 35: 3}, vocab_size=64_000, is_gpt=True
    ),
    # Smith et al. 2022: DeepSpeed's pipeline, 1F1B without chunks.
    "mt-nlg": _source("mt-nlg", _named(_OLD, "deepspeed-megatron"), _RECOMPUTES, chunks=_ONE_CHUNK),
    # BigScience's chronicles: the same on Jean Zay, four 100 Gbit/s Omni-Path links a server of 8.
    "bloom": _source(
        "bloom", _named(_OLD, "bloom", gradient_bytes=4, scale_out_bytes_per_second=6.25e9), _RECOMPUTES,
        chunks=_ONE_CHUNK, vocab_size=250_880,
    ),
    # Bang et al. 2024 (vTrain): Megatron-LM, 1F1B.
    "vtrain": _source("vtrain", _named(_OLD, "vtrain"), _RECOMPUTES, chunks=_ONE_CHUNK),
    # Zhang et al. 2022: FSDP over tensor parallelism of Megatron.
    "opt": _source("opt", _named(_OLD, "metaseq", data_overlap=0.8), _RECOMPUTES | {"is_gpt": False}, zero=3),
    "gpt3": _source("gpt3", _named(_OLD, "gpt3"), remat="full", sequence_parallel=False, gpus=1024),
    "gopher": _source("gopher", Stack("gopher"), remat="full"),
    # Chowdhery et al. 2022: collective matmuls hide a part of the sums.
    "palm": _source("palm", Stack("pathways", tensor_overlap=0.5), remat="full", zero=3, microbatch_rows=1),
    # Llama 3 (2407.21783), section 3.3: chunks of one layer, asynchronous messages, sharded gradients.
    "llama3": _source("llama3", _named(_NEW, "llama3", tensor_overlap=0.0), chunks={16: 7}, causal=True, zero=2),
    # The model cards tell the hours of all chips, restarts and stops among them.
    "llama3-8b-gpuhours": _source("llama3-hours", _named(_NEW, "llama3-hours"), _LLAMA3_RUNS),
    "llama3-70b-gpuhours": _source("llama3-hours", _named(_NEW, "llama3-hours"), _LLAMA3_RUNS),
    "llama3.1": _source("llama3-hours", _named(_NEW, "llama3-hours"), _LLAMA3_RUNS),
    "llama1": _source(
        "llama1", Stack("llama1"), zero=3,
        tokens={"llama1-7b": 1e12, "llama1-13b": 1e12, "llama1-33b": 1.4e12, "llama1-65b": 1.4e12},
    ),
    "llama2": _source("llama2", Stack("llama2"), gpus=2048, batch_tokens=4_194_304, tokens={"llama2": 2e12}),
    "llama4": _source("llama4", _named(_NEW, "llama4"), tokens={"llama4-scout": 40e12, "llama4-maverick": 22e12}),
    # DeepSeek-V3, section 3.2: PP16, EP64 over 8 servers, at most 4 a token, DualPipe hides most of the all-to-all,
    # which 20 of 132 processors move; FP8.
    "deepseek-v3": _source(
        "deepseek-v3",
        _named(_NEW, "deepseek", expert_overlap=0.8, matmul_bits=8, domain_limit=4, network_share=20 / 132),
        expert=64, schedule="dualpipe", tokens={"deepseek-v3": 14.8e12}, numerics="fp8_adam",
    ),
    # Wei et al. 2024, appendix B.3: the four chips of attention's TP are the EP of experts, PP12.
    "skywork-moe": _source("skywork-moe", _named(_NEW, "skywork"), expert=4, batch_tokens=16_777_216),
    # MoE Parallel Folding (2504.14960), table 1: without folding experts are split by tensor too.
    "mixtral-8x22b-nofolding": _source(
        "moe-folding", _named(_NEW, "megatron-core-moe"), expert=8, expert_tensor=2, chunks={8: 7}
    ),
    "mixtral-8x22b-folding": _source("moe-folding", _named(_NEW, "megatron-core-moe")),
    "qwen2-57b": _source("moe-folding", _named(_NEW, "megatron-core-moe")),
    "mixtral": _source("megatron-core-moe", _named(_NEW, "megatron-core-moe"), gpus=128),
    # Megatron-LM's README of 2024: all overlaps, distributed optimizer, vocabulary 131,072.
    "megatron-h100": _source("megatron-h100", _NEW, vocab_size=131_072, is_gpt=True),
    "megatron": _source("megatron-core", _NEW, vocab_size=131_072),
    "megatron-llama3": _source("megatron-llama3", _named(_NEW, "megatron-fp8", matmul_bits=8)),
    # MosaicML llm-foundry: FSDP, fused attention; FLOPs with all of the attention core.
    "mpt": _source("mpt", Stack("llm-foundry"), remat=None, zero=3, vocab_size=50_368, is_gpt=True),
    # MaxText since PR 1988 counts half of the core; the tables of v4 and v5p are older. Custom models are of its guide.
    "maxtext": _source("maxtext", _XLA, _MAXTEXT, causal=True),
    "maxtext-v4": _source("maxtext", _XLA, _MAXTEXT),
    "maxtext-v5p": _source("maxtext", _XLA, _MAXTEXT),
    "maxtext-moe": _source("maxtext-custom", _named(_XLA, "maxtext-custom"), _MAXTEXT, causal=True),
    "maxtext-dense": _source("maxtext-custom", _named(_XLA, "maxtext-custom"), _MAXTEXT, causal=True),
}  # fmt: skip


def stack_named(name: str) -> Stack:
    """Returns the software of this name, as `plan validate` prints it, or of a source; raises for an unknown one."""
    by_name = {source.stack.name: source.stack for source in SOURCES.values()} | {"default": Stack()}
    sources = {start: source.stack for start, source in SOURCES.items()}
    require(name in by_name or name in sources, "--stack", name, f"must be in {', '.join(sorted(by_name))}")
    return by_name[name] if name in by_name else sources[name]


def source_of(row: Row) -> Source:
    """Returns the habits of the row's source, by the longest beginning of its name that is in the table."""
    name = row.name.lower()
    if name.startswith("megatron-sc21") and "zero3" in name:
        return SOURCES["megatron-sc21-zero3"]
    if name.startswith("megascale") and "megatronlm" in name:
        return SOURCES["megascale-megatronlm"]
    known = [start for start in SOURCES if name.startswith(start)]
    found = SOURCES[max(known, key=len)] if known else _usual(row)
    if "fp8" in name and found.stack.matmul_bits == 16:
        found = dataclasses.replace(
            found, stack=dataclasses.replace(found.stack, name=f"{found.stack.name}-fp8", matmul_bits=8)
        )
    return found


def _usual(row: Row) -> Source:
    """Habits for a source that is not in the table, named by the first word of the row's name."""
    usual = SOURCES["maxtext"] if row.chip.name.startswith("tpu") else SOURCES["megatron"]
    first = row.name.split("-")[0].lower()
    return dataclasses.replace(usual, name=first, stack=dataclasses.replace(usual.stack, name=first))
