"""The weights that decode: a `Transformer` taken apart, layer by layer, into matrices as they are multiplied.

In: a model whose layers lie in stacks, in float32. Out: one pytree a layer, unstacked (a loop over stacks copies each
layer's matrices at every token), in the dtype they are multiplied in or as integers, those that share their operand
side by side in one matrix. Experts are matrices of their own on a CPU, which reads only those that a token goes to, and
stacked where a kernel takes them by number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Float32

from gpt4moe.config.model import ModelConfig
from gpt4moe.infer.matrix import Matrix, PackedMatrix, joined, make_matrix, pack, unpack
from gpt4moe.model.transformer import Transformer
from gpt4moe.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionWeights:
    """in_DJ: queries, keys and values of all heads side by side, J = (N + 2M) H; out_JD from N H.

    The norms of queries and keys are scales [H], None without `qk_norm`.
    """

    in_DJ: Matrix | PackedMatrix
    out_JD: Matrix | PackedMatrix
    query_norm_H: Float32[Array, " H"] | None
    key_norm_H: Float32[Array, " H"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeedForwardWeights:
    """in_DJ: gate and up side by side, J = 2F, or up alone where it is not gated; stacked experts lead with E."""

    in_DJ: Matrix | PackedMatrix
    down_FD: Matrix | PackedMatrix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeWeights:
    """experts: one of each, or all in one stack; router in float32."""

    router_DE: Float32[Array, "D E"]
    router_bias_E: Float32[Array, " E"] | None
    experts: tuple[FeedForwardWeights, ...] | FeedForwardWeights
    shared: FeedForwardWeights | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One layer; `cross` are the parameters of the cross-attention before it, None where there is none."""

    attention_norm_D: Float32[Array, " D"]
    attention: AttentionWeights
    feed_forward_norm_D: Float32[Array, " D"]
    feed_forward: FeedForwardWeights | MoeWeights
    cross: nnx.State | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderWeights:
    """Everything that decoding reads; embedding_VD enters the residual stream as it is, without a factor.

    Of a pipeline stage: some layers; the embedding of the first one alone, final norm and unembedding of the last one.
    eyes: the parameters of the vision encoder and the resampler, None for a text model.
    """

    embedding_VD: Float[Array, "V D"] | None
    layers: tuple[LayerWeights, ...]
    final_norm_D: Float32[Array, " D"] | None
    unembedding_DV: Matrix | None
    eyes: tuple[nnx.State, nnx.State | None] | None = None


@dataclasses.dataclass(frozen=True)
class Form:
    """How parameters become matrices.

    quantize: see `gpt4moe.infer.matrix.make_matrix`; embedding, head, router and norms stay in float. product: see
    `gpt4moe.infer.matrix.Matrix`. stacked: experts of a layer in one array instead of one each.
    """

    dtype: jnp.dtype
    quantize: str | None
    product: str
    stacked: bool
    packed: bool


def take_apart(model: Transformer, form: Form) -> DecoderWeights:
    """Returns the weights of `model` for decoding; may be traced."""
    config = model.config
    as_matrix, dtype = _Maker(form), form.dtype
    layers = [as_matrix.layer(nnx.state(block), config) for block in model.leading_blocks]
    order = model.layout.order(config.num_moe_layers)
    crossing = _cross_layers(model, dtype)
    each, before = config.superblocks_per_cross_attention, _offset(config)
    for index, slot in enumerate(order):
        for number, block in enumerate([*model.dense_blocks, model.blocks]):
            state = jax.tree.map(lambda leaf, slot=slot: leaf[slot], nnx.state(block))
            reads = crossing is not None and number == 0 and index % each == before
            layers.append(as_matrix.layer(state, config, crossing[index // each] if reads else None))
    embedding_VD = (model.embedding[...] / config.embedding_std).astype(dtype)
    eyes = None
    if config.vision:
        eyes = tuple(None if part is None else nnx.state(part) for part in (model.vision_encoder, model.resampler))
    head_DV = make_matrix(model.unembedding().T, dtype, None, form.product)
    weights = DecoderWeights(embedding_VD, tuple(layers), _in_float(model.final_norm.scale), head_DV, eyes)
    return _each_matrix(pack, weights) if form.packed else weights


def unpacked(weights: DecoderWeights) -> DecoderWeights:
    """Returns weights whose matrices can be cut."""
    return _each_matrix(unpack, weights)


def _each_matrix(change: Callable, weights: DecoderWeights) -> DecoderWeights:
    kinds = Matrix, PackedMatrix
    return jax.tree.map(
        lambda leaf: change(leaf) if isinstance(leaf, kinds) else leaf, weights, is_leaf=lambda x: isinstance(x, kinds)
    )


@dataclasses.dataclass(frozen=True)
class _Maker:
    """Parameters of a layer as matrices."""

    form: Form

    def layer(self, state: nnx.State, config: ModelConfig, cross: nnx.State | None = None) -> LayerWeights:
        has_experts = "moe" in state
        part = self._moe(state["moe"]) if has_experts else self._feed_forward(state["dense"])
        norms = [_in_float(state[name]["scale"]) for name in ("attention_norm", "feed_forward_norm")]
        return LayerWeights(norms[0], self._attention(state["attention"], config), norms[1], part, cross)

    def _attention(self, state: nnx.State, config: ModelConfig) -> AttentionWeights:
        dim = config.model_dim
        inward = [state[name][...].reshape(dim, -1) for name in ("query", "key", "value")]
        names = ("query_norm", "key_norm")
        norms = [_in_float(state[name]["scale"]) if config.attention.qk_norm else None for name in names]
        return AttentionWeights(self._joined(inward), self._matrix(state["output"][...].reshape(-1, dim)), *norms)

    def _moe(self, state: nnx.State) -> MoeWeights:
        experts, bias = state["experts"], state.get("router_bias")
        if self.form.stacked:
            every = self._feed_forward(experts)
        else:
            num = experts["up"][...].shape[0]
            every = tuple(self._feed_forward(jax.tree.map(lambda leaf, e=e: leaf[e], experts)) for e in range(num))
        shared = self._feed_forward(state["shared_expert"]) if "shared_expert" in state else None
        return MoeWeights(_in_float(state["router"]), None if bias is None else _in_float(bias), every, shared)

    def _feed_forward(self, state: nnx.State) -> FeedForwardWeights:
        inward = [state[name][...] for name in ("gate", "up") if name in state]
        return FeedForwardWeights(self._joined(inward), self._matrix(state["down"][...]))

    def _matrix(self, w_IJ: Array) -> Matrix:
        form = self.form
        return make_matrix(w_IJ, form.dtype, form.quantize, form.product)

    def _joined(self, matrices: list[Array]) -> Matrix:
        return joined([self._matrix(w_IJ) for w_IJ in matrices])


def _in_float(parameter: nnx.Variable) -> Array:
    """float32, as norms and router are computed, however parameters are kept."""
    return parameter[...].astype(jnp.float32)


def _offset(config: ModelConfig) -> int:
    """Which superblock of a group cross-attention goes before."""
    return config.vision.cross_attention.offset // config.moe_every if config.vision else 0


def _cross_layers(model: Transformer, dtype: jnp.dtype) -> list[nnx.State] | None:
    """The parameters of each block of cross-attention, matrices in `dtype`; None without vision."""
    config = model.config
    if config.vision is None:
        return None
    each = config.superblocks_per_cross_attention
    slots = [slot // each for slot in model.layout.order(config.num_moe_layers)[::each]]

    def own(leaf: Array, slot: int) -> Array:
        part = leaf[slot]
        return part.astype(dtype) if part.ndim > 1 else part

    state = nnx.state(model.cross_attention)
    return [jax.tree.map(lambda leaf, slot=slot: own(leaf, slot), state) for slot in slots]
