"""What speculative decoding gains inside the engine, beside what the planner's formula for experts says.

    python benchmarks/speculative.py [--slots 1,8] [--temperatures 0,0.5] [--draft_tokens 4] [--new_tokens 96] [--json]

A model with experts (random weights, float32) continues texts, with proposals and without, in turns. Its head is its
embedding, so that it likes to repeat the last token: always at temperature 0, where every proposal stands, and about
every other time at 0.5. Proposals are looked up in the row's own text, or come from a draft model: a copy of the model
moved a little, which costs as much as the model (draft cost 1), so that it must lose; the formula says how much.

`proposed` is the mean number of proposals of a row in a pass, `accepted` the share of them that stood, `tokens` what a
pass yielded to a row, `experts` how many times the experts a pass read of those that a pass without proposals reads.
`gain` is of CPU seconds, which hold on a busy machine, and `by passes` of passes: what is left where a pass costs the
same whatever it judges. The formula is Leviathan's with the price of verification for experts, by weights read:
(N_shared + D(B (G + 1)) X) / (N_shared + D(B) X), with the proposals and the accepted share as measured.
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
from gpt4moe.infer.engine.request import EngineMetrics, EngineRequest
from gpt4moe.model.transformer import Transformer
from gpt4moe.plan.serving.speculation import Draft, expected_tokens, weight_bound_verification

PROMPT, CONTEXT, MOVED = 32, 512, 0.3
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
            for temperature in args.temperatures:
                document["rows"].append(measured(kind, temperature, plain, judging, args))
    print(json.dumps(document, indent=2) if args.json else text_of(document))


def parsed() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--slots", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--temperatures", type=lambda text: [float(part) for part in text.split(",")], default=[0, 0.5])
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


@dataclasses.dataclass(frozen=True)
class Counts:
    """Passes of an engine, what they yielded and what they read, over some requests."""

    passes: int
    drawn: int
    proposed: int
    accepted: int
    experts: float

    @classmethod
    def between(cls, before: EngineMetrics, after: EngineMetrics, rows: int) -> Counts:
        """rows: how many there were; their first tokens come from the prompts' passes."""
        read = [metrics.distinct_experts_L.mean() * metrics.decode_steps for metrics in (before, after)]
        passes = after.decode_steps - before.decode_steps
        return cls(
            passes=passes,
            drawn=after.new_tokens - before.new_tokens - rows,
            proposed=after.proposed_tokens - before.proposed_tokens,
            accepted=after.accepted_tokens - before.accepted_tokens,
            experts=(read[1] - read[0]) / passes,
        )


def measured(kind: str, temperature: float, plain: Engine, judging: Engine, args: argparse.Namespace) -> dict:
    """One way to propose at one number of rows, in turns with none."""
    slots, engines, times, texts = plain.config.slots, (plain, judging), ([], []), ([], [])
    prompts = np.random.default_rng(args.seed).integers(16, 1024, (slots, PROMPT)).tolist()
    before = [engine.metrics() for engine in engines]
    for _ in range(TURNS):
        for index, engine in enumerate(engines):
            seconds, made = run(engine, prompts, args.new_tokens, temperature)
            times[index].append(seconds)
            texts[index].append(made)
    assert temperature or texts[0] == texts[1], "speculation changed greedy tokens"
    without, counts = (
        Counts.between(start, engine.metrics(), TURNS * slots) for start, engine in zip(before, engines, strict=True)
    )
    accepted = counts.accepted / max(counts.proposed, 1)
    per_pass = counts.proposed / counts.passes / slots
    return {
        "proposals": kind,
        "slots": slots,
        "temperature": temperature,
        "proposed_per_pass": per_pass,
        "accepted": accepted,
        "tokens_per_pass": counts.drawn / counts.passes / slots,
        "experts": counts.experts / without.experts,
        "gain_by_cpu_seconds": min(times[0]) / min(times[1]),
        "gain_by_passes": without.passes / counts.passes,
        "formula": formula(judging, kind, per_pass, accepted),
    }


def formula(engine: Engine, kind: str, per_pass: float, accepted: float) -> float:
    """Tokens over time where a share of the passes of a row has `draft_tokens` proposals and the rest none."""
    tokens, slots = engine.config.draft_tokens, engine.config.slots
    share, draft = per_pass / tokens, Draft(tokens, acceptance_of(accepted, tokens), float(kind == "model"))
    verification = weight_bound_verification(shape_of(engine.decoder.config), slots, per_pass)
    return (1 - share + share * expected_tokens(draft)) / (per_pass * draft.cost + verification)


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


def run(
    engine: Engine, prompts: list[list[int]], num_new: int, temperature: float
) -> tuple[float, list[tuple[int, ...]]]:
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=num_new, ignore_end_of_text=True)
    started = time.process_time()
    handles = [engine.submit(EngineRequest(prompt, sampling)) for prompt in prompts]
    made = [handle.result()[0].token_ids for handle in handles]
    return time.process_time() - started, made


def machine() -> str:
    device = jax.devices()[0]
    return f"{platform.machine()}, {device.device_kind}, jax {jax.__version__}, {datetime.date.today()}"


def text_of(document: dict) -> str:
    head = f"{'proposals':11}{'slots':>6}{'temp.':>7}{'proposed':>10}{'accepted':>10}{'tokens':>8}{'experts':>9}"
    head += f"{'gain':>8}{'by passes':>11}{'formula':>9}"
    lines = [document["machine"], f"at most {document['draft_tokens']} proposals a pass", head]
    for row in document["rows"]:
        figures = f"{row['proposed_per_pass']:10.2f}{row['accepted']:10.0%}{row['tokens_per_pass']:8.2f}"
        gains = f"{row['gain_by_cpu_seconds']:8.2f}{row['gain_by_passes']:11.2f}{row['formula']:9.2f}"
        named = f"{row['proposals']:11}{row['slots']:6}{row['temperature']:7g}"
        lines.append(f"{named}{figures}{row['experts']:9.2f}{gains}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
