"""What continuous batching gains over static batching, and what callers wait who come at random times.

    python benchmarks/serve.py [--requests 64] [--slots 8] [--load 0.7] [--seed 0] [--json]

A small model (random weights, float32) behind the engine. Continuations of 8 to 512 tokens end where they are told to:
`spread` lengths are as likely at every octave (most are short, as in chats), `uniform` ones at every number.

  batching   all requests wait at the start. Continuous: a slot that is free takes the next request. Static: the same
             engine, programs and requests, the next batch enters when the last row of the one before has ended. The
             gain is tokens a second of one over the other, by CPU seconds on a CPU, which hold on a busy machine; the
             formula is E[longest of a batch] / E[length], without prompts and without the end, when slots run empty.
  arrivals   requests come as a Poisson process at `--load` of the continuous rate: seconds to the first token and from
             token to token, as the callers see them.
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

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.infer.engine.handle import RequestHandle
from gpt4moe.infer.engine.request import EngineRequest
from gpt4moe.model.transformer import Transformer
from gpt4moe.plan.serving.batching import Lengths, continuous_batching_gain

SHORTEST, LONGEST, PROMPT = 8, 512, 32
CONTEXT = 1024
PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True)
class Served:
    """Tokens drawn, and what it took."""

    tokens: int
    seconds: float
    cpu_seconds: float
    decode_steps: int


def main() -> None:
    args = parsed()
    engine = make_engine(args.slots)
    engine.warm_up()
    generator = np.random.default_rng(args.seed)
    document = {"machine": machine(), "requests": args.requests, "slots": args.slots, "batching": {}}
    rate = 0.0
    for kind, lengths in drawn_lengths(generator, args.requests).items():
        requests = [request_of(generator, int(length)) for length in lengths]
        static, continuous = (serve(engine, requests, size) for size in (args.slots, len(requests)))
        document["batching"][kind] = compared(static, continuous, lengths, args.slots)
        rate = continuous.tokens / continuous.seconds if kind == "spread" else rate
        if kind == "spread":
            document["arrivals"] = arriving(engine, requests, args.load * rate / lengths.mean(), generator)
    print(json.dumps(document, indent=2) if args.json else text_of(document, args.load))


def parsed() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--load", type=float, default=0.7, help="arrivals over what the engine can serve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for name in ("requests", "slots", "load"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name}={getattr(args, name)} must be above 0")
    return args


def make_engine(slots: int) -> Engine:
    tokenizer = byte_tokenizer()
    config = ModelConfig(
        num_layers=2,
        model_dim=128,
        vocab_size=1024,
        context_length=CONTEXT,
        attention=AttentionConfig(num_heads=4, num_kv_heads=1),
        moe=MoeConfig(num_experts=4, experts_per_token=2, hidden_dim=256),
        compute_dtype="float32",
    )
    decoder = Decoder.of(Transformer(config, rngs=nnx.Rngs(0)))
    sizes = EngineConfig(slots=slots, max_queue=10_000, prefill_chunk=128, max_length=PROMPT + LONGEST)
    return Engine(decoder, tokenizer, sizes)


def drawn_lengths(generator: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Of each kind as many lengths as there are requests."""
    spread = np.exp(generator.uniform(np.log(SHORTEST), np.log(LONGEST), count))
    return {"spread": np.rint(spread).astype(int), "uniform": generator.integers(SHORTEST, LONGEST + 1, count)}


def request_of(generator: np.random.Generator, length: int) -> EngineRequest:
    prompt = generator.integers(16, 1024, PROMPT).tolist()
    return EngineRequest(prompt, SamplingConfig(max_new_tokens=length, ignore_end_of_text=True))


def serve(engine: Engine, requests: list[EngineRequest], size: int) -> Served:
    """`size` requests at a time, the next when all of them have ended."""
    before, started, cpu = engine.metrics(), time.perf_counter(), time.process_time()
    for start in range(0, len(requests), size):
        for request in requests[start : start + size]:
            engine.submit(request)
        while engine.step():
            pass
    after = engine.metrics()
    return Served(
        tokens=after.new_tokens - before.new_tokens,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu,
        decode_steps=after.decode_steps - before.decode_steps,
    )


def compared(static: Served, continuous: Served, lengths: np.ndarray, slots: int) -> dict:
    assert static.tokens == continuous.tokens == lengths.sum()
    sample = Lengths(sample=tuple(lengths.tolist()))
    return {
        "static": dataclasses.asdict(static),
        "continuous": dataclasses.asdict(continuous),
        "gain": static.seconds / continuous.seconds,
        "gain_by_cpu_seconds": static.cpu_seconds / continuous.cpu_seconds,
        "gain_in_steps": static.decode_steps / continuous.decode_steps,
        "formula": continuous_batching_gain(sample, slots),
    }


def arriving(engine: Engine, requests: list[EngineRequest], rate: float, generator: np.random.Generator) -> dict:
    """`rate` requests a second on average; seconds that their callers wait."""
    times = np.cumsum(generator.exponential(1 / rate, len(requests)))
    waiting = list(zip(times.tolist(), requests, strict=True))
    running: list[tuple[float, list[float], RequestHandle]] = []
    first, between, started = [], [], time.perf_counter()
    while waiting or running:
        now = time.perf_counter() - started
        while waiting and waiting[0][0] <= now:
            due, request = waiting.pop(0)
            running.append((due, [], engine.submit(request)))
        if not engine.step() and waiting:
            time.sleep(max(0.0, min(0.01, waiting[0][0] - now)))
        now = time.perf_counter() - started
        for due, told, handle in running:
            if handle.take():
                (between if told else first).append(now - (told[-1] if told else due))
                told.append(now)
        running = [item for item in running if not item[2].done]
    return {"requests_per_second": rate, "first_token": percentiles(first), "between_chunks": percentiles(between)}


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{rank}": float(np.percentile(seconds, rank)) for rank in PERCENTILES}


def machine() -> str:
    device = jax.devices()[0]
    return f"{platform.machine()}, {device.device_kind}, jax {jax.__version__}, {datetime.date.today()}"


def text_of(document: dict, load: float) -> str:
    lines = [document["machine"], f"{document['requests']} requests of {SHORTEST} to {LONGEST} tokens, "]
    lines[1] += f"{document['slots']} slots"
    lines.append(f"{'lengths':10}{'static':>12}{'continuous':>12}{'gain':>8}{'CPU':>8}{'steps':>8}{'formula':>9}")
    for kind, row in document["batching"].items():
        rates = [row[way]["tokens"] / row[way]["seconds"] for way in ("static", "continuous")]
        gains = [row[name] for name in ("gain", "gain_by_cpu_seconds", "gain_in_steps", "formula")]
        rates_text = "".join(f"{rate:8,.0f} t/s" for rate in rates)
        lines.append(f"{kind:10}{rates_text}" + "".join(f"{gain:8.2f}" for gain in gains))
    arrivals = document["arrivals"]
    lines.append(f"Poisson arrivals, {arrivals['requests_per_second']:.2f} requests/s, {load:.0%} of the rate above")
    for name in ("first_token", "between_chunks"):
        ranks = "  ".join(f"{rank} {1000 * seconds:8.1f} ms" for rank, seconds in arrivals[name].items())
        lines.append(f"{name.replace('_', ' '):16}{ranks}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
