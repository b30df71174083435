"""What the sources of published runs say of their software, and how they count: one entry a source.

In: a row. Out: `Source`. Each entry's comment says where it is from; nothing is fitted. A row of no known source has
Megatron-Core's habits on GPUs and MaxText's on TPUs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from gpt4moe.plan.measurements import Row
from gpt4moe.plan.stacks import Stack


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
_PLAIN = Stack("megatron-2021", flash=False, data_overlap=0.0)
_MODERN = Stack("megatron-core", data_overlap=0.9, tensor_overlap=0.5, stage_overlap=1.0)
# XLA prefetches FSDP's gathers behind layers; it waits for the sums of tensor parallelism.
_TPU = Stack("maxtext", tensor_overlap=0.0, data_overlap=1.0)
_NONE = dict.fromkeys(range(1, 1025), 1)

_HOURS = dataclasses.replace(_MODERN, name="llama3-hours")
_LLAMA3 = {"llama3-": 15e12, "llama3.1": 15e12, "llama3.1-405B": 15.6e12}

_CUSTOM = Source(
    "maxtext-custom",
    dataclasses.replace(_TPU, name="maxtext-custom"),
    None,
    zero=3,
    causal=True,
    gpus=256,
    numerics="bfloat16",
    offloads=True,
)

# Longest beginning of a row's name decides.
SOURCES = {
    # Narayanan et al. 2021, section 5.1: interleaved, scatter-gather, everything computed again, 16-bit gradients.
    "megatron-sc21": Source("megatron-sc21", _PLAIN, "full", False, 0, counts_recompute=True),
    # Its table 2 beside ZeRO-3 of DeepSpeed 0.3: each parameter's gather goes through one NIC a chip.
    "megatron-sc21-zero3": Source(
        "megatron-sc21",
        Stack("deepspeed-zero3", flash=False, hierarchical=False, data_overlap=0.6),
        "full",
        False,
        3,
        counts_recompute=True,
        microbatch_rows=ALL_ROWS,
    ),
    # Korthikanti et al. 2022, table 3: chunks, microbatch of 4 for 22B; rows without "full" are sequence + selective.
    "korthikanti": Source(
        "korthikanti",
        dataclasses.replace(_PLAIN, name="megatron-2022"),
        zero=0,
        chunks={8: 3, 35: 3, 64: 1},
        microbatch_rows=4,
    ),
    # Jiang et al. 2024 (MegaScale), table 2 and its ablation: the baseline lacks fused attention and overlaps.
    "megascale-megatronlm": Source(
        "megascale-megatronlm", dataclasses.replace(_PLAIN, name="megatron-2023"), chunks={8: 6, 35: 3}
    ),
    "megascale": Source(
        "megascale", Stack("megascale", data_overlap=1.0, tensor_overlap=0.5, stage_overlap=1.0), chunks={8: 6, 35: 3}
    ),
    # Smith et al. 2022: DeepSpeed's pipeline, 1F1B without chunks.
    "mt-nlg": Source(
        "mt-nlg",
        dataclasses.replace(_PLAIN, name="deepspeed-megatron"),
        "full",
        False,
        chunks=_NONE,
        counts_recompute=True,
    ),
    # BigScience's chronicles: the same on Jean Zay, four 100 Gbit/s Omni-Path links a server of 8.
    "bloom": Source(
        "bloom",
        Stack("bloom", flash=False, data_overlap=0.0, gradient_bytes=4, scale_out_bytes_per_second=6.25e9),
        "full",
        False,
        chunks=_NONE,
        counts_recompute=True,
        vocab_size=250_880,
        is_gpt=True,
    ),
    # Bang et al. 2024 (vTrain): Megatron-LM, 1F1B, everything computed again.
    "vtrain": Source(
        "vtrain",
        dataclasses.replace(_PLAIN, name="vtrain"),
        "full",
        False,
        chunks=_NONE,
        counts_recompute=True,
        is_gpt=True,
    ),
    # Zhang et al. 2022: FSDP over tensor parallelism of Megatron.
    "opt": Source(
        "opt", dataclasses.replace(_PLAIN, name="metaseq", data_overlap=0.8), "full", False, 3, counts_recompute=True
    ),
    "gpt3": Source("gpt3", dataclasses.replace(_PLAIN, name="gpt3"), "full", False, gpus=1024),
    "gopher": Source("gopher", Stack("gopher"), "full"),
    "palm": Source("palm", Stack("pathways", tensor_overlap=0.5), "full", zero=3, microbatch_rows=1),
    # Llama 3 (2407.21783), section 3.3: chunks of one layer, asynchronous messages between stages.
    "llama3": Source(
        "llama3",
        dataclasses.replace(_MODERN, name="llama3", tensor_overlap=0.0),
        chunks={16: 7},
        causal=True,
        zero=2,
    ),
    # The model cards tell the hours of all chips, restarts and stops among them.
    "llama3-8B-gpuhours": Source("llama3-hours", _HOURS, tokens=_LLAMA3, zero=2, gpus=16_384, batch_tokens=16_777_216),
    "llama3-70B-gpuhours": Source("llama3-hours", _HOURS, tokens=_LLAMA3, zero=2, gpus=16_384, batch_tokens=16_777_216),
    "llama3.1": Source("llama3-hours", _HOURS, tokens=_LLAMA3, zero=2, gpus=16_384, batch_tokens=16_777_216),
    "llama1": Source(
        "llama1",
        Stack("llama1"),
        zero=3,
        tokens={"llama1-7B": 1e12, "llama1-13B": 1e12, "llama1-33B": 1.4e12, "llama1-65B": 1.4e12},
    ),
    "llama2": Source("llama2", Stack("llama2"), gpus=2048, tokens={"llama2": 2e12}, batch_tokens=4_194_304),
    "llama4": Source(
        "llama4", dataclasses.replace(_MODERN, name="llama4"), tokens={"llama4-scout": 40e12, "llama4-maverick": 22e12}
    ),
    # DeepSeek-V3, section 3.2: PP16, EP64 over 8 servers, at most 4 a token, DualPipe hides the all-to-all, FP8.
    "deepseek-v3": Source(
        "deepseek-v3",
        dataclasses.replace(
            _MODERN, name="deepseek", expert_overlap=0.8, matmul_bits=8, domain_limit=4, network_share=20 / 132
        ),
        expert=64,
        schedule="dualpipe",
        tokens={"deepseek-v3": 14.8e12},
        numerics="fp8_adam",
    ),
    # Wei et al. 2024, appendix B.3: TP4 of attention is EP4 of experts, PP12.
    "skywork-moe": Source(
        "skywork-moe", dataclasses.replace(_MODERN, name="skywork"), expert=4, batch_tokens=16_777_216
    ),
    # MoE Parallel Folding (2504.14960), table 1: EP within data parallelism, experts split by tensor too.
    "mixtral-8x22b-nofolding": Source(
        "moe-folding", dataclasses.replace(_MODERN, name="megatron-core-moe"), expert=8, expert_tensor=2, chunks={8: 7}
    ),
    "mixtral-8x22b-folding": Source("moe-folding", dataclasses.replace(_MODERN, name="megatron-core-moe")),
    "qwen2-57b": Source("moe-folding", dataclasses.replace(_MODERN, name="megatron-core-moe")),
    "mixtral": Source("megatron-core-moe", dataclasses.replace(_MODERN, name="megatron-core-moe"), gpus=128),
    # Megatron-LM's README of 2024: all overlaps, distributed optimizer.
    "megatron-h100": Source("megatron-h100", _MODERN, vocab_size=131_072, is_gpt=True),
    "megatron": Source("megatron-core", _MODERN),
    "megatron-llama3": Source("megatron-llama3", dataclasses.replace(_MODERN, name="megatron-fp8", matmul_bits=8)),
    # MosaicML llm-foundry: FSDP, fused attention; FLOPs with all of the attention core.
    "mpt": Source("mpt", Stack("llm-foundry"), None, zero=3, vocab_size=50_368, is_gpt=True),
    # MaxText since PR 1988 counts half of the core.
    "maxtext": Source("maxtext", _TPU, None, zero=3, causal=True, gpus=256, numerics="bfloat16", offloads=True),
    # The guide to custom models, on Trillium, and the measured tables of v4 and v5p.
    "maxtext-moe": _CUSTOM,
    "maxtext-dense": _CUSTOM,
    "maxtext-v4": Source("maxtext", _TPU, None, zero=3, gpus=256, numerics="bfloat16", offloads=True),
    "maxtext-v5p": Source("maxtext", _TPU, None, zero=3, gpus=256, numerics="bfloat16", offloads=True),
}


def source_of(row: Row) -> Source:
    """Returns the habits of the row's source, by the longest beginning of its name that is in the table."""
    name = row.name
    if name.startswith("megatron-sc21") and "zero3" in name:
        return SOURCES["megatron-sc21-zero3"]
    if name.startswith("megascale") and "megatronlm" in name:
        return SOURCES["megascale-megatronlm"]
    known = [start for start in SOURCES if name.startswith(start)]
    found = SOURCES[max(known, key=len)] if known else _usual(row)
    if "fp8" in name and found.stack.matmul_bits == 16 and row.chip.peak_8bit_ops:
        found = dataclasses.replace(
            found, stack=dataclasses.replace(found.stack, name=f"{found.stack.name}-fp8", matmul_bits=8)
        )
    return found


def _usual(row: Row) -> Source:
    """Habits for a source that is not in the table, named by the first word of the row's name."""
    usual = SOURCES["maxtext"] if row.chip.name.startswith("tpu") else SOURCES["megatron"]
    first = row.name.split("-")[0]
    return dataclasses.replace(usual, name=first, stack=dataclasses.replace(usual.stack, name=first))
