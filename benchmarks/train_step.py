"""Speed of the whole training step (forward, backward, clipping, AdamW) against this machine's own matrix-product rate.

    python benchmarks/train_step.py [--dtypes float32,bfloat16] [--dispatch capacity,dropless] [--steps 7] [--json]

Four layers, D 256, 8 heads, 1 KV head, SwiGLU F 1024, 8 experts top-2, vocabulary 8192, T 512, B 8, random tokens.
Every row is a process of its own. Tokens per CPU-second (median over steps of user + system time) hold on a busy
machine, tokens per second do not. `gemm_fraction` is the step's model FLOPs (matrix products with the head, without
the attention core, nothing for padding of experts) per CPU-second over that of one large float32 product, or of
bfloat16 operands with float32 accumulation, in the same process. Huge pages (`--no-huge-pages` for without) save the
kernel half a million page faults a step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

LENGTH, ROWS, VOCAB = 512, 8, 8192
CAPACITY_FACTORS = {"capacity": 1.25, "dropless": None}
GEMM_SIZE = (4096, 1024, 1024)
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--dispatch", default="capacity,dropless")
    parser.add_argument("--steps", type=int, default=7, help="steps to time, at least 5")
    parser.add_argument("--no-huge-pages", action="store_true", help="leave the allocator as it is")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.dtypes, arguments.dispatch, max(arguments.steps, 5))))
        return
    pairs = [(dtype, name) for dtype in arguments.dtypes.split(",") for name in arguments.dispatch.split(",")]
    rows = [run_row(dtype, name, arguments) for dtype, name in pairs]
    if arguments.json:
        print(json.dumps(describe() | {"rows": rows}))
        return
    for row in rows:
        print(
            "  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{value}" for name, value in row.items())
        )


def run_row(dtype: str, dispatch: str, arguments: argparse.Namespace) -> dict:
    """One row, measured in a fresh process so that peak memory and compilation are its own."""
    command = [sys.executable, __file__, "--row", "--dtypes", dtype, "--dispatch", dispatch]
    environment = os.environ | ({} if arguments.no_huge_pages else HUGE_PAGES)
    result = subprocess.run(
        [*command, "--steps", str(arguments.steps)], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        sys.exit(f"{dtype} {dispatch} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1]) | {"huge_pages": not arguments.no_huge_pages}


def describe() -> dict:
    """The machine and the versions that the rows were measured with."""
    import flax
    import jax
    import jaxlib
    import optax

    versions = {module.__name__: module.__version__ for module in (jax, jaxlib, flax, optax)}
    return {
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": versions | {"python": platform.python_version()},
        "tokens_per_step": ROWS * LENGTH,
    }


def measure(dtype: str, dispatch: str, num_steps: int) -> dict:
    """Compiles the trainer's own step once, runs it, and compares with the machine's matrix-product rate."""
    import jax
    import jax.numpy as jnp

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
    step = make_step(run, 1, abstract).lower(at, *inputs).compile()
    compile_seconds = time.perf_counter() - started

    times = []
    for _ in range(num_steps + 1):
        before = cpu_and_wall()
        at, metrics = jax.block_until_ready(step(at, *inputs))
        times.append([after - start for after, start in zip(cpu_and_wall(), before, strict=True)])
    cpu_seconds, wall_seconds = (statistics.median(column) for column in zip(*times[1:], strict=True))
    tokens = ROWS * LENGTH
    gemm_flops_per_cpu_second = gemm_rate(dtype)
    return {
        "dtype": dtype,
        "dispatch": dispatch,
        "tokens_per_cpu_second": tokens / cpu_seconds,
        "tokens_per_second": tokens / wall_seconds,
        "gemm_fraction": tokens * train_flops_per_token(run.model) / cpu_seconds / gemm_flops_per_cpu_second,
        "gemm_flops_per_cpu_second": gemm_flops_per_cpu_second,
        "compile_seconds": compile_seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
        "dropped_fraction": float(metrics.sums.moe.dropped.sum() / metrics.sums.moe.load_E.sum()),
        "loss": float(metrics.sums.cross_entropy / metrics.counts.target_weight),
    }


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


def random_batch():
    """One microbatch of full rows of uniformly random tokens."""
    import jax
    import jax.numpy as jnp

    from gpt4moe.types import Batch

    tokens, targets = jax.random.randint(jax.random.key(0), (2, 1, ROWS, LENGTH), 0, VOCAB)
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


def cpu_and_wall() -> tuple[float, float]:
    """User plus system seconds of this process (finer than os.times, same clock), and the wall clock's."""
    return time.process_time(), time.perf_counter()


if __name__ == "__main__":
    main()
