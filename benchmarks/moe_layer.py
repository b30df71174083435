"""Speed and memory of one mixture-of-experts layer beside a dense feed-forward of as many active FLOPs, in one run.

    python benchmarks/moe_layer.py [--experts 8,16,64] [--dtypes float32,bfloat16] [--pairs 7] [--baselines] [--json]
    python benchmarks/moe_layer.py --backend gpu        # T 16384, D 4096, F 14336, E 8, bfloat16

The routing is given, so that dispatch, experts and combine are measured, SwiGLU, K 2. `uneven` routing is top-k of
random logits with a bias of deviation 0.7 an expert, as a router leans; `balanced` takes experts in turn. Ways:

  dropless, capacity  ours; capacity at factor 1.25
  ragged_dot          sorted tokens through `jax.lax.ragged_dot`, which off a TPU works on all experts (--baselines)
  one-hot             GShard's dispatch and combine by einsum over [U, E, C], factor 1.25 (--baselines)

Each way takes turns with the dense layer, `--pairs` times; a ratio is the median over pairs of the dense layer's
seconds over the way's (1: as fast), by CPU seconds on a CPU, which hold on a busy machine, and by wall seconds on
others. `of own` counts the places that the way multiplies, empty ones included, as its arithmetic. Memory is what XLA
plans for temporaries, over the dense layer's.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gpt4moe.config.moe import MoeConfig
from gpt4moe.model.experts import ExpertWeights, apply_experts
from gpt4moe.model.layers import activate, matmul
from gpt4moe.model.router import Routing

SIZES = {"cpu": (4096, 256, 1024), "gpu": (16384, 4096, 14336), "tpu": (16384, 4096, 14336)}
CHOICES, FACTOR, LEAN = 2, 1.25, 0.7
SLOW_PAIRS = 1  # the baselines take up to a minute a call


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer to be measured: tokens T, width D, hidden F, experts E, dtype, routing, whether with gradients."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    dtype: str
    routing: str
    backward: bool


def main() -> None:
    arguments = parse()
    cases = [
        Case(arguments.tokens, arguments.dim, arguments.hidden, int(experts), dtype, routing, backward)
        for dtype, experts, routing, backward in itertools.product(
            arguments.dtypes.split(","), arguments.experts.split(","), ("uneven", "balanced"), (False, True)
        )
    ]
    rows = []
    for case in cases:
        new = rows_of(case, arguments)
        rows += new
        if not arguments.json:
            print("\n".join(lines(new, header=case is cases[0])), flush=True)
    if arguments.json:
        print(json.dumps(describe() | {"rows": rows}))


def parse() -> argparse.Namespace:
    """The command line; sizes depend on the backend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=SIZES, default=jax.default_backend(), help="(default: the one in use)")
    for name in ("tokens", "dim", "hidden"):
        parser.add_argument(f"--{name}", type=int, help="(default: of the backend)")
    parser.add_argument("--experts", help="(default: 8,16,64; 8 on an accelerator)")
    parser.add_argument("--dtypes", help="(default: float32,bfloat16; bfloat16 on an accelerator)")
    parser.add_argument("--product", help="name of a grouped product (default: the fastest)")
    parser.add_argument("--pairs", type=int, default=7, help="turns of each way with the dense layer (default: 7)")
    parser.add_argument("--baselines", action="store_true", help="also ragged_dot and one-hot, which are slow on a CPU")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    if arguments.backend != jax.default_backend():
        parser.error(f"--backend={arguments.backend}: JAX sees {jax.default_backend()} here; install its extra")
    for name, default in zip(("tokens", "dim", "hidden"), SIZES[arguments.backend], strict=True):
        setattr(arguments, name, getattr(arguments, name) or default)
    on_cpu = arguments.backend == "cpu"
    arguments.experts = arguments.experts or ("8,16,64" if on_cpu else "8")
    arguments.dtypes = arguments.dtypes or ("float32,bfloat16" if on_cpu else "bfloat16")
    return arguments


def rows_of(case: Case, arguments: argparse.Namespace) -> list[dict]:
    """One row for each way through the layer."""
    x_TD, weights, routing = inputs(case)
    dense = compiled(case, dense_layer, (x_TD, dense_weights(case)))
    config = MoeConfig(case.experts, CHOICES, case.hidden, grouped_product=arguments.product)
    roomy = dataclasses.replace(config, capacity_factor=FACTOR)
    places = case.tokens * CHOICES
    room = case.experts * roomy.expert_capacity(case.tokens)
    ways = {
        "dropless": (functools.partial(ours, config, False), places, arguments.pairs),
        "capacity": (functools.partial(ours, roomy, True), room, arguments.pairs),
    }
    if arguments.baselines:
        ways["ragged_dot"] = (ragged, places, SLOW_PAIRS)
        ways["one-hot"] = (functools.partial(one_hot, roomy), room, SLOW_PAIRS)
    rows = []
    for name, (layer, multiplied, pairs) in ways.items():
        way = compiled(case, layer, (x_TD, weights, routing.gates_UK[0]), routing)
        mine, theirs = by_turns((way, dense), pairs)
        pick = 0 if arguments.backend == "cpu" else 1
        ratio = statistics.median(b[pick] / a[pick] for a, b in zip(mine, theirs, strict=True))
        seconds = statistics.median(pair[1] for pair in mine)
        flops = 2 * 3 * case.dim * case.hidden * places * (3 if case.backward else 1)
        rows.append(
            dataclasses.asdict(case)
            | {
                "way": name,
                "ms": 1e3 * seconds,
                "dense_ms": 1e3 * statistics.median(pair[1] for pair in theirs),
                "ratio_to_dense": ratio,
                "ratio_of_own_arithmetic": ratio * multiplied / places,
                "gflop_per_second": flops / seconds / 1e9,
                "dense_gflop_per_second": flops / statistics.median(pair[1] for pair in theirs) / 1e9,
                "temporary_bytes": way.temporary,
                "temporary_over_dense": way.temporary / max(dense.temporary, 1),
            }
        )
    return rows


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled call with its operands, and the bytes that XLA plans for its temporaries."""

    run: Callable[[], object]
    temporary: int


def compiled(case: Case, layer: Callable, operands: tuple, *fixed: object) -> Program:
    """`layer(*operands, *fixed)`, or the gradients of its output's products with a fixed one to all operands."""
    dy_TD = jax.random.normal(jax.random.key(9), (case.tokens, case.dim)).astype(case.dtype)

    def forward(dy_TD, fixed, *operands):
        return layer(*operands, *fixed)

    def backward(dy_TD, fixed, *operands):
        def total(*operands):
            return jnp.vdot(layer(*operands, *fixed).astype(jnp.float32), dy_TD.astype(jnp.float32))

        return jax.grad(total, tuple(range(len(operands))))(*operands)

    function = jax.jit(backward if case.backward else forward)
    program = function.lower(dy_TD, fixed, *operands).compile()
    return Program(lambda: program(dy_TD, fixed, *operands), program.memory_analysis().temp_size_in_bytes)


def by_turns(programs: tuple[Program, Program], pairs: int) -> list[list[tuple[float, float]]]:
    """(CPU, wall) seconds of each program, one after the other `pairs` times, after one round that does not count."""
    measured: list[list[tuple[float, float]]] = [[] for _ in programs]
    for _ in range(pairs + 1):
        for program, seconds in zip(programs, measured, strict=True):
            cpu, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(program.run())
            seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
    return [seconds[1:] for seconds in measured]


def inputs(case: Case) -> tuple[jax.Array, ExpertWeights, Routing]:
    """Tokens, float32 matrices and choices of one group."""
    keys = jax.random.split(jax.random.key(0), 6)
    x_TD = jax.random.normal(keys[0], (case.tokens, case.dim)).astype(case.dtype)
    inward = [jax.random.normal(key, (case.experts, case.dim, case.hidden)) * case.dim**-0.5 for key in keys[1:3]]
    down = jax.random.normal(keys[3], (case.experts, case.hidden, case.dim)) * case.hidden**-0.5
    if case.routing == "uneven":
        logits = jax.random.normal(keys[4], (case.tokens, case.experts))
        probabilities = jax.nn.softmax(logits + LEAN * jax.random.normal(keys[5], (case.experts,)))
        gates, ids = jax.lax.top_k(probabilities, CHOICES)
    else:
        in_turn = jnp.arange(case.tokens * CHOICES, dtype=jnp.int32).reshape(case.tokens, CHOICES) % case.experts
        ids = jax.random.permutation(keys[4], in_turn)  # in order, an expert's rows would share few lines of a cache
        gates = jnp.ones(ids.shape)
    gates = gates / gates.sum(-1, keepdims=True)
    routing = Routing(ids[None], gates[None], jnp.ones((1, *ids.shape), bool), None, None)
    return x_TD, ExpertWeights(*inward, down), routing


def dense_weights(case: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Matrices of a feed-forward K times as wide as an expert."""
    keys, hidden = jax.random.split(jax.random.key(1), 3), CHOICES * case.hidden
    inward = [jax.random.normal(key, (case.dim, hidden)) * case.dim**-0.5 for key in keys[:2]]
    return (*inward, jax.random.normal(keys[2], (hidden, case.dim)) * hidden**-0.5)


def dense_layer(x_TD: jax.Array, weights: tuple) -> jax.Array:
    gate_DF, up_DF, down_FD = weights
    return matmul(activate(matmul(x_TD, up_DF), matmul(x_TD, gate_DF)), down_FD)


def ours(config: MoeConfig, drops: bool, x_TD, weights: ExpertWeights, gates_TK, routing: Routing) -> jax.Array:
    routing = dataclasses.replace(routing, gates_UK=gates_TK[None])
    return apply_experts(weights, x_TD[None], routing, config, drops)[0][0]


def ragged(x_TD, weights: ExpertWeights, gates_TK, routing: Routing) -> jax.Array:
    """Tokens sorted by expert, three ragged products, sorted back."""
    ids, num_experts = routing.expert_ids_UK[0].reshape(-1), len(weights.up_EDF)
    order = jnp.argsort(ids, stable=True)
    sizes = jnp.bincount(ids, length=num_experts).astype(jnp.int32)
    rows = x_TD[order // CHOICES]
    up, gate = (jax.lax.ragged_dot(rows, w.astype(rows.dtype), sizes) for w in (weights.up_EDF, weights.gate_EDF))
    y = jax.lax.ragged_dot(activate(up, gate), weights.down_EFD.astype(rows.dtype), sizes)
    weighted = y.astype(jnp.float32) * gates_TK.reshape(-1)[order][:, None]
    return jnp.zeros(x_TD.shape, jnp.float32).at[order // CHOICES].add(weighted).astype(x_TD.dtype)


def one_hot(config: MoeConfig, x_TD, weights: ExpertWeights, gates_TK, routing: Routing) -> jax.Array:
    """GShard: a [T, E, C] tensor says which token takes which place, and two einsums carry tokens there and back."""
    room = config.expert_capacity(len(x_TD))
    chosen_TKE = jax.nn.one_hot(routing.expert_ids_UK[0], config.num_experts)
    queue_KTE = chosen_TKE.swapaxes(0, 1).reshape(-1, config.num_experts)
    place_KTE = (jnp.cumsum(queue_KTE, axis=0) - queue_KTE).reshape(CHOICES, len(x_TD), -1).swapaxes(0, 1)
    place_TK = jnp.sum(place_KTE * chosen_TKE, axis=-1)
    kept_TKEC = chosen_TKE[..., None] * jax.nn.one_hot(place_TK.astype(jnp.int32), room)[:, :, None]
    to_TEC = jnp.sum(kept_TKEC, axis=1).astype(x_TD.dtype)
    back_TEC = jnp.einsum("TKEC,TK->TEC", kept_TKEC, gates_TK).astype(x_TD.dtype)
    rows_ECD = jnp.einsum("TEC,TD->ECD", to_TEC, x_TD)
    up, gate = (jnp.einsum("ECD,EDF->ECF", rows_ECD, w.astype(x_TD.dtype)) for w in (weights.up_EDF, weights.gate_EDF))
    y_ECD = jnp.einsum("ECF,EFD->ECD", activate(up, gate), weights.down_EFD.astype(x_TD.dtype))
    return jnp.einsum("TEC,ECD->TD", back_TEC, y_ECD)


def lines(rows: list[dict], *, header: bool) -> list[str]:
    """The rows of one case to read."""
    titles = f"{'E':>4} {'dtype':9} {'routing':9} {'pass':9} {'way':11} {'ms':>9} {'dense ms':>9}"
    titles += f" {'ratio':>6} {'of own':>7} {'memory':>7}"
    return ([titles] if header else []) + [
        f"{row['experts']:>4} {row['dtype']:9} {row['routing']:9} {'fwd+bwd' if row['backward'] else 'fwd':9} "
        f"{row['way']:11} {row['ms']:9.1f} {row['dense_ms']:9.1f} {row['ratio_to_dense']:6.2f} "
        f"{row['ratio_of_own_arithmetic']:7.2f} {row['temporary_over_dense']:7.2f}"
        for row in rows
    ]


def describe() -> dict:
    """Where and when this was measured."""
    return {
        "benchmark": "moe_layer",
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "jax": importlib.metadata.version("jax"),
        "python": platform.python_version(),
        "choices": CHOICES,
        "capacity_factor": FACTOR,
    }


def processor() -> str:
    """The model of the CPU and those of its features that matrix products use."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    model = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    flags = set(next(line for line in text.splitlines() if line.startswith("flags")).split())
    features = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{model}, {', '.join(features)}"


if __name__ == "__main__":
    main()
