"""Speed of the whole training step (forward, backward, clipping, AdamW) against this machine's own matrix-product rate.

    python benchmarks/train_step.py [--dtypes float32,bfloat16] [--dispatch capacity,dropless] [--steps 7] [--json]
    python benchmarks/train_step.py --peers [--rounds 4] [--peer-seconds 120] [--json]

Four layers, D 256, 8 heads, 1 KV head, SwiGLU F 1024, 8 experts top-2, vocabulary 8192, T 512, B 8, random tokens.
Every row is a process of its own. Tokens per CPU-second (median over steps of user + system time) hold on a busy
machine, tokens per second do not. `gemm_fraction` is the step's model FLOPs (matrix products with the head, without
the attention core, nothing for padding of experts) per CPU-second over that of one large float32 product, or of
bfloat16 operands with float32 accumulation, in the same process. Huge pages (`--no-huge-pages` for without) save the
kernel half a million page faults a step.

`--peers` sets Hugging Face transformers on torch beside it (extra `[bench]`; benchmarks/peer_transformers.py): the same
sizes and tokens, each of its experts implementations, processes stepping by turns, never two at a time. The ratio is
the median over timed steps of its seconds over ours, of the fastest of its rows. Leave the machine to it: torch's
threads wait for each other and fall far behind beside other work.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import re
import resource
import statistics
import sys
import time

import peer_transformers
from turns import Process, serve

LENGTH, ROWS, VOCAB = 512, 8, 8192
CAPACITY_FACTORS = {"capacity": 1.25, "dropless": None}
GEMM_SIZE = (4096, 1024, 1024)
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
SIZE_TOLERANCE = 0.01
STEPS_A_TURN = 2


def main() -> None:
    arguments = parse()
    if arguments.row:
        measure(arguments.dtypes, arguments.dispatch)
        return
    if arguments.peers and (missing := peer_transformers.missing()):
        print(f"--peers needs {missing}; pip install -e '.[bench]'", file=sys.stderr)
        sys.exit(2)
    document = describe(arguments.peers) | {"rows": [], "ratios": []}
    for dtype in arguments.dtypes.split(","):
        rows, ratios = beside_peers(dtype, arguments) if arguments.peers else (alone(dtype, arguments), [])
        document["rows"] += rows
        document["ratios"] += ratios
    print(json.dumps(document) if arguments.json else table(document))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--dispatch", default="capacity,dropless")
    parser.add_argument("--steps", type=int, default=7, help="steps to time, at least 5")
    parser.add_argument("--no-huge-pages", action="store_true", help="leave the allocator as it is")
    parser.add_argument("--peers", action="store_true", help="transformers on torch beside it, by turns")
    parser.add_argument("--rounds", type=int, default=4, help="turns of every row with --peers")
    parser.add_argument("--peer-seconds", type=float, default=120, help="what a row of a peer may take")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def alone(dtype: str, arguments: argparse.Namespace) -> list[dict]:
    """Our rows, one after the other."""
    rows = []
    for dispatch in arguments.dispatch.split(","):
        process = our_process(dtype, dispatch, arguments)
        process.turn(max(arguments.steps, 5))
        process.finish()
        rows.append(our_row(dtype, dispatch, process))
    return rows


def our_process(dtype: str, dispatch: str, arguments: argparse.Namespace) -> Process:
    """A fresh process for a row, so that peak memory and compilation are its own."""
    command = [sys.executable, __file__, "--row", "--dtypes", dtype, "--dispatch", dispatch]
    return Process(command, environment=allocator(arguments))


def allocator(arguments: argparse.Namespace) -> dict[str, str]:
    """The environment of every row, ours and theirs."""
    return {} if arguments.no_huge_pages else HUGE_PAGES


def our_row(dtype: str, dispatch: str, process: Process) -> dict:
    """The row of a process that has come to its end; ends the run where it failed."""
    if process.ended:
        sys.exit(f"{dtype} {dispatch} failed:\n{process.errors()}")
    return row_of({"dtype": dtype, "dispatch": dispatch}, process)


def row_of(names: dict, process: Process) -> dict:
    """`names`, rates, and what the process said of itself; what it did not come to is None."""
    rates, facts = process.rates(ROWS * LENGTH), process.facts
    rate, flops = rates["tokens_per_cpu_second"], facts.get("train_flops_per_token")
    fraction = rate * flops / facts["gemm_flops_per_cpu_second"] if rate and flops else None
    steps = {"steps": len(process.steps()), "warm": bool(process.timed), "ended": process.ended}
    return names | rates | {"gemm_fraction": fraction} | facts | steps


def beside_peers(dtype: str, arguments: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Our rows and theirs, every process with a turn a round, and our ratios to the fastest of theirs."""
    ours = {name: our_process(dtype, name, arguments) for name in arguments.dispatch.split(",")}
    task, theirs = peer_task(dtype), {}
    for variant in peer_transformers.variants(dtype):
        if not too_large(variant):
            budget = arguments.peer_seconds
            theirs[variant] = Process(variant.command(), environment=allocator(arguments), task=task, seconds=budget)
    processes = [*ours.values(), *theirs.values()]
    for _ in range(max(arguments.rounds, 1)):
        for process in processes:
            process.turn(STEPS_A_TURN)
    for process in processes:
        process.finish()
    rows = [our_row(dtype, name, process) for name, process in ours.items()]
    rows += [peer_row(variant, theirs.get(variant)) for variant in peer_transformers.variants(dtype)]
    check_sizes(rows)
    return rows, ratios_of(dtype, ours, theirs)


def peer_task(dtype: str) -> str:
    """What a process of a peer is to train: sizes, optimizer, tokens."""
    run = run_config(dtype, None)
    model = dataclasses.asdict(run.model) | {"gemm": GEMM_SIZE}
    tokens, targets = random_tokens()
    return json.dumps(
        {"model": model, "optimizer": dataclasses.asdict(run.optimizer), "tokens": tokens, "targets": targets}
    )


def too_large(variant: peer_transformers.Variant) -> str | None:
    """Why a variant cannot run on this machine, None where it can."""
    needed = peer_transformers.copied_bytes(
        dataclasses.asdict(run_config("float32", None).model), ROWS * LENGTH, variant
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"copies {needed / 1e9:.0f} GB of experts, {memory / 1e9:.0f} GB here" if needed > memory else None


def peer_row(variant: peer_transformers.Variant, process: Process | None) -> dict:
    """The row of a peer, also of one that was not started, failed, or was stopped."""
    names = {"dtype": variant.dtype, "dispatch": variant.name, "weights": variant.weights}
    if process is None:
        empty = dict.fromkeys(("tokens_per_cpu_second", "tokens_per_second", "gemm_fraction"))
        return names | empty | {"steps": 0, "ended": too_large(variant)}
    return row_of(names, process)


def check_sizes(rows: list[dict]) -> None:
    """Refuses to compare models that differ in parameters or FLOPs."""
    for key in ("num_parameters", "train_flops_per_token"):
        for row in rows:
            if key in row and abs(row[key] / rows[0][key] - 1) > SIZE_TOLERANCE:
                sys.exit(f"{row['dispatch']} has {key} {row[key]:,.0f}, {rows[0]['dispatch']} {rows[0][key]:,.0f}")


def ratios_of(dtype: str, ours: dict[str, Process], theirs: dict[peer_transformers.Variant, Process]) -> list[dict]:
    """For each of our rows, its speed over that of the fastest peer: medians over pairs of steps."""
    stepped = {variant: process for variant, process in theirs.items() if process.steps()}
    if not stepped:
        return []
    fastest, peer = max(stepped.items(), key=lambda item: item[1].rates(ROWS * LENGTH)["tokens_per_second"])
    ratios = []
    for dispatch, process in ours.items():
        rounds = zip(process.steps(), peer.steps(), strict=False)  # a peer may have been stopped
        cpu, wall = zip(*[[b / a for a, b in zip(*pair, strict=True)] for pair in rounds], strict=True)
        ratio = {"tokens_per_cpu_second": statistics.median(cpu), "tokens_per_second": statistics.median(wall)}
        ratios.append({"dtype": dtype, "dispatch": dispatch, "peer": fastest.name} | ratio)
    return ratios


def table(document: dict) -> str:
    """The rows, and under them the ratios, for reading."""
    columns = {
        "dtype": "",
        "dispatch": "",
        "tokens_per_second": ",.0f",
        "tokens_per_cpu_second": ",.0f",
        "gemm_fraction": ".3f",
        "steps": "d",
        "compile_seconds": ".1f",
        "peak_rss_bytes": ".3g",
        "dropped_fraction": ".3f",
        "loss": ".3f",
        "ended": "",
    }
    cells = [list(columns)]
    for row in document["rows"]:
        values = [(row.get(name), form) for name, form in columns.items()]
        cells.append(["-" if value is None else format(value, form) for value, form in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    for ratio in document["ratios"]:
        wall, cpu = ratio["tokens_per_second"], ratio["tokens_per_cpu_second"]
        what = f"{ratio['dtype']} {ratio['dispatch']} over {ratio['peer']}"
        lines.append(f"{what}: {wall:.2f}x tokens per second, {cpu:.2f}x tokens per CPU-second")
    return "\n".join(lines)


def describe(peers: bool) -> dict:
    """The machine and the versions that the rows were measured with."""
    packages = ["jax", "jaxlib", "flax", "optax", *(peer_transformers.NEEDS if peers else ())]
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "date": datetime.date.today().isoformat(),
        "device": "cpu",
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": versions | {"python": platform.python_version()},
        "tokens_per_step": ROWS * LENGTH,
    }


def processor() -> str:
    """Name of the processor and which of the instructions that decide about bfloat16 it has, where Linux says."""
    information = pathlib.Path("/proc/cpuinfo")
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", information.read_text(), re.M)) if information.exists() else {}
    flags = sorted({"avx512f", "avx512_bf16", "amx_bf16"} & set(fields.get("flags", "").split()))
    return " ".join([fields.get("model name") or platform.machine(), *flags])


def measure(dtype: str, dispatch: str) -> None:
    """Compiles the trainer's own step once, runs it as it is asked, and compares with this machine's products."""
    import jax
    import jax.numpy as jnp

    from gpt4moe.accounting import parameters
    from gpt4moe.accounting.flops import train_flops_per_token
    from gpt4moe.parallel.mesh import make_mesh
    from gpt4moe.train import state
    from gpt4moe.train.step import make_step

    run = run_config(dtype, CAPACITY_FACTORS[dispatch])
    mesh = make_mesh(run.mesh, jax.devices()[:1])
    abstract = state.abstract_state(run, mesh)
    at, batch = state.create_state(run, abstract), random_batch()
    inputs = (batch, jnp.int32(1), jnp.float32(0))
    started = time.perf_counter()
    program = make_step(run, 1, abstract).lower(at, *inputs).compile()
    compile_seconds = time.perf_counter() - started
    metrics = None

    def step() -> None:
        nonlocal at, metrics
        at, metrics = jax.block_until_ready(program(at, *inputs))

    def finish() -> dict:
        return {
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "dropped_fraction": float(metrics.sums.moe.dropped.sum() / metrics.sums.moe.load_E.sum()),
            "loss": float(metrics.sums.cross_entropy / metrics.counts.target_weight),
        }

    ready = {
        "num_parameters": parameters.count(run.model).total,
        "train_flops_per_token": train_flops_per_token(run.model),
        "gemm_flops_per_cpu_second": gemm_rate(dtype),
        "compile_seconds": compile_seconds,
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }
    serve(ready, step, finish)


def run_config(dtype: str, capacity_factor: float | None):
    """The configuration of the claim, batch and optimizer included."""
    from gpt4moe.config.attention import AttentionConfig
    from gpt4moe.config.data import DataConfig, SourceConfig
    from gpt4moe.config.model import ModelConfig
    from gpt4moe.config.moe import MoeConfig
    from gpt4moe.config.optimizer import OptimizerConfig
    from gpt4moe.config.run import RunConfig
    from gpt4moe.config.train import TrainConfig

    model = ModelConfig(
        num_layers=4,
        model_dim=256,
        vocab_size=VOCAB,
        context_length=LENGTH,
        attention=AttentionConfig(num_heads=8, num_kv_heads=1),
        moe=MoeConfig(num_experts=8, experts_per_token=2, hidden_dim=1024, capacity_factor=capacity_factor),
        compute_dtype=dtype,
    )
    data = DataConfig(sources=(SourceConfig("random", paths=("unused",)),), sequence_length=LENGTH)
    tokens = ROWS * LENGTH
    train = TrainConfig(steps=100, token_budget=100 * tokens, batch_tokens=tokens, seed=0, checkpoint_every=100)
    return RunConfig(model, data, OptimizerConfig(learning_rate=3e-4), train)


def random_tokens() -> list[list[list[int]]]:
    """Uniformly random tokens and targets, [2, B, T], the same for every row."""
    draw = random.Random(0)
    return [[draw.choices(range(VOCAB), k=LENGTH) for _ in range(ROWS)] for _ in range(2)]


def random_batch():
    """One microbatch of full rows of them."""
    import jax.numpy as jnp

    from gpt4moe.types import Batch

    tokens, targets = jnp.array(random_tokens(), jnp.int32)[:, None]
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    return Batch(tokens, targets, ones.astype(jnp.float32), positions, ones, jnp.zeros_like(tokens))


def gemm_rate(dtype: str, repeats: int = 20) -> float:
    """FLOPs per CPU-second of one large product in `dtype` with float32 accumulation, the median of `repeats`."""
    import jax
    import jax.numpy as jnp

    rows, inner, columns = GEMM_SIZE
    a, b = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
    multiply = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    multiply(a, b).block_until_ready()
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        multiply(a, b).block_until_ready()
        seconds.append(time.process_time() - started)
    return 2 * rows * inner * columns / statistics.median(seconds)


if __name__ == "__main__":
    main()
