"""The decoder-only transformer: embedding, scanned layers, final norm, logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Float32, Int, UInt32

from gpt4moe.config.mesh import grouped_placement
from gpt4moe.config.model import ModelConfig
from gpt4moe.model.attention import Attention
from gpt4moe.model.cache import KVCache, init_cache
from gpt4moe.model.cross_attention import GatedCrossAttention, Media, look
from gpt4moe.model.layers import FeedForward, Linear, RMSNorm, Slots, depth_scale, normal_parameter, rematerialised
from gpt4moe.model.layout import ONE_DEVICE, Layout, is_unrolled, scan_layers
from gpt4moe.model.moe import Moe, MoeOut, RoutedTokens
from gpt4moe.model.resampler import Resampler
from gpt4moe.model.rope import Rotation, rotation
from gpt4moe.model.vision import VisionEncoder
from gpt4moe.types import Array

INITIAL_SELF_LOGIT = 4.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransformerOut:
    """moe: sums of every layer with experts, leading L; cache: with the new keys and values (None without one).

    With choices, `moe.choices` has those of every token, [L, B, T, K].
    idle_slots: of a pipeline, how many superblock slots its stages had no work for, and how many there were in all.
    cross_weights_LBTNS: those of every block of cross-attention, where asked for.
    """

    moe: MoeOut
    cache: KVCache | None
    idle_slots: Int[Array, 2] | None
    cross_weights_LBTNS: Float32[Array, "L B T N S"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What every layer needs to know of the tokens: token_ids, positions, segment_ids [B, T] and their rotation.

    keys_B2: data of a random key for every row; replay_ids_BTLK: expert choices of every layer; media: the images of
    the rows; None without them.
    """

    token_ids_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    segment_ids_BT: Int[Array, "B T"]
    turn: Rotation
    keys_B2: UInt32[Array, "B 2"] | None
    replay_ids_BTLK: Int[Array, "B T L K"] | None
    media: Media | None

    def routed(self, layer: Array) -> RoutedTokens:
        """What the router of the `layer`-th layer with experts needs of them."""
        keys_B = None
        if self.keys_B2 is not None:
            keys_B = jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(self.keys_B2), layer)
        replay_BTK = None if self.replay_ids_BTLK is None else self.replay_ids_BTLK[:, :, layer]
        return RoutedTokens(self.token_ids_BT, self.segment_ids_BT > 0, keys_B, replay_BTK)


@dataclasses.dataclass(frozen=True)
class Mode:
    """dropless: as evaluation and decoding must be (see `Moe`); with_choices: report those of every token."""

    dropless: bool
    with_choices: bool


class Block(nnx.Module):
    """Pre-norm attention and a feed-forward, each added to the residual stream: experts (`moe`) or `dense`."""

    def __init__(self, layers: Slots | None, config: ModelConfig, layout: Layout, has_experts: bool, rngs: nnx.Rngs):
        out_scale = depth_scale(config.num_layers)
        self.attention_norm = RMSNorm(layers, config.model_dim, config.norm_epsilon)
        self.attention = Attention(layers, config, layout, out_scale, rngs)
        self.feed_forward_norm = RMSNorm(layers, config.model_dim, config.norm_epsilon)
        if has_experts:
            self.moe = Moe(layers, config.model_dim, config.moe, layout, out_scale, rngs)
        else:
            hidden = config.dense_hidden_dim
            self.dense = FeedForward(layers, config.model_dim, hidden, config.moe.gated, out_scale, rngs)
        self.has_experts, self.residual = has_experts, layout.residual

    def __call__(
        self, x_BTD: Float[Array, "B T D"], tokens: Tokens, cache: KVCache | None, mode: Mode, layer: Array
    ) -> tuple[Float[Array, "B T D"], KVCache | None, MoeOut | None]:
        """Returns the residual stream after the layer, the layer's cache and, with experts, its sums.

        `layer` counts the layers with experts, int32 [].
        """
        attended, cache = self.attention(
            self.attention_norm(x_BTD), tokens.turn, tokens.positions_BT, tokens.segment_ids_BT, cache
        )
        x_BTD = self.residual(x_BTD + attended)
        normed = self.feed_forward_norm(x_BTD)
        if not self.has_experts:
            return self.residual(x_BTD + self.dense(normed)), cache, None
        y_BTD, out = self.moe(normed, tokens.routed(layer), **vars(mode))
        return self.residual(x_BTD + y_BTD), cache, out


class Transformer(nnx.Module):
    """Parameters of `blocks` (layers with experts) and of each of `dense_blocks` are stacked over superblocks.

    A superblock is `moe_every` layers, the last of which has experts; the forward pass scans over superblocks. Before
    them come the `leading_blocks`, dense and each with parameters of its own; on a pipeline every stage runs them.
    Where the model reads images, a block of `cross_attention` goes before every few superblocks, which are scanned
    together with it; rows without images pass by all that vision adds.
    Initialisation: embeddings have deviation `embedding_std` and enter the residual stream at unit deviation, so
    that the first router tells tokens apart before it sees what attention made of their context; the final norm begins
    at the scale that gives a tied head a logit of 4 for the token just read, whatever the width. Matrices have
    deviation fan_in^-1/2, those that write to the residual stream are scaled by 1/sqrt(2L) more.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, layout: Layout = ONE_DEVICE):
        shape, axes, std = (config.vocab_size, config.model_dim), ("vocab", "embed"), config.embedding_std
        self.embedding = normal_parameter(rngs, None, shape, axes, std)
        slots, leading = layout.slots or tuple(range(config.num_moe_layers)), range(config.leading_dense_layers)
        self.leading_blocks = nnx.List([Block(None, config, layout, False, rngs) for _ in leading])
        self.dense_blocks = nnx.List([Block(slots, config, layout, False, rngs) for _ in range(config.moe_every - 1)])
        self.blocks = Block(slots, config, layout, True, rngs)
        logit_scale = INITIAL_SELF_LOGIT / (config.model_dim * config.embedding_std)
        self.final_norm = RMSNorm(None, config.model_dim, config.norm_epsilon, initial=logit_scale)
        self.head = None if config.tie_embeddings else normal_parameter(rngs, None, shape, axes, std)
        self.config, self.layout = config, layout
        if config.vision:
            self._add_vision(config, slots, rngs)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        *,
        dropless: bool = False,
        cache: KVCache | None = None,
        keys_B2: UInt32[Array, "B 2"] | None = None,
        replay_ids_BTLK: Int[Array, "B T L K"] | None = None,
        with_choices: bool = False,
        media: Media | None = None,
        with_cross_weights: bool = False,
    ) -> tuple[Float[Array, "B T D"], TransformerOut]:
        """Returns x_BTD after the final norm, in the compute dtype, and what the layers report.

        Tokens see their own segment up to themselves; segment 0 is padding, routed nowhere. With `cache`, valid
        tokens are written at their positions and see every slot up to them: prefill and decode are the same call.
        `dropless` overrides the capacity factor, as evaluation and decoding must. `keys_B2` are for routers that draw
        at random in training; `replay_ids_BTLK` forces expert choices (-1: none); `with_choices` reports them. `media`
        are the images of the rows (`look`); without them the model is the text model. `with_cross_weights` reports what
        `GatedCrossAttention.weights` gives, not in a pipeline.
        """
        config = self.config
        turn = rotation(positions_BT, config.head_dim, config.attention.rope_theta)
        tokens = Tokens(tokens_BT, positions_BT, segment_ids_BT, turn, keys_B2, replay_ids_BTLK, media)
        mode = Mode(dropless, with_choices)
        x_BTD = self.layout.residual(self._embed(tokens_BT))
        x_BTD, leading = self._leading_layers(x_BTD, cache, tokens, mode)
        group, layers = self._stack(mode, media, with_cross_weights)
        size = config.moe_every * (1 if media is None else config.superblocks_per_cross_attention)
        stacked = _stack_superblocks(cache, size)
        x_BTD, stacked, reports, idle = self.layout.run_layers(group, layers, stacked, x_BTD, tokens)
        moe, weights = (reports, None) if media is None else reports
        if media is not None:  # [groups, superblocks of a group, ...]
            moe = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), moe)
        return self.final_norm(x_BTD), TransformerOut(moe, _unstack_superblocks(stacked, leading), idle, weights)

    def look(
        self,
        images: Array,
        image_valid: Bool[Array, "B I *frames"],
        image_index_BT: Int[Array, "B T"],
        first_image_BT: Int[Array, "B T"],
    ) -> Media:
        """Returns what every token sees of the images, all as `types.Batch` has them (float pixels are normalised)."""
        sees, eyes = self.config.vision.cross_attention.sees, (self.vision_encoder, self.resampler)
        return look(*eyes, sees, images, image_valid, image_index_BT, first_image_BT)

    def keep(self, media: Media) -> Media:
        """Returns `media` with the keys and values of every block of cross-attention, which decoding needs again."""
        graph, parameters = nnx.split(self.cross_attention)
        keys, values = jax.vmap(lambda block: nnx.merge(graph, block).keys_values(media.features_BIRD))(parameters)
        return dataclasses.replace(media, keys=keys, values=values)

    def init_cache(self, batch_rows: int, max_length: int) -> KVCache:
        """Returns an empty cache for `max_length` tokens of `batch_rows` rows, in the compute dtype."""
        slots = self.layout.slots or range(self.config.num_moe_layers)
        return init_cache(self.config, batch_rows, max_length, num_layers=len(slots) * self.config.moe_every)

    def logits(self, x_BTD: Float[Array, "... D"]) -> Float32[Array, "... V"]:
        """Returns float32 logits [..., V] of final hidden states."""
        weight_VD = self.unembedding().astype(x_BTD.dtype)
        return jnp.einsum("...D,VD->...V", x_BTD, weight_VD, preferred_element_type=jnp.float32)

    def unembedding(self) -> Float[Array, "V D"]:
        """Returns the matrix [V, D] that logits are products with: the embedding where they are tied."""
        return (self.embedding if self.head is None else self.head)[...]

    def _add_vision(self, config: ModelConfig, slots: Slots, rngs: nnx.Rngs) -> None:
        """Encoder, resampler and cross-attention, drawn after everything of the text model, which stays as it is."""
        vision, each = config.vision, config.superblocks_per_cross_attention
        given = {"compute_dtype": config.compute_dtype, "rngs": rngs, "by_row": self.layout.by_row}
        self.vision_encoder = VisionEncoder(vision.encoder, remat=config.remat, **given)
        dim = vision.encoder.dim
        self.resampler = Resampler(vision.resampler, dim, **given) if vision.resampler else None
        self.cross_attention = GatedCrossAttention(
            grouped_placement(slots, each), config, rngs, self.layout.attend_across
        )
        classes = vision.spelling.num_ids + 1 if vision.spelling else 0
        self.spelling = Linear(None, (dim, classes), ("vision_embed", "position"), rngs) if classes else None

    def _stack(self, mode: Mode, media: Media | None, with_weights: bool) -> tuple[Callable, tuple]:
        """The function of one step of the scan over layers, and the parameters of every step, to be scanned over."""
        config, scans = self.config, self.layout.run_layers is scan_layers
        each = 1 if media is None else config.superblocks_per_cross_attention
        in_loop = not scans or not is_unrolled(config.num_moe_layers // each)
        superblock, parameters = self._layers([*self.dense_blocks, self.blocks], mode, in_loop=in_loop)
        text = parameters, jnp.array(self.layout.slots or range(config.num_moe_layers), jnp.int32)
        if media is None:
            return superblock, text
        graph, crossing = nnx.split(self.cross_attention)
        read = functools.partial(_read, graph=graph, with_weights=with_weights)
        read = rematerialised(read, config.remat, in_loop=in_loop)
        group = functools.partial(_group, read=read, superblock=superblock, config=config)
        kept = None if media.keys is None or not scans else (media.keys, media.values)
        text = jax.tree.map(lambda leaf: leaf.reshape(-1, each, *leaf.shape[1:]), text)
        return group, (text, (crossing, kept))

    def _layers(self, blocks: Sequence[Block], mode: Mode, *, in_loop: bool) -> tuple[Callable, nnx.State]:
        """A function of these layers, one after the other, under the remat policy, and their parameters."""
        graph, parameters = nnx.split(nnx.List(blocks))
        superblock = functools.partial(_superblock, graph=graph, mode=mode)
        return rematerialised(superblock, self.config.remat, in_loop=in_loop), parameters

    def _leading_layers(self, x_BTD: Array, cache: KVCache | None, tokens: Tokens, mode: Mode) -> tuple[Array, tuple]:
        """The residual stream after the layers before the stack, and their caches."""
        caches = []
        for index, block in enumerate(self.leading_blocks):
            step, parameters = self._layers([block], mode, in_loop=False)
            layer = jnp.int32(-1)  # numbers are of layers with experts, for their routers
            before = None if cache is None else cache.leading[index]
            x_BTD, layer_cache, _ = step(x_BTD, (parameters, layer), before, tokens)
            caches.append(layer_cache)
        return x_BTD, tuple(caches)

    def _embed(self, tokens_BT: Array) -> Array:
        x_BTD = jnp.take(self.embedding[...], tokens_BT, axis=0) / self.config.embedding_std
        return x_BTD.astype(self.config.compute_dtype)


def _superblock(
    x_BTD: Array,
    layers: tuple[nnx.State, Array],
    cache: KVCache | None,
    tokens: Tokens,
    at: tuple = (),
    *,
    graph: nnx.GraphDef,
    mode: Mode,
) -> tuple[Array, KVCache | None, MoeOut | None]:
    # Taken from their stack in here, so that a backward pass that recomputes the layer keeps no copy of its parameters.
    parameters, number = jax.tree.map(lambda leaf: leaf[at], layers)
    caches = []
    for index, block in enumerate(nnx.merge(graph, parameters)):
        layer_cache = jax.tree.map(lambda leaf, i=index: leaf[i], cache)
        x_BTD, layer_cache, moe = block(x_BTD, tokens, layer_cache, mode, number)
        caches.append(layer_cache)
    return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches), moe


def _read(
    x_BTD: Array, crossing: tuple, media: Media, at: tuple, *, graph: nnx.GraphDef, with_weights: bool
) -> tuple[Array, Array | None]:
    """The residual stream after a block of cross-attention, and its weights where asked for."""
    parameters, kept = jax.tree.map(lambda leaf: leaf[at], crossing)
    block = nnx.merge(graph, parameters)
    return block(x_BTD, media, kept), block.weights(x_BTD, media) if with_weights else None


def _group(
    x_BTD: Array,
    layers: tuple,
    cache: KVCache | None,
    tokens: Tokens,
    at: tuple = (),
    *,
    read: Callable,
    superblock: Callable,
    config: ModelConfig,
) -> tuple[Array, KVCache | None, tuple[MoeOut, Array | None]]:
    """Superblocks one after the other, cross-attention before one of them; reports lead with a dim over superblocks."""
    (text, crossing), size = layers, config.moe_every
    before = config.vision.cross_attention.offset // size
    reports, caches = [], []
    for index in range(config.superblocks_per_cross_attention):
        if index == before:
            x_BTD, weights = read(x_BTD, crossing, tokens.media, at)
        here = jax.tree.map(lambda leaf, start=index * size: leaf[start : start + size], cache)
        # Where the stack is at hand whole, a superblock takes its parameters from it (see there).
        own = text if at else jax.tree.map(lambda leaf, index=index: leaf[index], text)
        x_BTD, here, report = superblock(x_BTD, own, here, tokens, (*at, index) if at else ())
        reports.append(report)
        caches.append(here)
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *caches)
    return x_BTD, joined, (jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports), weights)


def _stack_superblocks(cache: KVCache | None, size: int) -> KVCache | None:
    if cache is None:
        return None
    keys, values = (leaf.reshape(-1, size, *leaf.shape[1:]) for leaf in (cache.keys, cache.values))
    return KVCache(keys, values)


def _unstack_superblocks(cache: KVCache | None, leading: tuple) -> KVCache | None:
    if cache is None:
        return None
    keys, values = (leaf.reshape(-1, *leaf.shape[2:]) for leaf in (cache.keys, cache.values))
    return KVCache(keys, values, leading)
