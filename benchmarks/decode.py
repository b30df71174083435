"""Speed of prefill and decode on one CPU, in float32, bfloat16 and int8, beside Hugging Face transformers.

    python benchmarks/decode.py [--dtypes float32,bfloat16,int8] [--rounds 4] [--steps 16] [--json]
    python benchmarks/decode.py --peers [--json]

Hidden 512, 8 layers, 8 heads, 1 KV head, 8 SwiGLU experts of 1408, top-2, vocabulary 8192 (152M parameters, 43M of them
for a token), random weights. Prefill of 1 and 8 prompts of 512 tokens, logits of the last; greedy decode of 1, 8 and 32
rows after prompts of 128, step by step, each step one compiled program over paged keys and values.

Every row is a process of its own, which measures when it is its turn, never two at a time. Tokens per second are those
of a fast step, the tenth percentile of all rounds; ratios are of these, and beside them of CPU seconds, which hold on a
busy machine where both sides have one core (`taskset -c 0`; torch's threads wait for each other). `--peers` sets
transformers on torch beside it (extra `[bench]`; benchmarks/decode_peer.py) with the same weights: its fastest experts
implementation for each task. The share of the bandwidth is bytes that a step must read at least (the matrices of the
experts its token goes to, the rest of the model, keys and values) over its time and over what this machine reads a
second.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import random
import sys
import tempfile
import time

import decode_peer
import peer_transformers
from train_step import describe
from turns import Process, cpu_and_wall, serve_tasks

LENGTH, PROMPT, VOCAB, PAGE_SIZE = 512, 128, 8192, 64
MOST_ROWS = 32
OURS = "gpt4moe"
READ_BYTES = 1 << 30
LARGEST_PROBE_ERROR = 1e-4


@dataclasses.dataclass(frozen=True)
class Task:
    """A prefill of `rows` prompts of `length` tokens, or steps of decode after it."""

    kind: str
    rows: int
    length: int

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"prefill {self.rows}x{self.length}" if self.kind == "prefill" else f"decode {self.rows}"

    @property
    def tokens(self) -> int:
        """Tokens of one measured step."""
        return self.rows * (self.length if self.kind == "prefill" else 1)


TASKS = (
    Task("prefill", 1, LENGTH),
    Task("prefill", 8, LENGTH),
    Task("decode", 1, PROMPT),
    Task("decode", 8, PROMPT),
    Task("decode", MOST_ROWS, PROMPT),
)


def main() -> None:
    arguments = parse()
    if arguments.row:
        measure(arguments.row)
        return
    if arguments.peers and (missing := peer_transformers.missing()):
        print(f"--peers needs {missing}; pip install -e '.[bench]'", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as directory:
        document = describe(arguments.peers) | compare(arguments, directory)
    del document["tokens_per_step"]
    print(json.dumps(document) if arguments.json else table(document))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float32,bfloat16,int8")
    parser.add_argument("--tasks", default=",".join(task.name for task in TASKS), help="some of: %(default)s")
    parser.add_argument("--rounds", type=int, default=4, help="turns of every row")
    parser.add_argument("--steps", type=int, default=16, help="steps of decode in a turn")
    parser.add_argument("--peers", action="store_true", help="transformers on torch beside it, by turns")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(arguments: argparse.Namespace, directory: str) -> dict:
    """Rows of ours and of the peer, every process with its turns, and the ratios."""
    ours = {dtype: Process([sys.executable, __file__, "--row", dtype], environment={}) for dtype in
            arguments.dtypes.split(",")}  # fmt: skip
    theirs = {}
    if arguments.peers:
        write_weights(pathlib.Path(directory))
        for dtype in [dtype for dtype in ours if dtype != "int8"]:
            theirs[dtype] = Process([sys.executable, decode_peer.__file__, directory, dtype], environment={})
    tasks = [task for task in TASKS if task.name in arguments.tasks.split(",")]
    seconds = {}
    for _ in range(max(arguments.rounds, 1)):
        for task in tasks:
            for dtype, process in ours.items():
                ask(process, task, (dtype, OURS), arguments.steps, seconds)
                for experts in decode_peer.EXPERTS if dtype in theirs else ():
                    if experts != "batched_mm" or task.tokens == 1:  # it copies the matrices of every choice
                        ask(theirs[dtype], task, (dtype, experts), arguments.steps, seconds)
    for process in [*ours.values(), *theirs.values()]:
        process.finish()
    return {"probe_error": probe_error(ours, theirs), **results(seconds, ours, tasks)}


def ask(process: Process, task: Task, row: tuple[str, str], steps: int, seconds: dict) -> None:
    """Adds the seconds of one turn under (dtype, what, task)."""
    count = steps if task.kind == "decode" else max(1, 4 // task.rows)
    answer = process.ask(dataclasses.asdict(task) | {"experts": row[1], "steps": count})
    if process.ended:
        sys.exit(f"{' '.join(row)} failed:\n{process.errors()}")
    seconds.setdefault((*row, task.name), []).extend(answer)


def probe_error(ours: dict, theirs: dict) -> float | None:
    """The largest difference of the float32 logits of a few tokens; ends the run where weights are not the same."""
    if "float32" not in theirs or "float32" not in ours:
        return None
    pairs = zip(ours["float32"].facts["probe"], theirs["float32"].facts["probe"], strict=True)
    error = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
    if not error < LARGEST_PROBE_ERROR:
        sys.exit(f"logits differ by {error:.2g}: not the same model")
    return error


def results(seconds: dict, ours: dict, tasks: list[Task]) -> dict:
    """Rates of every row, ratios to the fastest of the peer's and of int8 to bfloat16, share of the bandwidth."""
    tokens = {task.name: task.tokens for task in tasks}
    cpu, wall = (
        {key: tokens[key[2]] / fast([step[which] for step in steps]) for key, steps in seconds.items()}
        for which in range(2)
    )
    rows = [
        {"dtype": key[0], "implementation": key[1], "task": key[2], "tokens_per_second": wall[key]}
        | {"tokens_per_cpu_second": cpu[key]}
        for key in seconds
    ]
    ratios = []
    for dtype, task in itertools.product(ours, tokens):
        own, others = (dtype, OURS, task), [key for key in seconds if key[::2] == (dtype, task) and key[1] != OURS]
        if dtype == "int8":
            others = [key for key in seconds if key == ("bfloat16", OURS, task)]
        if others:
            fastest, thriftiest = max(others, key=wall.get), max(others, key=cpu.get)
            over = {"over": fastest[1] if dtype != "int8" else "bfloat16", "ratio": wall[own] / wall[fastest]}
            ratios.append({"dtype": dtype, "task": task, **over, "cpu_ratio": cpu[own] / cpu[thriftiest]})
    bandwidth = {}
    for dtype, process in ours.items():
        if (dtype, OURS, "decode 1") in wall:
            read = process.facts["bytes_per_token"] * wall[dtype, OURS, "decode 1"]
            bandwidth[dtype] = read / process.facts["bytes_per_second"]
    return {"rows": rows, "ratios": ratios, "bandwidth": bandwidth}


def fast(seconds: list[float]) -> float:
    """The tenth percentile."""
    return sorted(seconds)[math.floor(0.1 * (len(seconds) - 1))]


def table(document: dict) -> str:
    """The rates by row and task, the ratios and the share of the bandwidth, for reading."""
    tasks = list(dict.fromkeys(row["task"] for row in document["rows"]))
    names = list(dict.fromkeys((row["dtype"], row["implementation"]) for row in document["rows"]))
    rates = {(row["dtype"], row["implementation"], row["task"]): row["tokens_per_second"] for row in document["rows"]}
    lines = [" ".join([f"{'tokens/s':20}", *(f"{task:>14}" for task in tasks)])]
    for name in names:
        cells = [rates.get((*name, task)) for task in tasks]
        lines.append(" ".join([f"{' '.join(name):20}", *(f"{'-' if c is None else f'{c:,.0f}':>14}" for c in cells)]))
    for ratio in document["ratios"]:
        cpu = f"by CPU seconds {ratio['cpu_ratio']:.2f}x"
        lines.append(f"{ratio['dtype']} {ratio['task']}: {ratio['ratio']:.2f}x {ratio['over']}, {cpu}")
    for dtype, share in document["bandwidth"].items():
        lines.append(f"{dtype} decode 1: {share:.0%} of the memory bandwidth")
    return "\n".join(lines)


def model_config(dtype: str):
    """The configuration of the claim."""
    from gpt4moe.config.attention import AttentionConfig
    from gpt4moe.config.model import ModelConfig
    from gpt4moe.config.moe import MoeConfig

    return ModelConfig(
        num_layers=8,
        model_dim=512,
        vocab_size=VOCAB,
        context_length=2 * LENGTH,
        attention=AttentionConfig(num_heads=8, num_kv_heads=1),
        moe=MoeConfig(num_experts=8, experts_per_token=2, hidden_dim=1408),
        tie_embeddings=False,
        compute_dtype=dtype,
    )


def random_tokens() -> list[list[int]]:
    """Uniformly random prompts, the same for every row."""
    draw = random.Random(0)
    return [draw.choices(range(VOCAB), k=LENGTH) for _ in range(MOST_ROWS)]


def make_model(dtype: str):
    """The model with random weights."""
    from flax import nnx

    from gpt4moe.model.transformer import Transformer

    return nnx.jit(lambda: Transformer(model_config(dtype), rngs=nnx.Rngs(0)))()


def write_weights(directory: pathlib.Path) -> None:
    """The weights under the names of transformers, its sizes and the prompts."""
    import numpy as np
    from safetensors.numpy import save_file

    model, config = make_model("float32"), model_config("float32")
    attention, moe = model.blocks.attention, model.blocks.moe
    tensors = {
        "model.embed_tokens.weight": model.embedding[...] / config.embedding_std,
        "model.norm.weight": model.final_norm.scale[...],
        "lm_head.weight": model.unembedding(),
    }
    for layer in range(config.num_layers):
        dim = config.model_dim
        projections = {name: getattr(attention, name)[layer].reshape(dim, -1).T for name in ("query", "key", "value")}
        inward = [part[layer].swapaxes(1, 2) for part in (moe.experts.gate, moe.experts.up)]
        own = {
            "input_layernorm": model.blocks.attention_norm.scale[layer],
            "post_attention_layernorm": model.blocks.feed_forward_norm.scale[layer],
            **{f"self_attn.{name[0]}_proj": w for name, w in projections.items()},
            "self_attn.o_proj": attention.output[layer].reshape(-1, dim).T,
            "mlp.gate": moe.router[layer].T,
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": value for name, value in own.items()}
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate(inward, axis=1)
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = moe.experts.down[layer].swapaxes(1, 2)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, directory / "weights.safetensors")
    sizes = {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "vocab_size": VOCAB,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": False,
        "rms_norm_eps": config.norm_epsilon,
        "num_attention_heads": config.attention.num_heads,
        "num_key_value_heads": config.attention.num_kv_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.attention.rope_theta},
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.experts_per_token,
        "intermediate_size": config.moe.hidden_dim,
    }
    (directory / "sizes.json").write_text(json.dumps(sizes))
    (directory / "tokens.json").write_text(json.dumps(random_tokens()))


def measure(name: str) -> None:
    """One row of ours: builds the decoder, compiles a program a task, and measures as it is asked."""
    import jax

    from gpt4moe.infer.decoder import Decoder

    dtype, quantize = ("bfloat16", "int8") if name == "int8" else (name, None)
    decoder = Decoder.of(make_model(dtype), quantize=quantize)
    bench = Bench(decoder)
    probe = bench.probe().tolist() if name == "float32" else None
    ready = {"probe": probe, "bytes_per_token": bench.bytes_per_token(), "bytes_per_second": read_rate()}

    def answer(line: str) -> list[list[float]]:
        asked = json.loads(line)
        task = Task(**{field.name: asked[field.name] for field in dataclasses.fields(Task)})
        return bench.run(task, asked["steps"])

    jax.block_until_ready(decoder.weights)
    serve_tasks(ready, answer)


class Bench:
    """Programs over one decoder: a prefill that draws the next tokens, and a step of decode."""

    def __init__(self, decoder):
        import jax.numpy as jnp

        self.decoder, self.tokens, self.programs = decoder, jnp.array(random_tokens(), jnp.int32), {}

    def step(self, weights, tokens_BT, start, pages, table_BX):
        """(next tokens [B, 1], pages) after `tokens_BT`, which begin at position `start`."""
        import jax.numpy as jnp

        positions_BT = jnp.broadcast_to(start + jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        valid_BT = jnp.ones(tokens_BT.shape, bool)
        x_BTD, pages, _ = self.decoder.forward(weights, tokens_BT, positions_BT, valid_BT, pages, table_BX)
        logits_BV = self.decoder.logits(weights, x_BTD[:, -1])
        return jnp.argmax(logits_BV, axis=-1)[:, None].astype(jnp.int32), pages

    def inputs(self, task: Task):
        """(pages, table) for the rows of a task."""
        import jax.numpy as jnp

        pages_of_row = max(task.length, 2 * PROMPT) // PAGE_SIZE
        table_BX = jnp.arange(task.rows * pages_of_row, dtype=jnp.int32).reshape(task.rows, -1)
        return self.decoder.init_pages(task.rows * pages_of_row, PAGE_SIZE), table_BX

    def program(self, rows: int, length: int, pages, table_BX):
        """The compiled step of `length` tokens of each row."""
        import jax
        import jax.numpy as jnp

        key = rows, length, pages.keys[0].shape
        if key not in self.programs:
            given = (self.decoder.weights, self.tokens[:rows, :length], jnp.int32(0), pages, table_BX)
            self.programs[key] = jax.jit(self.step, donate_argnums=3).lower(*given).compile()
        return self.programs[key]

    def run(self, task: Task, steps: int) -> list[list[float]]:
        """CPU and wall seconds of each prefill, or of each step of decode after one."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        pages, table_BX = self.inputs(task)
        weights, seconds = self.decoder.weights, []
        if task.kind == "prefill":
            prefill, tokens = self.program(task.rows, task.length, pages, table_BX), self.tokens[: task.rows]
            for _ in range(steps + 1):  # the first does not count
                before = cpu_and_wall()
                _, pages = jax.block_until_ready(prefill(weights, tokens, np.int32(0), pages, table_BX))
                seconds.append([after - start for after, start in zip(cpu_and_wall(), before, strict=True)])
            return seconds[1:]
        prefill, last = self.program(1, task.length, pages, table_BX[:1]), []
        for row in range(task.rows):
            prompt, own = self.tokens[row : row + 1, : task.length], table_BX[row : row + 1]
            token, pages = prefill(weights, prompt, np.int32(0), pages, own)
            last.append(token)
        last, decode = jnp.concatenate(last), self.program(task.rows, 1, pages, table_BX)
        for start in range(task.length, task.length + steps):
            before = cpu_and_wall()
            last, pages = jax.block_until_ready(decode(weights, last, np.int32(start), pages, table_BX))
            seconds.append([after - begun for after, begun in zip(cpu_and_wall(), before, strict=True)])
        return seconds

    def probe(self):
        """float32 logits [16, V] of the first tokens."""
        import jax
        import jax.numpy as jnp

        tokens, (pages, table) = self.tokens[:1, :16], self.inputs(TASKS[0])
        given = (jnp.arange(16)[None], jnp.ones((1, 16), bool), pages, table)
        x_BTD, _, _ = jax.jit(self.decoder.forward)(self.decoder.weights, tokens, *given)
        return self.decoder.logits(self.decoder.weights, x_BTD)[0]

    def bytes_per_token(self) -> int:
        """Bytes that one step of one row must read: all weights but experts it does not go to, keys and values."""
        import jax

        config, weights = self.decoder.config, self.decoder.weights
        moe = config.moe
        size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
        experts = size([layer.feed_forward.experts for layer in weights.layers])
        idle = experts * (moe.num_experts - moe.experts_per_token) // moe.num_experts
        row = self.decoder.init_pages(1, PROMPT)
        embedding = weights.embedding_VD.nbytes * (VOCAB - 1) // VOCAB
        return size(weights) - idle - embedding + size(row)


def read_rate() -> float:
    """Bytes a second that this machine reads: the fastest of several sums over a large array."""
    import jax
    import jax.numpy as jnp

    large = jnp.ones(READ_BYTES // 4, jnp.float32)
    total = jax.jit(lambda x: jnp.sum(x.reshape(1 << 10, -1), axis=1))
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        total(large).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return READ_BYTES / min(seconds)


if __name__ == "__main__":
    main()
