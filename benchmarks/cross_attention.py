"""Speed of attention across from text to images beside a plain einsum, softmax, einsum, by turns in one run.

    python benchmarks/cross_attention.py [--pairs 5] [--json]

Shapes of the recipes that read: rows x tokens x features, six heads of 32. Training is forward and backward, the plain
one with its scores computed again in the backward pass, as ours; decoding is one token of each row, forward. A ratio is
the median over pairs of the plain way's CPU seconds over ours. The floor is what the products take at the rate of a
large one of this run or, in decoding, what it takes to read keys and values at the rate of a large sum; `of floor` is
that over our seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gpt4moe.model.attention_kernel import attend_across
from gpt4moe.types import Array

HEADS, HEAD_DIM = 6, 32
SHAPES = {
    "quickstart": (4, 64, 144),
    "lines": (2, 128, 384),
    "strips": (2, 448, 672),
    "pages": (1, 1664, 2688),
    "decode 24 pages": (24, 1, 2688),
}
LARGE = 2048
# Products of T x S x H: scores and averages forward; in training scores again, and those of four gradients.
FORWARD, TRAINING = 2, 7


def plain(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """The same by einsum."""

    @jax.checkpoint
    def attend(q: Array, k: Array, v: Array) -> Array:
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * HEAD_DIM**-0.5
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30), axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    return attend(q, k, v)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="turns of each way")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    square, long = jnp.ones((LARGE, LARGE)), jnp.ones(2**26)
    flops = 2 * LARGE**3 / seconds(jax.jit(lambda x: x @ x), (square,), arguments.pairs)
    rate = long.nbytes / seconds(jax.jit(jnp.sum), (long,), arguments.pairs)
    rows = [measured(name, *shape, flops, rate, arguments.pairs) for name, shape in SHAPES.items()]
    if arguments.json:
        print(json.dumps({"device": jax.devices()[0].device_kind, "flops": flops, "bytes": rate, "rows": rows}))
        return
    print(f"{flops / 1e9:.0f} GFLOP/s, {rate / 1e9:.1f} GB/s")
    print(f"{'':16} {'ours, s':>9} {'plain, s':>9} {'ratio':>6} {'of floor':>9}")
    for row in rows:
        print(f"{row['name']:16} {row['ours']:9.4f} {row['plain']:9.4f} {row['ratio']:6.2f} {row['of_floor']:9.0%}")


def measured(name: str, rows: int, tokens: int, features: int, flops: float, rate: float, pairs: int) -> dict:
    """Seconds of both ways at one shape."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (rows, tokens, HEADS, HEAD_DIM))
    k, v = (jax.random.normal(key, (rows, features, HEADS, HEAD_DIM)) for key in keys[1:])
    numbers, number = jnp.zeros((rows, tokens, 2), jnp.int32), jnp.zeros((rows, features), jnp.int32)
    visible = jnp.ones((rows, tokens, features), bool)
    trains = tokens > 1

    def way(attend: Callable) -> Callable:
        if trains:
            return jax.jit(jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v) ** 2), (0, 1, 2)))
        return jax.jit(attend)

    ours = way(lambda q, k, v: attend_across(q, k, v, numbers, number, tokens))
    theirs = way(lambda q, k, v: plain(q, k, v, visible))
    times = [[seconds(each, (q, k, v), 1) for each in (ours, theirs)] for _ in range(pairs)]
    own, other = (statistics.median(column) for column in zip(*times, strict=True))
    products = (TRAINING if trains else FORWARD) * 2 * rows * tokens * features * HEADS * HEAD_DIM
    floor = products / flops if trains else (k.nbytes + v.nbytes) / rate
    ratio = statistics.median(b / a for a, b in times)
    return {"name": name, "ours": own, "plain": other, "ratio": ratio, "of_floor": floor / own}


def seconds(function: Callable, operands: tuple, times: int) -> float:
    """CPU seconds of a call, the median of `times` after one that compiles."""
    spent = []
    for _ in range(times + 1):
        start = time.process_time()
        jax.block_until_ready(function(*operands))
        spent.append(time.process_time() - start)
    return statistics.median(spent[1:])


if __name__ == "__main__":
    main()
