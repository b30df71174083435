"""One run: everything that `gpt4moe train` needs, in one hashable object."""

from __future__ import annotations

import dataclasses

from gpt4moe.config.check import require
from gpt4moe.config.data import DataConfig
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.optimizer import OptimizerConfig
from gpt4moe.config.train import TrainConfig

PARTS = dict(model=ModelConfig, data=DataConfig, optimizer=OptimizerConfig, train=TrainConfig, mesh=MeshConfig)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Model, data, optimizer, training length and mesh; checks what only their combination can show."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), PARTS[field.name]
            require(isinstance(value, kind), f"RunConfig.{field.name}", value, f"must be a {kind.__name__}")
        length = self.data.sequence_length
        require(
            length <= self.model.context_length,
            "sequence_length",
            length,
            f"must be at most the model's context_length ({self.model.context_length})",
            "lower SEQUENCE_LENGTH or raise ModelConfig.context_length",
        )
        for _, batch_tokens in self.train.ramp:
            require(
                batch_tokens % (length * self.microbatch_rows) == 0,
                "batch_tokens",
                batch_tokens,
                f"must be a multiple of sequence_length * microbatch_rows ({length} * {self.microbatch_rows})",
            )
        held_out = self.data.held_out_fraction
        require(held_out < 1, "held_out_fraction", held_out, "must leave text to train on")
        vocab_size = self.data.tokenizer.vocab_size
        require(
            vocab_size <= self.model.vocab_size,
            "tokenizer.vocab_size",
            vocab_size,
            f"must be at most the model's vocab_size ({self.model.vocab_size})",
        )

    @property
    def microbatch_rows(self) -> int:
        """Rows of one microbatch over all hosts; every batch of the ramp is a whole number of them."""
        return self.train.microbatch_rows or self.train.ramp[0][1] // self.data.sequence_length or 1
