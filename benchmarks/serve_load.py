"""The HTTP server under load: many callers who stream at once, each text compared with what it was alone.

    python benchmarks/serve_load.py [--clients 64] [--seconds 60] [--slots 16] [--json]

Needs httpx2 (extra [test]) and /proc. A small model (random weights, float32, deterministic engine) is behind
`gpt4moe.serve` in a process of its own.
Every request is answered once alone; then each client streams one after another, all at once, for so many seconds,
beside a few callers that leave in the middle of their streams. Counted: errors, texts that differ from those of the
lone run, memory of the server at the start, in the middle and at the end, tokens a second, seconds to the first text
and from text to text as the clients see them (half and 99 % are faster). In the end the server is told to stop while
all stream: what runs must end whole, and the process with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import datetime
import json
import pathlib
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator

import httpx2
import numpy as np

MODEL, PAGE_BYTES = "small", 4096
CONTEXT, SHORTEST, LONGEST = 512, 8, 128
LEAVERS, PERCENTILES = 4, (50, 99)
TIMEOUT = httpx2.Timeout(300)


@dataclasses.dataclass
class Tally:
    """What the clients saw."""

    errors: list[str] = dataclasses.field(default_factory=list)
    different: int = 0
    answers: int = 0
    tokens: int = 0
    left: int = 0
    first: list[float] = dataclasses.field(default_factory=list)
    between: list[float] = dataclasses.field(default_factory=list)


def main() -> None:
    args = parsed()
    if args.as_server:
        serve(args.slots)
        return
    document = {"machine": f"{platform.processor() or platform.machine()}", "date": str(datetime.date.today())}
    document |= {name: getattr(args, name) for name in ("clients", "seconds", "slots")}
    with started(args.slots) as (process, url):
        document |= asyncio.run(load(process, url, args.clients, args.seconds))
        document["exit_code"] = process.wait(timeout=300)
    print(json.dumps(document, indent=2) if args.json else text_of(document))
    good = not document["errors"] and not document["different"] and document["exit_code"] == 0
    sys.exit(0 if good and not document["cut_off"] else 1)


def parsed() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--as_server", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def serve(slots: int) -> None:
    """The server's process: says its address on standard output."""
    import jax
    from flax import nnx

    from gpt4moe.config.attention import AttentionConfig
    from gpt4moe.config.engine import EngineConfig
    from gpt4moe.config.model import ModelConfig
    from gpt4moe.config.moe import MoeConfig
    from gpt4moe.config.serve import ServeConfig
    from gpt4moe.data.tokenizer import byte_tokenizer
    from gpt4moe.infer.decoder import Decoder
    from gpt4moe.infer.engine.engine import Engine
    from gpt4moe.model.transformer import Transformer
    from gpt4moe.serve import server
    from gpt4moe.serve.chat_template import find_template
    from gpt4moe.serve.service import Service

    tokenizer = byte_tokenizer()
    attention, moe = AttentionConfig(num_heads=4, num_kv_heads=1), MoeConfig(8, 2, 256)
    sizes = {"num_layers": 4, "model_dim": 128, "vocab_size": tokenizer.vocab_size, "context_length": CONTEXT}
    config = ModelConfig(**sizes, attention=attention, moe=moe, compute_dtype="float32")
    definition = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]
    params = jax.jit(lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(0)))[1])()
    engine = Engine(Decoder.of(nnx.merge(definition, params)), tokenizer, EngineConfig(slots, deterministic=True))
    engine.warm_up()
    settings = ServeConfig(port=0, model_name=MODEL)
    with server.bind(settings) as bound:
        print(server.address(bound), flush=True)
        template = find_template(None, None, *["<|endoftext|>"] * 2)
        server.serve(Service(engine, tokenizer, settings, template), bound, lambda line: None)


@contextlib.contextmanager
def started(slots: int) -> Iterator[tuple[subprocess.Popen, str]]:
    words = [sys.executable, __file__, "--as_server", f"--slots={slots}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


async def load(process: subprocess.Popen, url: str, clients: int, seconds: float) -> dict:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits) as session:
        while not await is_up(session):
            await asyncio.sleep(0.1)
        requests = [request_of(number) for number in range(clients)]
        alone = [await whole(session, request, Tally()) for request in requests]
        tally, memory = Tally(), [megabytes(process.pid)]
        began = time.perf_counter()
        streams = [client(session, requests, alone, number, began + seconds, tally) for number in range(clients)]
        leaving = [leaver(session, requests[number], began + seconds, tally) for number in range(LEAVERS)]
        await asyncio.gather(*streams, *leaving, halfway(process.pid, seconds, memory))
        took = time.perf_counter() - began
        memory.append(megabytes(process.pid))
        idle = await wait_until_idle(session)
        ended = await stopped(process, session, requests, alone)
    return seen(tally, memory, took) | idle | ended


async def is_up(session: httpx2.AsyncClient) -> bool:
    with contextlib.suppress(httpx2.ConnectError):
        return (await session.get("/healthz")).status_code == 200
    return False


def request_of(number: int) -> dict:
    """Prompts, lengths and settings that are all different, greedy and drawn."""
    generator = random.Random(number)
    prompt = "".join(generator.choices("abcdefghij (),.\n", k=generator.randint(1, 200)))
    tokens = round(SHORTEST * (LONGEST / SHORTEST) ** generator.random())
    temperature = generator.choice([0.0, 0.7, 1.0, 1.3])
    sampling = {"max_tokens": tokens, "temperature": temperature, "seed": number, "ignore_eos": True}
    return {"model": MODEL, "prompt": prompt, "stream": True, "logprobs": 0, **sampling}


async def events(session: httpx2.AsyncClient, request: dict) -> AsyncIterator[dict]:
    """The chunks of a stream; raises where it does not end as it should."""
    async with session.stream("POST", "/v1/completions", json=request) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return
            if line:
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                yield chunk
    raise RuntimeError("the stream was cut off")


async def whole(session: httpx2.AsyncClient, request: dict, tally: Tally) -> str:
    """The text of a stream, whose times go into the tally."""
    last = time.perf_counter()
    text = ""
    async for chunk in events(session, request):
        now = time.perf_counter()
        (tally.between if text else tally.first).append(now - last)
        last, (choice,) = now, chunk["choices"]
        text += choice["text"]
        tally.tokens += len(choice["logprobs"]["tokens"])
    tally.answers += 1
    return text


async def client(session: httpx2.AsyncClient, requests: list, alone: list, number: int, until: float, tally: Tally):
    """One caller: a request after another, beginning with its own."""
    while time.perf_counter() < until:
        place = number % len(requests)
        try:
            tally.different += await whole(session, requests[place], tally) != alone[place]
        except (httpx2.HTTPError, RuntimeError) as error:
            tally.errors.append(f"{type(error).__name__}: {error}")
        number += 1


async def leaver(session: httpx2.AsyncClient, request: dict, until: float, tally: Tally) -> None:
    """One caller that asks for much and leaves after the first of it."""
    while time.perf_counter() < until:
        with contextlib.suppress(httpx2.HTTPError):
            async for _ in events(session, request | {"max_tokens": 250, "n": 2}):
                break
            tally.left += 1
        await asyncio.sleep(0.5)


async def halfway(pid: int, seconds: float, memory: list[float]) -> None:
    await asyncio.sleep(seconds / 2)
    memory.append(megabytes(pid))


async def wait_until_idle(session: httpx2.AsyncClient) -> dict:
    """What the server itself counts, once nothing runs any more."""
    while True:
        lines = (await session.get("/metrics")).text.splitlines()
        counts = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        if all(float(counts[f"gpt4moe_{name}"]) == 0 for name in ("running", "queued", "pages_used")):
            break
        await asyncio.sleep(0.1)
    late, cancelled = (
        float(counts[name])
        for name in ("gpt4moe_late_compilations_total", 'gpt4moe_finished_total{reason="cancelled"}')
    )
    return {"late_compilations": int(late), "cancelled": int(cancelled)}


async def stopped(process: subprocess.Popen, session: httpx2.AsyncClient, requests: list, alone: list) -> dict:
    """Tells the server to stop while all stream; how many streams were cut off or differ."""
    tally = Tally()
    streams = [asyncio.create_task(whole(session, request, tally)) for request in requests]
    while len(tally.first) < len(requests) / 4:
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    texts = await asyncio.gather(*streams, return_exceptions=True)
    return {"cut_off": sum(text != expected for text, expected in zip(texts, alone, strict=True))}


def megabytes(pid: int) -> float:
    """Resident memory of a process."""
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES / 1e6


def seen(tally: Tally, memory: list[float], took: float) -> dict:
    def percentiles(values: list[float]) -> dict[str, float]:
        return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}

    return {
        "answers": tally.answers,
        "left": tally.left,
        "errors": len(tally.errors),
        "first_errors": tally.errors[:3],
        "different": tally.different,
        "server_megabytes": dict(zip(("start", "middle", "end"), memory, strict=True)),
        "tokens_per_second": tally.tokens / took,
        "first_text_seconds": percentiles(tally.first),
        "between_texts_seconds": percentiles(tally.between),
    }


def text_of(document: dict) -> str:
    first, between = document["first_text_seconds"], document["between_texts_seconds"]
    memory = ", ".join(f"{value:.0f} MB {when}" for when, value in document["server_megabytes"].items())
    clients, errors = document["clients"], document["errors"]
    lines = {
        "load": f"{clients} clients, {document['slots']} slots, {document['seconds']:g} s on {document['machine']}",
        "answers": f"{document['answers']:,}, {errors} errors {document['first_errors'] or ''}",
        "texts": f"{document['different']} differ from the lone run",
        "left": f"{document['left']} callers; {document['cancelled']} continuations cancelled",
        "memory": memory,
        "speed": f"{document['tokens_per_second']:,.0f} tokens/s; {document['late_compilations']} late compilations",
        "first": f"p50 {first['p50']:.3f} s, p99 {first['p99']:.3f} s",
        "between": f"p50 {between['p50'] * 1e3:.0f} ms, p99 {between['p99'] * 1e3:.0f} ms",
        "SIGTERM": f"{document['cut_off']} of {clients} streams cut off, exit code {document['exit_code']}",
    }
    return "\n".join(f"{name:8} {said}" for name, said in lines.items())


if __name__ == "__main__":
    main()
