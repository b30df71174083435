"""One run: everything that `gpt4moe train` needs, in one hashable object."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from gpt4moe.config.check import require, require_instance
from gpt4moe.config.data import DataConfig
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.optimizer import OptimizerConfig
from gpt4moe.config.rules import ShardingRules
from gpt4moe.config.train import TrainConfig
from gpt4moe.config.vision import VisionConfig

PARTS = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "mesh": MeshConfig,
    "rules": ShardingRules,
}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Model, data, optimizer, training length, mesh and sharding rules; checks what only their combination can show."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    rules: ShardingRules = dataclasses.field(default_factory=ShardingRules)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), PARTS[field.name]
            require_instance(f"RunConfig.{field.name}", value, kind)
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
                "change BATCH_TOKENS, SEQUENCE_LENGTH or MICROBATCH_ROWS",
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
        self._check_images()
        if -1 not in dict(self.mesh.axes).values():
            self.check_sizes(self.mesh.sizes(math.prod(size for _, size in self.mesh.axes)))

    def _check_images(self) -> None:
        vision, images = self.model.vision, self.data.images
        if images is None:
            return
        mend = "include gin_configs/variant/vision.gin, or set DataConfig.images to None"
        require(vision is not None, "images", images, "needs a model that reads them (ModelConfig.vision)", mend)
        for name in ("height", "width"):
            value, of_encoder = getattr(images, name), getattr(vision.encoder, name)
            constraint = f"must be the encoder's ({of_encoder})"
            require(value == of_encoder, f"ImageConfig.{name}", value, constraint, "set both from one macro")
        told_apart = max(vision.encoder.max_frames, vision.resampler.max_frames if vision.resampler else 0)
        constraint = f"must be at most max_frames of the encoder or the resampler ({told_apart})"
        mend = "raise max_frames: frames without an embedding are alike, whatever their order"
        require(images.frames <= told_apart, "ImageConfig.frames", images.frames, constraint, mend)

    @property
    def microbatch_rows(self) -> int:
        """Rows of one microbatch over all hosts; every batch of the ramp is a whole number of them."""
        return self.train.microbatch_rows or self.train.ramp[0][1] // self.data.sequence_length or 1

    def stage_microbatches(self, sizes: Mapping[str, int]) -> int:
        """Pieces (m) that the rows of a pass are cut into for the pipeline of a mesh with these axis sizes."""
        return self.mesh.stage_microbatches or self.microbatch_rows // self._batch_span(sizes)

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raises where layers, rows or sequence do not divide over a mesh with these axis sizes.

        Configurations without an inferred axis have been checked; one with -1 is checked when the mesh is made.
        """
        chunks = self.mesh.chunk_sizes(self.model.num_moe_layers, sizes["stage"])
        each = self.model.superblocks_per_cross_attention
        constraint = f"must be multiples of the {each} superblocks that share a block of cross-attention"
        whole = all(size % each == 0 for size in chunks)
        require(whole, "stage_layers", chunks, constraint, "change MESH, stage_layers or CrossAttentionConfig.every")
        recorded = self.train.record_routing
        constraint = f"needs a mesh without stages; this one has {sizes['stage']}"
        require(not recorded or sizes["stage"] == 1, "record_routing", recorded, constraint, "change MESH")
        self.check_dims(sizes)
        self._check_rows(sizes)
        span = sizes["context"] * (sizes["tensor"] if self.mesh.sequence_parallel else 1)
        axes = "context * tensor axes" if self.mesh.sequence_parallel else "context axis"
        require(
            self.data.sequence_length % span == 0,
            "sequence_length",
            self.data.sequence_length,
            f"must be divisible by the {axes} ({span})",
            "change SEQUENCE_LENGTH or MESH",
        )

    def check_dims(self, sizes: Mapping[str, int]) -> None:
        """Raises where a width of the model does not divide over the axes that its dim lies on."""
        model, moe = self.model, self.model.moe
        widths = (
            ("num_heads", "heads", model.attention.num_heads),
            ("num_kv_heads", "kv_heads", model.attention.num_kv_heads),
            ("vocab_size", "vocab", model.vocab_size),
            ("model_dim", "embed", model.model_dim),
            *((("num_experts", "experts", moe.num_experts),) if moe.num_experts > 1 else ()),  # one lies everywhere
            ("hidden_dim", "mlp", moe.hidden_dim),
            ("shared_hidden_dim", "mlp", moe.shared_hidden_dim),
            ("dense_hidden_dim", "mlp", model.dense_hidden_dim or 0),
            *(_vision_widths(model.vision) if model.vision else ()),
        )
        for setting, dim, width in widths:
            axes = self.rules.axes_of(dim)
            span = math.prod(sizes[axis] for axis in axes)
            constraint = f"must be divisible by the {'*'.join(axes)} axis of the mesh ({span})"
            require(width % span == 0, setting, width, constraint, f"change {setting} or the mesh")

    def _check_rows(self, sizes: Mapping[str, int]) -> None:
        rows, span, pieces = self.microbatch_rows, self._batch_span(sizes), self.mesh.stage_microbatches or 1
        axes = f"{'*'.join(self.rules.batch_axes)} axes ({span})"
        times = f" times stage_microbatches ({pieces})" if pieces > 1 else ""
        mend = f"change MICROBATCH_ROWS, the batch, MESH{' or stage_microbatches' if times else ''}"
        require(rows % (span * pieces) == 0, "microbatch_rows", rows, f"must be divisible by the {axes}{times}", mend)
        virtual, stages, pieces = self.mesh.virtual_stages, sizes["stage"], self.stage_microbatches(sizes)
        constraint = f"needs at least as many microbatches in a pass ({pieces}) as stages ({stages})"
        mend = "raise stage_microbatches or MICROBATCH_ROWS, or set virtual_stages to 1"
        require(virtual == 1 or pieces >= stages, "virtual_stages", virtual, constraint, mend)

    def _batch_span(self, sizes: Mapping[str, int]) -> int:
        return math.prod(sizes[axis] for axis in self.rules.batch_axes)


def _vision_widths(config: VisionConfig) -> tuple[tuple[str, str, int], ...]:
    """Setting, logical dim and size of each width of an adapter."""
    cross, encoder = config.cross_attention, config.encoder
    return (
        ("CrossAttentionConfig.num_heads", "heads", cross.num_heads),
        ("CrossAttentionConfig.num_kv_heads", "kv_heads", cross.kv_heads),
        ("CrossAttentionConfig.hidden_dim", "mlp", cross.hidden_dim),
        ("EncoderConfig.num_heads", "heads", encoder.num_heads),
        ("EncoderConfig.dim", "vision_embed", encoder.dim),
        ("EncoderConfig.hidden_dim", "mlp", encoder.hidden_dim),
    )
