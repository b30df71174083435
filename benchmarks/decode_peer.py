"""The prefill and decode of benchmarks/decode.py in Hugging Face transformers on torch: one process, one dtype.

Started by `python benchmarks/decode.py --peers`, which writes the weights and sends the tasks. MixtralForCausalLM,
attention sdpa, a dynamic cache, greedy, step by step; a prefill makes the logits of the last token alone.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys

from turns import cpu_and_wall, serve_tasks

EXPERTS = ("grouped_mm", "eager", "batched_mm")


def main() -> None:
    import torch

    directory, dtype = sys.argv[1:]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = load(directory, getattr(torch, dtype))
    tokens = torch.tensor(json.loads(pathlib.Path(directory, "tokens.json").read_text()))
    with torch.inference_mode():
        probe = model(tokens[:1, :16]).logits[0].float()
        ready = {"probe": probe.tolist() if dtype == "float32" else None}
        serve_tasks(ready, lambda line: answer(model, tokens, json.loads(line)))


def load(directory: str, dtype):
    """MixtralForCausalLM with the weights of `weights.safetensors` under the sizes of `sizes.json`."""
    from safetensors.torch import load_file
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = json.loads(pathlib.Path(directory, "sizes.json").read_text())
    model = MixtralForCausalLM(MixtralConfig(**sizes, attn_implementation="sdpa"))
    missing = model.load_state_dict(load_file(f"{directory}/weights.safetensors"), strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys, missing
    return model.to(dtype).eval()


def answer(model, tokens, task: dict) -> list[list[float]]:
    """CPU and wall seconds of each prefill, or of each step of decoding after an unmeasured prefill."""
    model.set_experts_implementation(task["experts"])
    prompt = tokens[: task["rows"], : task["length"]]
    if task["kind"] == "prefill":
        return [timed(lambda: model(prompt, logits_to_keep=1))[0] for _ in range(task["steps"])]
    out, seconds = model(prompt, logits_to_keep=1), []
    for _ in range(task["steps"]):
        last, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        took, out = timed(lambda last=last, cache=cache: model(last, past_key_values=cache))
        seconds.append(took)
    return seconds


def timed(function):
    """((CPU seconds, wall seconds), result) of a call."""
    before = cpu_and_wall()
    result = function()
    return [after - start for after, start in zip(cpu_and_wall(), before, strict=True)], result


if __name__ == "__main__":
    main()
