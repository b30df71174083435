"""A decoder cut into pipeline stages, each laid out over the devices of its own: expert x tensor.

In: a decoder and a mesh with the axes stage, expert and tensor. Out: a decoder for each stage, the first with the
embedding, the last with the unembedding. Stages are programs of their own, so that they may hold different numbers of
layers (the head node of the reference holds fewer) and memory for no others.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt4moe.config.check import require
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.infer.decode_weights import (
    AttentionWeights,
    DecoderWeights,
    FeedForwardWeights,
    LayerWeights,
    MoeWeights,
    unpacked,
)
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.matrix import Matrix
from gpt4moe.infer.shards import EXPERT, TENSOR, Shards
from gpt4moe.parallel.island import Axes
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.types import Array

SPLITTING = ("stage", EXPERT, TENSOR)


def check_axes(config: MeshConfig) -> None:
    """Raises `CallerError` for axes that tokens are not served over."""
    for axis, size in config.axes:
        serves = size == 1 or axis in SPLITTING
        require(serves, axis, size, "must be 1 where tokens are served", f"use {', '.join(SPLITTING)}")


def cut(decoder: Decoder, config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> tuple[Decoder, ...]:
    """Returns the decoders of the stages in order; the one decoder as it is where `config` names no axis.

    `config.stage_layers` are superblocks of each stage, as in training; layers before the first superblock go to the
    first stage. Raises `CallerError` for a mesh that the model does not divide over.
    """
    if not config.axes:
        return (decoder,)
    check_axes(config)
    mesh = make_mesh(config, devices)
    sizes = dict(mesh.shape)
    num_stages, model = sizes["stage"], decoder.config
    _check_divides(model, sizes[EXPERT], sizes[TENSOR])
    one = num_stages == 1 or model.vision is None
    require(one, "stage", num_stages, "must be 1 for a model that reads images", "use the axes expert and tensor")
    superblocks = config.for_generation().chunk_sizes(model.num_moe_layers, num_stages)
    numbers = [superblock * model.moe_every for superblock in superblocks]
    numbers[0] += model.leading_dense_layers
    parts = _weights_of_stages(unpacked(decoder.weights), numbers)
    before = itertools.accumulate(superblocks[:-1], initial=0)
    grids, stages = mesh.devices.reshape([sizes[axis] for axis in SPLITTING]), []
    for grid, weights, experts in zip(grids, parts, before, strict=True):
        shards = Shards(Mesh(grid, (EXPERT, TENSOR), axis_types=(AxisType.Auto,) * 2))
        laid_out = _Placer(shards, model).weights(weights)
        stages.append(dataclasses.replace(decoder, weights=laid_out, shards=shards, moe_layers_before=experts))
    return tuple(stages)


def _weights_of_stages(whole: DecoderWeights, numbers: Sequence[int]) -> list[DecoderWeights]:
    """The weights of stages with so many layers."""
    bounds = itertools.pairwise(itertools.accumulate(numbers, initial=0))
    inner = dataclasses.replace(whole, embedding_VD=None, final_norm_D=None, unembedding_DV=None)
    parts = [dataclasses.replace(inner, layers=whole.layers[start:stop]) for start, stop in bounds]
    parts[0] = dataclasses.replace(parts[0], embedding_VD=whole.embedding_VD)
    last = {"final_norm_D": whole.final_norm_D, "unembedding_DV": whole.unembedding_DV}
    parts[-1] = dataclasses.replace(parts[-1], **last)
    return parts


def _check_divides(model: ModelConfig, expert: int, tensor: int) -> None:
    heads, kv_heads = model.attention.num_heads, model.attention.num_kv_heads
    constraint = f"must divide the attention heads ({heads})"
    require(heads % tensor == 0, TENSOR, tensor, constraint)
    even = kv_heads % tensor == 0 or tensor % kv_heads == 0
    require(even, TENSOR, tensor, f"must divide the key/value heads ({kv_heads}) or be a multiple of them")
    require(model.moe.num_experts % expert == 0, EXPERT, expert, f"must divide the experts ({model.moe.num_experts})")
    both = f"{EXPERT} x {TENSOR}", expert * tensor
    hidden = [("an expert", model.moe.hidden_dim, TENSOR, tensor)]
    hidden += [("a shared expert", model.moe.shared_hidden_dim, *both)]
    if model.moe_every > 1 or model.leading_dense_layers:
        hidden += [("a dense layer", model.dense_hidden_dim, *both)]
    for name, dim, axes, parts in hidden:
        require(dim % parts == 0, axes, parts, f"must divide the hidden dims of {name} ({dim})")


@dataclasses.dataclass(frozen=True)
class _Placer:
    """Puts weights where they belong, with columns in such an order that every device's part is whole heads, ..."""

    shards: Shards
    model: ModelConfig

    def weights(self, given: DecoderWeights) -> DecoderWeights:
        embedding_VD, head_DV, parts = given.embedding_VD, given.unembedding_DV, self.shards.tensor
        if embedding_VD is not None:
            embedding_VD = self._put(embedding_VD, None, TENSOR if self.model.model_dim % parts == 0 else None)
        if head_DV is not None:
            split = self.model.vocab_size % parts == 0
            head_DV = self._columns(head_DV, None, (TENSOR,)) if split else self._everywhere(head_DV)
        return DecoderWeights(
            embedding_VD,
            tuple(self._layer(layer) for layer in given.layers),
            self._everywhere(given.final_norm_D),
            head_DV,
            self._everywhere(given.eyes),
        )

    def _layer(self, layer: LayerWeights) -> LayerWeights:
        part = layer.feed_forward
        part = self._moe(part) if isinstance(part, MoeWeights) else self._feed_forward(part, self.shards.hidden)
        norms = [self._everywhere(norm_D) for norm_D in (layer.attention_norm_D, layer.feed_forward_norm_D)]
        return LayerWeights(norms[0], self._attention(layer.attention), norms[1], part, self._everywhere(layer.cross))

    def _attention(self, given: AttentionWeights) -> AttentionWeights:
        norms = self._everywhere((given.query_norm_H, given.key_norm_H))
        in_DJ = self._columns(given.in_DJ, self._order_of_heads(), self.shards.heads)
        return AttentionWeights(in_DJ, self._rows(given.out_JD, self.shards.heads), *norms)

    def _order_of_heads(self) -> np.ndarray:
        """Columns of queries, keys and values, device by device; heads that several need stand there as often."""
        attention, parts = self.model.attention, self.shards.tensor
        heads, kv_heads = attention.num_heads, attention.num_kv_heads
        kept = np.repeat(np.arange(kv_heads), max(1, parts // kv_heads)).reshape(parts, -1)
        mine = [np.arange(heads).reshape(parts, -1), heads + kept, heads + kv_heads + kept]
        columns = np.concatenate(mine, axis=1)[..., None] * self.model.head_dim + np.arange(self.model.head_dim)
        return columns.ravel()

    def _moe(self, given: MoeWeights) -> MoeWeights:
        experts = given.experts
        if isinstance(experts, tuple):
            # A device's matrices stay apart: the i-th array is the i-th matrix of every device.
            held = len(experts) // self.shards.expert
            mates = [experts[place::held] for place in range(held)]
            experts = tuple(
                self._feed_forward(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), self.shards.heads, EXPERT)
                for each in mates
            )
        else:
            experts = self._feed_forward(experts, self.shards.heads, EXPERT)
        shared = None if given.shared is None else self._feed_forward(given.shared, self.shards.hidden)
        router = self._everywhere((given.router_DE, given.router_bias_E))
        return MoeWeights(*router, experts, shared)

    def _feed_forward(self, given: FeedForwardWeights, axes: Axes, *stack: str) -> FeedForwardWeights:
        hidden = given.down_FD.values_JI.shape[-1]
        parts = int(np.prod([self.shards.mesh.shape[axis] for axis in axes]))
        # Gate and up, or up alone, each in parts.
        order = np.arange(given.in_DJ.values_JI.shape[-2]).reshape(-1, parts, hidden // parts).swapaxes(0, 1).ravel()
        return FeedForwardWeights(
            self._columns(given.in_DJ, order, axes, *stack), self._rows(given.down_FD, axes, *stack)
        )

    def _columns(self, matrix: Matrix, order: np.ndarray | None, axes: Axes, *stack: str) -> Matrix:
        """The columns J in parts, in another order."""
        values_JI, scale_J = matrix.values_JI, matrix.scale_J
        if order is not None:
            values_JI = values_JI[..., order, :]
            scale_J = None if scale_J is None else scale_J[..., order]
        scale_J = None if scale_J is None else self._put(scale_J, *stack, axes)
        return Matrix(self._put(values_JI, *stack, axes, None), scale_J, matrix.product)

    def _rows(self, matrix: Matrix, axes: Axes, *stack: str) -> Matrix:
        """What is summed over, I, in parts."""
        scale_J = None if matrix.scale_J is None else self._put(matrix.scale_J, *stack, None)
        return Matrix(self._put(matrix.values_JI, *stack, None, axes), scale_J, matrix.product)

    def _everywhere(self, tree: object) -> object:
        return jax.tree.map(self._put, tree)

    def _put(self, x: Array, *spec: str | Axes | None) -> Array:
        return jax.device_put(x, NamedSharding(self.shards.mesh, PartitionSpec(*spec)))
