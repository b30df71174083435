"""A run small enough to train many times in one test: two layers, four experts, bytes as tokens, two sources."""

from __future__ import annotations

import dataclasses
import pathlib
import random

import numpy as np

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.data import DataConfig, SourceConfig
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.optimizer import OptimizerConfig, ScheduleConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.config.train import TrainConfig
from gpt4moe.types import Batch

LENGTH = 32
VOCAB = 272
WORDS = ("the", "of", "and", "a", "to", "in", "red", "blue", "fish", "tree", "go", "run", "sees", "likes")
MODEL = ModelConfig(
    num_layers=2,
    model_dim=16,
    vocab_size=VOCAB,
    context_length=LENGTH,
    attention=AttentionConfig(num_heads=2),
    moe=MoeConfig(num_experts=4, experts_per_token=2, hidden_dim=32),
    compute_dtype="float32",
)


def write_corpus(directory: pathlib.Path) -> None:
    """Two sources, `code` and `text`, of some 300 rows together."""
    draw = random.Random(0)
    for name, ending in (("code", "()\n"), ("text", " ")):
        folder = directory / name
        folder.mkdir(parents=True)
        for number in range(30):
            words = (draw.choice(WORDS) for _ in range(draw.randrange(5, 70)))
            (folder / f"{number}.txt").write_text("".join(word + ending for word in words))


def run_config(
    corpus: pathlib.Path, *, mesh: tuple[tuple[str, int], ...] = (), model: ModelConfig = MODEL, **train
) -> RunConfig:
    """A run on `write_corpus(corpus)`: 12 steps over a ramp of 4, 8 and 16 rows, checkpoints at 4, 8 and 12."""
    sources = tuple(
        SourceConfig(name, paths=(str(corpus / name / "*.txt"),), max_epochs=epochs)
        for name, epochs in (("code", 4), ("text", 2))
    )
    tokenizer = TokenizerConfig(vocab_size=VOCAB, byte_level_only=True)
    data = DataConfig(sources, LENGTH, tokenizer, held_out_fraction=0.1, store=str(corpus / "store"))
    settings = {
        "steps": 12,
        "token_budget": 10**6,
        "batch_tokens": ((0, 4 * LENGTH), (3 * 4 * LENGTH, 8 * LENGTH), (1000, 16 * LENGTH)),
        "seed": 0,
        "checkpoint_every": 4,
    }
    optimizer = OptimizerConfig(1e-2, schedule=ScheduleConfig(warmup_tokens=500))
    return RunConfig(model, data, optimizer, TrainConfig(**settings | train), MeshConfig(mesh))


def random_batch(rows: int, *, seed: int = 0) -> Batch:
    """Rows of two segments and some padding, sources and weights at random, [rows, LENGTH]."""
    draw = np.random.default_rng(seed)
    shape = (rows, LENGTH)
    lengths_B1, splits_B1 = draw.integers(8, LENGTH + 1, (rows, 1)), draw.integers(1, 8, (rows, 1))
    place_BT = np.broadcast_to(np.arange(LENGTH), shape)
    segment_ids_BT = np.where(place_BT >= lengths_B1, 0, 1 + (place_BT >= splits_B1)).astype(np.int32)
    positions_BT = np.where(place_BT >= splits_B1, place_BT - splits_B1, place_BT).astype(np.int32)
    return Batch(
        tokens=draw.integers(0, VOCAB, shape).astype(np.int32),
        targets=draw.integers(0, VOCAB, shape).astype(np.int32),
        loss_weights=(draw.uniform(0, 1, shape) * (segment_ids_BT > 0)).astype(np.float32),
        positions=positions_BT * (segment_ids_BT > 0),
        segment_ids=segment_ids_BT,
        source_ids=np.broadcast_to(draw.integers(0, 2, (rows, 1)), shape).astype(np.int32),
    )


def with_train(run: RunConfig, **settings) -> RunConfig:
    """`run` with other settings of its `train` part."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **settings))
