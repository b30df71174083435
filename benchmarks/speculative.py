"""What speculative decoding gains inside the engine, beside what the planner's formula for experts says.

    python benchmarks/speculative.py [--slots 1,8] [--draft_tokens 4] [--new_tokens 96] [--seed 0] [--json]

A model with experts (random weights, float32) continues texts greedily, which repeat themselves before long, with
proposals and without, in turns. Proposals are looked up in the row's own text, or come from a draft model: a copy of
the model moved a little, which costs as much as the model (draft cost 1), so that it must lose; the formula says how
much.

`accepted` is the share of the proposals that stood, `tokens` what a pass yielded to a row. The formula is Leviathan's
with the price of verification for experts: (N_shared + D(B (G + 1)) X) / (N_shared + D(B) X) by weights read, with the
accepted share as measured, and G the mean number of proposals of a pass. Ratios are of CPU seconds, which hold on a
busy machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import time

import jax
import numpy as np
from flax import nnx

from gpt4moe.accounting.shape import shape_of
from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.infer.engine.request import EngineRequest
from gpt4moe.model.transformer import Transformer
from gpt4moe.plan.serving.speculation import Draft, speed_up, weight_bound_verification

PROMPT, CONTEXT, MOVED = 32, 512, 0.03
TURNS = 3


def main() -> None:
    args = parsed()
    model = Transformer(make_config(), rngs=nnx.Rngs(args.seed))
    decoder = Decoder.of(model)
    document = {"machine": machine(), "draft_tokens": args.draft_tokens, "rows": []}
    for slots in args.slots:
        plain = make_engine(decoder, slots, args)
        for kind in ("lookup", "model"):
            draft = moved(decoder, args.seed) if kind == "model" else None
            judging = make_engine(decoder, slots, args, draft_tokens=args.draft_tokens, draft=draft)
            document["rows"].append(measured(decoder.config, kind, plain, judging, args))
    print(json.dumps(document, indent=2) if args.json else text_of(document))


def parsed() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--slots", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--draft_tokens", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    most = CONTEXT - PROMPT
    if args.new_tokens > most:
        parser.error(f"--new_tokens={args.new_tokens} must be at most {most}")
    for name in ("draft_tokens", "new_tokens"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name}={getattr(args, name)} must be at least 1")
    return args


def make_config() -> ModelConfig:
    return ModelConfig(
        num_layers=4,
        model_dim=512,
        vocab_size=1024,
        context_length=CONTEXT,
        attention=AttentionConfig(num_heads=8, num_kv_heads=1),
        moe=MoeConfig(num_experts=8, experts_per_token=2, hidden_dim=1408),
        compute_dtype="float32",
    )


def make_engine(
    decoder: Decoder, slots: int, args: argparse.Namespace, draft_tokens: int = 0, draft: Decoder | None = None
) -> Engine:
    sizes = {"slots": slots, "prefill_chunk": PROMPT, "prefix_caching": False}
    config = EngineConfig(**sizes, max_length=PROMPT + args.new_tokens, draft_tokens=draft_tokens)
    engine = Engine(decoder, byte_tokenizer(), config, draft=draft)
    engine.warm_up()
    return engine


def measured(model: ModelConfig, kind: str, plain: Engine, judging: Engine, args: argparse.Namespace) -> dict:
    """One way to propose at one number of rows, in turns with none."""
    slots, times, texts = plain.config.slots, ([], []), ([], [])
    prompts = np.random.default_rng(args.seed).integers(16, 1024, (slots, PROMPT)).tolist()
    for _ in range(TURNS):
        for index, engine in enumerate((plain, judging)):
            seconds, made = run(engine, prompts, args.new_tokens)
            times[index].append(seconds)
            texts[index].append(made)
    assert texts[0] == texts[1], "speculation changed greedy tokens"
    metrics = judging.metrics()
    per_pass = metrics.proposed_tokens / metrics.decode_steps / slots
    accepted = metrics.accepted_tokens / max(metrics.proposed_tokens, 1)
    drawn = metrics.new_tokens - TURNS * slots  # the first tokens come from the prompts' passes
    tokens = round(per_pass)
    verification = weight_bound_verification(shape_of(model), slots, tokens)
    formula = speed_up(Draft(tokens, acceptance_of(accepted, tokens), float(kind == "model")), verification)
    return {
        "proposals": kind,
        "slots": slots,
        "proposed_per_pass": per_pass,
        "accepted": accepted,
        "tokens_per_pass": drawn / metrics.decode_steps / slots,
        "gain": min(times[0]) / min(times[1]),
        "formula": formula,
    }


def acceptance_of(share: float, tokens: int) -> float:
    """The chance that a proposal stands, of which comes this share of `tokens` where all after a bad one fall."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        stood = sum(middle**place for place in range(1, tokens + 1)) / max(tokens, 1)
        low, high = (middle, high) if stood < share else (low, middle)
    return low


def moved(decoder: Decoder, seed: int) -> Decoder:
    """The model a little off."""
    generator = np.random.default_rng(seed)

    def off(leaf: jax.Array) -> jax.Array:
        return leaf * (1 + MOVED * generator.standard_normal(leaf.shape, np.float32))

    return dataclasses.replace(decoder, weights=jax.tree.map(off, decoder.weights))


def run(engine: Engine, prompts: list[list[int]], num_new: int) -> tuple[float, list[tuple[int, ...]]]:
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=num_new, ignore_end_of_text=True)
    started = time.process_time()
    handles = [engine.submit(EngineRequest(prompt, sampling)) for prompt in prompts]
    made = [handle.result()[0].token_ids for handle in handles]
    return time.process_time() - started, made


def machine() -> str:
    device = jax.devices()[0]
    return f"{platform.machine()}, {device.device_kind}, jax {jax.__version__}, {datetime.date.today()}"


def text_of(document: dict) -> str:
    head = f"{'proposals':11}{'slots':>6}{'proposed':>10}{'accepted':>10}{'tokens':>8}{'gain':>8}{'formula':>9}"
    lines = [document["machine"], f"at most {document['draft_tokens']} proposals a pass", head]
    for row in document["rows"]:
        names = ("proposed_per_pass", "accepted", "tokens_per_pass", "gain", "formula")
        proposed, accepted, tokens, gain, formula = (row[name] for name in names)
        figures = f"{proposed:10.2f}{accepted:10.0%}{tokens:8.2f}{gain:8.2f}{formula:9.2f}"
        lines.append(f"{row['proposals']:11}{row['slots']:6}{figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
