"""The decoder: one pure function for chunks of prompts and for single tokens, over pages of keys and values.

In: weights taken apart (`decode_weights`), tokens of rows that stand at different positions, pages and their table.
Out: final hidden states, the pages with the tokens in them, where the tokens were routed. Equal to
`Transformer(..., dropless=True)` of the rows' whole texts; every settings of `ModelConfig` decodes here.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Float32, Int

from gpt4moe.config.check import require
from gpt4moe.config.model import ModelConfig
from gpt4moe.infer import int8_product
from gpt4moe.infer import pages as paging
from gpt4moe.infer.decode_weights import (
    AttentionWeights,
    DecoderWeights,
    FeedForwardWeights,
    Form,
    LayerWeights,
    MoeWeights,
    take_apart,
)
from gpt4moe.infer.expert_rows import feed_forward, serve
from gpt4moe.infer.matrix import PRODUCTS, times
from gpt4moe.infer.paged_attention import attend
from gpt4moe.infer.pages import Pages, Places
from gpt4moe.infer.shards import ALONE, Shards
from gpt4moe.model import cross_attention
from gpt4moe.model.cross_attention import Media
from gpt4moe.model.layers import rms_normed
from gpt4moe.model.moe import Choices, RoutedTokens, route_rows
from gpt4moe.model.rope import Rotation, rotate, rotation
from gpt4moe.model.router import Routing
from gpt4moe.model.transformer import Transformer
from gpt4moe.types import Array

# By backend; elsewhere, on a CPU, it is "dot".
FASTEST_PRODUCT = {"gpu": "reduction"}
FREE = -2  # in the place of an expert to force: the router chooses


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeReport:
    """load_LE: choices of each expert in each layer with experts, int32; an expert of load 0 was not read.

    choices: where every token went, [L, B, T, K] each, where asked for; None otherwise.
    """

    load_LE: Int[Array, "L E"]
    choices: Choices | None = None


@dataclasses.dataclass(frozen=True)
class _Step:
    """What every layer needs to know of the tokens of a call."""

    tokens_BT: Array
    positions_BT: Array
    valid_BT: Array
    turn: Rotation
    table_BX: Array
    at: Places
    media: Media | None
    replay_ids_BTLK: Array | None


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Weights and what is static about them: pass `decoder.weights` to compiled functions, close over the rest.

    dtype: of activations and of pages. cross, eyes: the definitions of the modules of vision, None for a text model.
    shards: how the weights lie over devices; where they do, functions are those of a device, inside an island.
    moe_layers_before: layers with experts of the pipeline stages before this one.
    """

    weights: DecoderWeights
    config: ModelConfig
    dtype: jnp.dtype
    cross: nnx.GraphDef | None = None
    eyes: tuple[nnx.GraphDef, nnx.GraphDef | None] | None = None
    shards: Shards = ALONE
    moe_layers_before: int = 0

    @classmethod
    def of(
        cls, model: Transformer, *, dtype: str | None = None, quantize: str | None = None, product: str | None = None
    ) -> Decoder:
        """Returns the decoder of a model in `dtype` (None: its compute dtype).

        quantize: "int8" or "fp8" for the matrices of experts and attention, by column; int8 is multiplied by this
        machine's own product where there is one (`gpt4moe.infer.int8_product`). product: how one or a few rows are
        multiplied (`gpt4moe.infer.matrix.PRODUCTS`; None: the fastest on the backend); with another than "dot" the
        experts of a layer lie in one array. A model of abstract arrays has abstract weights. Raises `CallerError` for a
        name it does not know.
        """
        config, as_dtype = model.config, jnp.dtype(dtype or model.config.compute_dtype)
        product = product or FASTEST_PRODUCT.get(jax.default_backend(), "dot")
        require(product in PRODUCTS, "product", product, f"must be in {tuple(PRODUCTS)}")
        packed = quantize == "int8" and product == "dot" and int8_product.is_available()
        form = Form(as_dtype, quantize, product, stacked=product != "dot", packed=packed)
        graph, state = nnx.split(model)

        def taken(state: nnx.State) -> DecoderWeights:
            return take_apart(nnx.merge(graph, state), form)

        cross = eyes = None
        if config.vision:
            cross = nnx.graphdef(model.cross_attention)
            eyes = tuple(
                None if part is None else nnx.graphdef(part) for part in (model.vision_encoder, model.resampler)
            )
        is_abstract = isinstance(jax.tree.leaves(state)[0], jax.ShapeDtypeStruct)
        weights = jax.eval_shape(taken, state) if is_abstract else jax.jit(taken)(state)
        return cls(weights, config, as_dtype, cross, eyes)

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads that the devices keep together: one that several of them need, each of them keeps."""
        return max(self.config.attention.num_kv_heads, self.shards.tensor)

    def init_pages(self, num_pages: int, page_size: int) -> Pages:
        """Returns empty pages for the layers that are here, keys and values of all devices."""
        shape = (num_pages, page_size, self.num_kv_heads, self.config.head_dim)
        return paging.init_pages(len(self.weights.layers), shape, self.dtype)

    def abstract_residual(self, rows: int, length: int) -> jax.ShapeDtypeStruct | None:
        """Returns the shape of what `forward` takes from the stage before, [rows, length, D]; None on the first one."""
        if self.weights.embedding_VD is not None:
            return None
        shape = (rows, length, self.config.model_dim)
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=self.shards.everywhere)

    def forward(
        self,
        weights: DecoderWeights,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        valid_BT: Bool[Array, "B T"],
        pages: Pages,
        table_BX: Int[Array, "B X"],
        *,
        x_BTD: Float[Array, "B T D"] | None = None,
        media: Media | None = None,
        replay_ids_BTLK: Int[Array, "B T L K"] | None = None,
        with_choices: bool = False,
    ) -> tuple[Float[Array, "B T D"], Pages, DecodeReport]:
        """Returns x_BTD after the final norm, the pages with the valid tokens in them, and the report.

        A pipeline stage that is not the first takes `x_BTD` from the one before; one that is not the last returns it
        without the norm. A stage's report and pages are of its own layers.

        Pure; jit it with `pages` donated. A valid token is written at its position and sees every position of its row
        up to its own, of this call or an earlier one: whoever calls has written those before. table_BX: the pages of
        each row in order, at least up to its tokens' positions, -1 for none. A token that is not valid is written and
        routed nowhere, and its x is of no meaning. `media`: the images of the rows (`look`), as each token of this call
        sees them. `replay_ids_BTLK` forces expert choices on the layers with experts (-1: none, `FREE`: the router's
        own); `with_choices` reports them.
        """
        turn = rotation(positions_BT, self.config.head_dim, self.config.attention.rope_theta)
        at = paging.places(pages, table_BX, positions_BT, valid_BT)
        step = _Step(tokens_BT, positions_BT, valid_BT, turn, table_BX, at, media, replay_ids_BTLK)
        if weights.embedding_VD is not None:
            x_BTD = self.shards.joined(weights.embedding_VD[tokens_BT], self.config.model_dim)
        keys, values, routings, crossed = [], [], [], 0
        for layer, *cache in zip(weights.layers, pages.keys, pages.values, strict=True):
            if layer.cross is not None and media is not None:
                x_BTD = self._read(layer.cross, x_BTD, media, crossed)
            crossed += layer.cross is not None
            x_BTD, written = self._attend(layer, x_BTD, tuple(cache), step)
            keys.append(written[0])
            values.append(written[1])
            x_BTD, routing = self._feed_forward(layer, x_BTD, step, self.moe_layers_before + len(routings))
            routings += [] if routing is None else [routing]
        if weights.final_norm_D is not None:
            x_BTD = self._normed(x_BTD, weights.final_norm_D).astype(self.dtype)
        return x_BTD, Pages(tuple(keys), tuple(values)), self._report(routings, tokens_BT.shape, with_choices)

    def logits(self, weights: DecoderWeights, x_BD: Float[Array, "*rows D"]) -> Float32[Array, "*rows V"]:
        """Returns float32 logits of final hidden states."""
        logits_UV = times(x_BD.reshape(-1, x_BD.shape[-1]), weights.unembedding_DV)
        logits_UV = self.shards.joined(logits_UV, self.config.vocab_size)
        return logits_UV.reshape(*x_BD.shape[:-1], -1)

    def look(
        self,
        weights: DecoderWeights,
        images: Array,
        image_valid: Array,
        image_index_BT: Int[Array, "B T"],
        first_image_BT: Int[Array, "B T"],
    ) -> Media:
        """Returns what every token sees of the images, with keys and values, all as in `Transformer.look`.

        They are of the rows: another call of `forward` for the same rows wants only other `image_index_BT` and
        `first_image_BT`.
        """
        modules = [
            None if graph is None else nnx.merge(graph, state)
            for graph, state in zip(self.eyes, weights.eyes, strict=True)
        ]
        given = (images, image_valid, image_index_BT, first_image_BT)
        media = cross_attention.look(*modules, self.config.vision.cross_attention.sees, *given)
        blocks = [nnx.merge(self.cross, layer.cross) for layer in weights.layers if layer.cross is not None]
        keys, values = zip(*(block.keys_values(media.features_BIRD) for block in blocks), strict=True)
        return dataclasses.replace(media, keys=jnp.stack(keys), values=jnp.stack(values))

    def _read(self, parameters: nnx.State, x_BTD: Array, media: Media, index: int) -> Array:
        block = nnx.merge(self.cross, parameters)
        return block(x_BTD, media, (media.keys[index], media.values[index])).astype(self.dtype)

    def _normed(self, x: Array, scale: Array) -> Array:
        return rms_normed(x, scale, self.config.norm_epsilon)

    def _attend(self, layer: LayerWeights, x_BTD: Array, cache: tuple, step: _Step) -> tuple[Array, tuple]:
        """The residual stream after attention, and the layer's keys and values with the tokens' in them."""
        rows, length, dim = x_BTD.shape
        weights = layer.attention
        normed_UD = self._normed(x_BTD, layer.attention_norm_D).reshape(-1, dim)
        q_BTNH, k_BTMH, v_BTMH = self._heads(weights, times(normed_UD, weights.in_DJ), step)
        keys, values = (paging.write(each, new, step.at) for each, new in zip(cache, (k_BTMH, v_BTMH), strict=True))
        seen = [paging.read(each, step.table_BX) for each in (keys, values)]
        y_BTNH = attend(q_BTNH, *seen, step.positions_BT, self.config.attention.query_chunk)
        heads = self.shards.heads
        y_UD = self.shards.summed(times(y_BTNH.reshape(rows * length, -1), weights.out_JD, heads), heads)
        return (x_BTD + y_UD.reshape(x_BTD.shape)).astype(self.dtype), (keys, values)

    def _heads(self, weights: AttentionWeights, qkv_UJ: Array, step: _Step) -> tuple[Array, Array, Array]:
        attention, head_dim, parts = self.config.attention, self.config.head_dim, self.shards.tensor
        heads, kv_heads = attention.num_heads // parts, self.num_kv_heads // parts
        qkv_BTJH = qkv_UJ.reshape(*step.positions_BT.shape, heads + 2 * kv_heads, head_dim)
        q_BTNH, k_BTMH, v_BTMH = jnp.split(qkv_BTJH, [heads, heads + kv_heads], axis=2)
        if attention.qk_norm:
            q_BTNH, k_BTMH = (
                self._normed(q_BTNH, weights.query_norm_H),
                self._normed(k_BTMH, weights.key_norm_H),
            )
        turned = (rotate(x, step.turn).astype(self.dtype) for x in (q_BTNH, k_BTMH))
        return *turned, v_BTMH.astype(self.dtype)

    def _feed_forward(
        self, layer: LayerWeights, x_BTD: Array, step: _Step, number: int
    ) -> tuple[Array, Routing | None]:
        """The residual stream after the feed-forward and, with experts, where the tokens went."""
        gated, hidden, weights = self.config.moe.gated, self.shards.hidden, layer.feed_forward
        normed_BTD = self._normed(x_BTD, layer.feed_forward_norm_D).astype(self.dtype)
        normed_UD = normed_BTD.reshape(-1, x_BTD.shape[-1])
        routing = None
        if isinstance(weights, FeedForwardWeights):
            y_UD = feed_forward(normed_UD, weights, gated, hidden)
        else:
            routing = self._route(weights, normed_BTD, step, number)
            y_UD = serve(weights.experts, normed_BTD, routing, self.config.moe, self.shards)
            if weights.shared is not None:
                y_UD += feed_forward(normed_UD, weights.shared, gated, hidden)
        y_UD = self.shards.summed(y_UD, hidden)
        return (x_BTD + y_UD.reshape(x_BTD.shape)).astype(self.dtype), routing

    def _route(self, weights: MoeWeights, x_BTD: Array, step: _Step, number: int) -> Routing:
        def routed(replay_ids_BTK: Array | None) -> Routing:
            tokens = RoutedTokens(step.tokens_BT, step.valid_BT, replay_ids_BTK=replay_ids_BTK)
            given = (x_BTD, weights.router_DE, weights.router_bias_E, tokens, self.config.moe)
            return route_rows(*given, training=False)

        own = routed(None)
        if step.replay_ids_BTLK is None:
            return own
        replay_BTK = step.replay_ids_BTLK[:, :, number]
        own_BTK = jnp.where(own.used_UK, own.expert_ids_UK, -1)
        return routed(jnp.where(replay_BTK == FREE, own_BTK, replay_BTK))

    def _report(self, routings: list[Routing], tokens: tuple[int, int], with_choices: bool) -> DecodeReport:
        moe = self.config.moe
        if not routings:  # a stage of dense layers
            load_LE = jnp.zeros((0, moe.num_experts), jnp.int32)
            ids = jnp.zeros((0, *tokens, moe.experts_per_token), jnp.int32)
            return DecodeReport(load_LE, Choices(ids, ids.astype(jnp.float32)) if with_choices else None)
        load_LE = jnp.stack([jnp.sum(routing.stats.load_E, axis=0) for routing in routings])
        if not with_choices:
            return DecodeReport(load_LE)
        ids = jnp.stack([jnp.where(routing.used_UK, routing.expert_ids_UK, -1) for routing in routings])
        return DecodeReport(load_LE, Choices(ids, jnp.stack([routing.gates_UK for routing in routings])))
