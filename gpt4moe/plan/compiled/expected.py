"""What a compiled program should do, from the configuration: analytic FLOPs, and rounds of loops of unknown length."""

from __future__ import annotations

import dataclasses
import math

from jax.sharding import Mesh

from gpt4moe.accounting import executed, flops
from gpt4moe.config.compile import CompileConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.model.attention_backends import SPLASH_BLOCKS, SPLASH_HEAD_MULTIPLE, SPLASH_LENGTH_MULTIPLE
from gpt4moe.model.attention_kernel import queries_of_block
from gpt4moe.model.dispatch import block_rows
from gpt4moe.plan.compiled.work import Work
from gpt4moe.train import feed

# The loops of our programs whose length is known only as they run.
MICROBATCH_LOOP = "step.py:_sum_over"
EXPERT_BLOCK_LOOP = "grouped_matmul.py:block_matmul"
# XLA's grouped product and our kernels, by name.
GROUPED_PRODUCTS = ("ragged-dot-none", "grouped_product", "grouped_rows_gradient", "grouped_matrices_gradient")
TOKEN_LOOP = "decode_loop.py:decode"
# Products of the backward pass of attention's core: splash (dq 3, dkv 4) and `attend_in_blocks`.
SPLASH_BACKWARD_PRODUCTS, BLOCKS_BACKWARD_PRODUCTS = 7, 5


def rounds(run: RunConfig, config: CompileConfig, mesh: Mesh, program: str) -> dict[str, int]:
    """Returns how often each loop of unknown length runs: in a step of the largest batch, or for one new token.

    A TPU's grouped product is such a loop inside a kernel.
    """
    if program == "train":
        return {MICROBATCH_LOOP: feed.microbatch_room(run)}
    in_use, _ = _expert_blocks(run, config, mesh)
    return {TOKEN_LOOP: 1} | dict.fromkeys((EXPERT_BLOCK_LOOP, *GROUPED_PRODUCTS), in_use)


def beside(run: RunConfig, config: CompileConfig, mesh: Mesh, program: str, counted: Work) -> dict:
    """Returns the compiled FLOPs of a chip beside what the analysis says is executed and what the mathematics needs."""
    training = program == "train"
    analytic = _train(run, mesh) if training else _decode(run, config, mesh)
    tokens = run.train.ramp[-1][1] if training else config.decode_rows
    passes, length = (3, run.data.sequence_length) if training else (1, config.decode_length)
    share = passes * tokens / mesh.size
    model = share * flops.forward_flops_per_token(run.model)
    core = share * flops.attention_core_flops_per_token(run.model, length, causal=training)
    return {
        "tokens": tokens,
        "flops_per_chip": counted.flops,
        "recomputed_flops_per_chip": counted.recomputed_flops,
        "executed_flops_per_chip": analytic.total,
        "executed_flops": dataclasses.asdict(analytic),
        "model_flops_per_chip": model,
        "attention_core_flops_per_chip": core,
        "compiled_over_executed": counted.flops / analytic.total,
        "compiled_over_model_flops": counted.flops / model,
        "useful_fraction": (model + core) / counted.flops,
        "useful_fraction_without_recomputation": (model + core) / (counted.flops - counted.recomputed_flops),
    }


def _train(run: RunConfig, mesh: Mesh) -> executed.Executed:
    return executed.train_step(run, mesh.shape, _kernel(run, mesh))


def _decode(run: RunConfig, config: CompileConfig, mesh: Mesh) -> executed.Executed:
    in_use, block = _expert_blocks(run, config, mesh)
    return executed.decode_step(run, mesh.shape, config.decode_rows, config.decode_length, in_use * block)


def _kernel(run: RunConfig, mesh: Mesh) -> executed.CoreKernel:
    """The attention kernel that a device of this mesh runs, as `model.attention_kernel.attend` chooses."""
    length, chunk = run.data.sequence_length, run.model.attention.query_chunk
    platform = mesh.devices.flat[0].platform
    fits = length % SPLASH_LENGTH_MULTIPLE == 0 and run.model.head_dim % SPLASH_HEAD_MULTIPLE == 0
    if platform == "tpu" and mesh.shape["context"] == 1 and fits:
        block = next(size for size in SPLASH_BLOCKS if length % size == 0)
        return executed.CoreKernel(block, SPLASH_BACKWARD_PRODUCTS)
    return executed.CoreKernel(queries_of_block(length, chunk, platform), BLOCKS_BACKWARD_PRODUCTS)


def _expert_blocks(run: RunConfig, config: CompileConfig, mesh: Mesh) -> tuple[int, int]:
    """Blocks that the experts on a chip multiply for one token of each row, and rows of a block; loads are equal.

    Over an expert axis each chip has room for all that the chips of the axis could send it (`parallel.expert`).
    """
    moe = run.model.moe
    rows = config.decode_rows // math.prod(mesh.shape[axis] for axis in run.rules.batch_axes)
    shards = math.prod(mesh.shape[axis] for axis in run.rules.axes_of("experts"))
    held = moe.num_experts // shards
    arriving = shards * rows * min(moe.experts_per_token, held) if shards > 1 else rows * moe.experts_per_token
    block = block_rows(arriving, held)
    an_expert = rows * shards * moe.experts_per_token / moe.num_experts
    return held * math.ceil(an_expert / block), block
