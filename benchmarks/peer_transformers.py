"""The training step of benchmarks/train_step.py in Hugging Face transformers on torch: one process, one variant.

Started by `python benchmarks/train_step.py --peers`, which sends the sizes and the tokens. MixtralForCausalLM with
random weights, attention sdpa, load-balance loss, clipping to a global norm, fused AdamW, all cores. A variant is an
experts implementation of transformers, and for bfloat16 where the weights are: float32 under autocast, or bfloat16
throughout (moments too, which a real run would not want). transformers knows no capacity and no router z-loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import resource
import statistics
import sys
import time

from turns import serve

NEEDS = {"torch": (2, 9), "transformers": (5, 0)}
EXPERTS = ("eager", "batched_mm", "grouped_mm")
WEIGHTS = {"float32": ("float32",), "bfloat16": ("float32", "bfloat16")}
GEMM_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Variant:
    """Compute dtype, experts implementation and dtype of the weights."""

    dtype: str
    experts: str
    weights: str

    @property
    def name(self) -> str:
        """As it stands in the rows' `dispatch`."""
        return f"transformers:{self.experts}" + (":pure" if self.weights != "float32" else "")

    def command(self) -> list[str]:
        """The command line of its process."""
        return [sys.executable, __file__, self.dtype, self.experts, self.weights]


def variants(dtype: str) -> list[Variant]:
    """Every way of transformers to train in `dtype`."""
    return [Variant(dtype, experts, weights) for weights in WEIGHTS[dtype] for experts in EXPERTS]


def missing() -> str | None:
    """What of the extra is not there or too old, None where all is."""
    for name, least in NEEDS.items():
        wanted = f"{name}>={'.'.join(map(str, least))}"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{wanted}, which is not installed"
        if tuple(int(part) for part in version.split(".")[:2]) < least:
            return f"{wanted}, found {version}"
    return None


def copied_bytes(model: dict, tokens: int, variant: Variant) -> int:
    """Bytes of float32 expert matrices that `batched_mm` copies for every choice and keeps for the backward pass."""
    moe = model["moe"]
    one_choice = 3 * model["model_dim"] * moe["hidden_dim"] * 4
    return (
        model["num_layers"] * tokens * moe["experts_per_token"] * one_choice if variant.experts == "batched_mm" else 0
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dtype", "experts", "weights"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    variant = Variant(arguments.dtype, arguments.experts, arguments.weights)
    task = json.loads(sys.stdin.readline())
    measure(variant, task["model"], task["optimizer"], task["tokens"], task["targets"])


def measure(variant: Variant, model_sizes: dict, optimizer: dict, tokens: list, targets: list) -> None:
    """Builds the model and steps on the tokens as it is asked."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = build(model_sizes, variant)
    update = build_optimizer(model, optimizer)
    tokens_BT, targets_BT = torch.tensor(tokens), torch.tensor(targets)
    autocast = variant.dtype == "bfloat16" and variant.weights == "float32"
    last = {}

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            # Targets are shifted already.
            out = model(tokens_BT, labels=targets_BT, shift_labels=targets_BT)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer["clip_norm"], foreach=True)
        update.step()
        update.zero_grad(set_to_none=True)
        last["loss"] = out.loss.item() - model.config.router_aux_loss_coef * out.aux_loss.item()

    ready = {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_flops_per_token": train_flops_per_token(model, tokens_BT),
        "gemm_flops_per_cpu_second": gemm_rate(variant.dtype, tuple(model_sizes["gemm"])),
    }
    serve(ready, step, lambda: last | {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})


def build(sizes: dict, variant: Variant):
    """MixtralForCausalLM of our sizes in training mode, random weights."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    moe, attention = sizes["moe"], sizes["attention"]
    config = MixtralConfig(
        num_hidden_layers=sizes["num_layers"],
        hidden_size=sizes["model_dim"],
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=sizes["context_length"],
        tie_word_embeddings=sizes["tie_embeddings"],
        rms_norm_eps=sizes["norm_epsilon"],
        num_attention_heads=attention["num_heads"],
        num_key_value_heads=attention["num_kv_heads"],
        rope_parameters={"rope_type": "default", "rope_theta": attention["rope_theta"]},
        num_local_experts=moe["num_experts"],
        num_experts_per_tok=moe["experts_per_token"],
        intermediate_size=moe["hidden_dim"],
        router_aux_loss_coef=moe["load_balance_weight"],
        output_router_logits=True,
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation=variant.experts,
    )
    return MixtralForCausalLM(config).to(getattr(torch, variant.weights)).train()


def build_optimizer(model, config: dict):
    """Fused AdamW; matrices decay, norms do not."""
    import torch

    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": config["weight_decay"]}, {"params": norms, "weight_decay": 0.0}]
    betas = config["b1"], config["b2"]
    return torch.optim.AdamW(groups, lr=config["learning_rate"], betas=betas, eps=config["epsilon"], fused=True)


def train_flops_per_token(model, tokens_BT) -> float:
    """Three times the matrix-product FLOPs of a forward pass over one row as torch counts them, without attention's."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    implementation = model.config._experts_implementation
    model.set_experts_implementation("eager")  # the counter does not know grouped products
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens_BT[:1])
    model.set_experts_implementation(implementation)
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if "attention" not in str(operation))
    return 3 * products / tokens_BT.shape[1]


def gemm_rate(dtype: str, size: tuple[int, int, int]) -> float:
    """FLOPs per CPU-second of one large product in `dtype`, the median of a few seconds' worth."""
    import torch

    rows, inner, columns = size
    a, b = (torch.ones(shape, dtype=getattr(torch, dtype)) for shape in ((rows, inner), (inner, columns)))
    a @ b
    seconds, ends = [], time.monotonic() + GEMM_SECONDS
    while not seconds or time.monotonic() < ends:
        started = time.process_time()
        a @ b
        seconds.append(time.process_time() - started)
    return 2 * rows * inner * columns / statistics.median(seconds)


if __name__ == "__main__":
    main()
