"""Decode of one row on a GPU as a share of what its memory could read: layers of Mixtral's sizes, random weights.

    python benchmarks/decode_gpu.py [--models 8x7b,8x22b] [--layers 8] [--products reduction,dot] [--json]

`roofline` is bytes that a token must read at least (matrices of the experts it goes to, the rest of the layers, the
head, keys and values) over its time, as a share of the memory rate of the device's data sheet; `of read` as a share of
what a sum over a large array reads here. A step is one compiled program, dispatched without waiting for the one before;
`looped` is the same in a loop of several steps in one program. Products are ways to multiply one row
(`gpt4moe.infer.matrix.PRODUCTS`), all in one run. Weights are made on the device. On a CPU the sizes are tiny: that
only shows that it runs.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt4moe.accounting.chips import find_chip
from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.infer.decoder import Decoder
from gpt4moe.model.transformer import Transformer

# Width, heads, hidden width of an expert.
SIZES = {"8x7b": (4096, 32, 14336), "8x22b": (6144, 48, 16384)}
TINY = {"8x7b": (64, 4, 128), "8x22b": (96, 4, 128)}
VOCAB, CONTEXT, PAGE_SIZE, NUM_EXPERTS = 32000, 1024, 64, 8
LOOPED, STEPS, WARM = 8, 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8x7b,8x22b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--products", default="reduction,dot")
    parser.add_argument("--quantize", choices=["int8", "fp8"], help="matrices of experts and attention")
    parser.add_argument("--seconds", type=float, default=105, help="no case begins after this")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    began, say = time.monotonic(), functools.partial(print, file=sys.stderr if arguments.json else sys.stdout)
    document = describe()
    say(json.dumps(document), flush=True)
    document["rows"] = []
    models = arguments.models.split(",")
    cases = []
    for product, model in itertools.product(arguments.products.split(","), models):
        names = {"model": model, "what": f"decode, {product}"}
        cases.append((functools.partial(decode, model, product, arguments), names))
    for case, names in cases:
        if time.monotonic() - began > arguments.seconds:
            say(f"{names}: not begun, --seconds are over")
            continue
        for row in attempt(case):
            document["rows"].append(names | row)
            say(text(document["rows"][-1], document), flush=True)
        say(f"  {time.monotonic() - began:.0f} s so far", flush=True)
    if arguments.json:
        print(json.dumps(document))


def attempt(case) -> list[dict]:
    """The rows of a case, or what went wrong: the others are still to be measured."""
    try:
        return list(case())
    except Exception as error:
        return [{"failed": f"{type(error).__name__}: {str(error)[:400]}"}]


def describe() -> dict:
    """Device, date, versions, memory rate by data sheet (None where we know none) and as measured."""
    device = jax.devices()[0]
    chip = find_chip(device.device_kind)
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "jax": jax.__version__,
        "sheet_bytes_per_second": chip.bandwidth_bytes_per_second if chip else None,
        "read_bytes_per_second": read_rate(),
    }


def text(row: dict, document: dict) -> str:
    """One line for reading."""
    name = f"{row['model']:6} {row['what']:18}"
    if "failed" in row:
        return f"{name} FAILED {row['failed']}"
    rate = row["bytes"] / row["seconds"]
    sheet = document["sheet_bytes_per_second"]
    share = f"roofline {rate / sheet:.1%}, " if sheet else ""
    of_read = rate / document["read_bytes_per_second"]
    measured = f"{row['seconds'] * 1e3:8.3f} ms  {row['bytes'] / 1e9:6.2f} GB  {rate / 1e12:5.2f} TB/s"
    return f"{name} {row['way']:28} {measured}  {share}of read {of_read:.1%}"


def is_gpu() -> bool:
    """Whether there is a GPU to measure."""
    return jax.default_backend() == "gpu"


def read_rate() -> float:
    """Bytes a second of a sum over a large array."""
    large = jnp.ones(((1 << 31) if is_gpu() else (1 << 22), 1), jnp.bfloat16).reshape(-1, 4096 if is_gpu() else 64)
    total = jax.jit(lambda x: jnp.sum(x.astype(jnp.float32), axis=1))
    return large.nbytes / seconds_of(lambda: total(large), 10)


def seconds_of(call, repeats: int) -> float:
    """Seconds of a call, many dispatched before the last is waited for."""
    jax.block_until_ready(call())
    began = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / repeats


def config_of(model: str, layers: int) -> ModelConfig:
    """A model of these sizes in bfloat16."""
    dim, heads, hidden = (SIZES if is_gpu() else TINY)[model]
    return ModelConfig(
        num_layers=layers,
        model_dim=dim,
        vocab_size=VOCAB if is_gpu() else 128,
        context_length=CONTEXT,
        attention=AttentionConfig(num_heads=heads, num_kv_heads=8 if is_gpu() else 2),
        moe=MoeConfig(num_experts=NUM_EXPERTS, experts_per_token=2, hidden_dim=hidden),
        tie_embeddings=False,
    )


def decode(model: str, product: str, arguments: argparse.Namespace):
    """Rows of decode at the end of a context: a step a program, and several in a loop."""
    config = config_of(model, arguments.layers)
    blank = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    decoder = Decoder.of(blank, product=product, quantize=arguments.quantize)
    leaves, treedef = jax.tree.flatten(decoder.weights)
    weights = treedef.unflatten([filled(leaf, jax.random.key(i)) for i, leaf in enumerate(leaves)])
    size = bytes_per_token(decoder, weights)
    for way, steps in (("a step a program", 1), (f"looped, {LOOPED} steps", LOOPED)):
        yield {"way": way, "seconds": seconds_per_step(decoder, weights, steps), "bytes": size}


def filled(leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    """Random numbers such that a product keeps the size of its rows; norms and scales are constant."""
    if leaf.dtype == jnp.float32 and leaf.ndim < 3 and leaf.shape[-1] != NUM_EXPERTS:
        return jnp.full(leaf.shape, 1.0 if leaf.ndim == 1 else 1e-3, leaf.dtype)
    return drawn(key, leaf.shape, leaf.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def drawn(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Even random numbers, integers of all sizes or floats of deviation (last dim)^-1/2, from a byte each."""
    bits = jax.random.bits(key, shape, jnp.uint8)
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.lax.bitcast_convert_type(bits, dtype)
    return ((bits.astype(jnp.bfloat16) / 128 - 1) * (1.7 * shape[-1] ** -0.5)).astype(dtype)


def seconds_per_step(decoder: Decoder, weights, steps_a_program: int) -> float:
    """Seconds of a step, the fastest of three runs; the token of each is what the step before made."""
    table_BX = jnp.arange(CONTEXT // PAGE_SIZE, dtype=jnp.int32)[None]

    def step(_, carried: tuple, weights) -> tuple:
        token_B1, position, pages = carried
        at = jnp.broadcast_to(position, (1, 1))
        x_BTD, pages, _ = decoder.forward(weights, token_B1, at, jnp.ones((1, 1), bool), pages, table_BX)
        token_B1 = jnp.argmax(decoder.logits(weights, x_BTD[:, -1]), axis=-1)[:, None].astype(jnp.int32)
        return token_B1, position + 1, pages

    @functools.partial(jax.jit, donate_argnums=0)
    def program(carried: tuple, weights) -> tuple:
        if steps_a_program == 1:
            return step(0, carried, weights)
        return jax.lax.fori_loop(0, steps_a_program, functools.partial(step, weights=weights), carried)

    pages = decoder.init_pages(CONTEXT // PAGE_SIZE, PAGE_SIZE)
    calls, taken = (STEPS if is_gpu() else 8) // steps_a_program, []
    for run in range(4):
        start = CONTEXT - STEPS - WARM
        carried = program((jnp.zeros((1, 1), jnp.int32), jnp.int32(start), pages), weights)
        jax.block_until_ready(carried)
        began = time.perf_counter()
        for _ in range(calls):
            carried = program(carried, weights)
        jax.block_until_ready(carried)
        taken += [(time.perf_counter() - began) / (calls * steps_a_program)] if run else []
        pages = carried[2]
    assert np.asarray(carried[0]).min() >= 0
    return min(taken)


def bytes_per_token(decoder: Decoder, weights) -> int:
    """All weights but experts that a token does not go to and the rows of the embedding; keys and values."""
    config = decoder.config
    experts = nbytes([layer.feed_forward.experts for layer in weights.layers])
    idle = experts * (config.moe.num_experts - config.moe.experts_per_token) // config.moe.num_experts
    cached = decoder.init_pages(1, CONTEXT - STEPS)
    return nbytes(weights) - idle - weights.embedding_VD.nbytes + nbytes(cached)


def nbytes(tree) -> int:
    """Bytes of all arrays of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
