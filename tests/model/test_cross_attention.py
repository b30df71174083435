"""The vision adapter in the model: which tokens see which images, gates, caches, packed rows, groups of layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.accounting import parameters, vision
from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.vision import CrossAttentionConfig, EncoderConfig, ResamplerConfig, SpellingConfig, VisionConfig
from gpt4moe.model.cross_attention import Media
from gpt4moe.model.transformer import Transformer
from tests.model.slow import relative_difference

ENCODER = EncoderConfig(height=8, width=12, patch_size=4, dim=8, num_layers=1, num_heads=2, hidden_dim=16)
CROSS = CrossAttentionConfig(every=1, num_heads=2, head_dim=8, hidden_dim=24)
TINY = ModelConfig(
    num_layers=2,
    model_dim=16,
    vocab_size=24,
    context_length=16,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    moe=MoeConfig(num_experts=4, experts_per_token=2, hidden_dim=8),
    compute_dtype="float32",
    vision=VisionConfig(ENCODER, CROSS),
)
RESAMPLER = ResamplerConfig(num_latents=3, num_layers=1, num_heads=2, hidden_dim=16)
DEEP = dataclasses.replace(TINY, num_layers=12, moe_every=2, dense_hidden_dim=10, vision=None)
VARIANTS = {
    "before every layer": TINY,
    "before every second": dataclasses.replace(
        TINY, num_layers=4, vision=VisionConfig(ENCODER, dataclasses.replace(CROSS, every=2))
    ),
    "offset": dataclasses.replace(
        TINY, num_layers=4, vision=VisionConfig(ENCODER, dataclasses.replace(CROSS, every=2, offset=1))
    ),
    "leading and dense": dataclasses.replace(
        DEEP,
        num_layers=9,
        leading_dense_layers=1,
        vision=VisionConfig(ENCODER, dataclasses.replace(CROSS, every=4, offset=2)),
    ),
    "resampler": dataclasses.replace(TINY, vision=VisionConfig(ENCODER, CROSS, RESAMPLER)),
    "grouped heads": dataclasses.replace(
        TINY, vision=VisionConfig(ENCODER, dataclasses.replace(CROSS, num_heads=4, num_kv_heads=2))
    ),
    "frames": dataclasses.replace(TINY, vision=VisionConfig(dataclasses.replace(ENCODER, max_frames=3), CROSS)),
    "spelling": dataclasses.replace(TINY, vision=VisionConfig(ENCODER, CROSS, spelling=SpellingConfig(num_ids=11))),
    "recomputed": dataclasses.replace(TINY, remat="full"),
    "layer norms, vector gates": dataclasses.replace(
        TINY,
        vision=VisionConfig(
            ENCODER, dataclasses.replace(CROSS, norm="layer", gate="vector", activation="gelu", qk_norm=False)
        ),
    ),
    "in a loop": dataclasses.replace(TINY, num_layers=10),
}
# Two images; the second row's first image is followed by a second document, which has its own.
INDEX = np.array([[-1, -1, 0, 0, 0, 1, 1, 1], [0, 0, 0, -1, -1, 1, 1, 1]], np.int32)
FIRST = np.array([[-1, -1, 0, 0, 0, 0, 0, 0], [0, 0, 0, -1, -1, 1, 1, 1]], np.int32)
SEGMENTS = np.array([[1] * 8, [1] * 3 + [2] * 5], np.int32)
POSITIONS = np.array([range(8), [*range(3), *range(5)]], np.int32)


@functools.cache
def _model(config, open_gates=True):
    """Made operation by operation: shapes recur, and a program for all draws of each model compiles long."""
    if not open_gates or not config.vision:
        return Transformer(config, rngs=nnx.Rngs(0))
    model = nnx.clone(_model(config, open_gates=False))
    for gate in (model.cross_attention.attention_gate, model.cross_attention.feed_forward_gate):
        gate[...] = jnp.full_like(gate[...], 0.7)
    return model


def _batch(seed=0):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, TINY.vocab_size, INDEX.shape).astype(np.int32)
    images = random.integers(0, 256, (2, 2, 8, 12, 3)).astype(np.uint8)
    return tokens, images, np.ones((2, 2), bool)


@nnx.jit
def _forward(model, tokens, images, valid, index=INDEX, first=FIRST, positions=POSITIONS, segments=SEGMENTS):
    media = model.look(images, valid, index, first)
    return model(tokens, positions, segments, dropless=True, media=media)[0]


@nnx.jit
def _text(model, tokens, positions=POSITIONS, segments=SEGMENTS):
    return model(tokens, positions, segments, dropless=True)[0]


def _objective(model, tokens, images, valid):
    """Weights at random: the squares of what comes out of a norm always sum to the same."""
    weights = np.random.default_rng(2).normal(size=(*INDEX.shape, TINY.model_dim))
    return jnp.sum(_forward(model, tokens, images, valid) * weights)


def _touched(before, after):
    """Which tokens, [B, T], changed by more than rounding."""
    return np.asarray(jnp.max(jnp.abs(before - after), axis=-1) > 1e-3)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_with_gates_at_zero_the_model_is_the_text_model(config):
    tokens, images, valid = _batch()
    text = _model(dataclasses.replace(config, vision=None))
    closed = _forward(_model(config, open_gates=False), tokens, images, valid)
    assert relative_difference(closed, _text(text, tokens)) < 1e-6  # compiled, additions are fused in other ways
    assert relative_difference(_forward(_model(config), tokens, images, valid), _text(text, tokens)) > 1e-2


def test_with_gates_at_zero_it_is_the_text_model_bit_for_bit_operation_by_operation():
    tokens, images, valid = _batch()
    config = dataclasses.replace(TINY, num_layers=1, moe=MoeConfig(1, 1, 8))
    seeing, text = _model(config, open_gates=False), _model(dataclasses.replace(config, vision=None))
    with jax.disable_jit():
        media = seeing.look(images, valid, INDEX, FIRST)
        closed = seeing(tokens, POSITIONS, SEGMENTS, dropless=True, media=media)[0]
        assert np.array_equal(closed, text(tokens, POSITIONS, SEGMENTS, dropless=True)[0])


def test_a_model_that_could_see_is_the_text_model_where_no_images_come():
    tokens, _, _ = _batch()
    assert np.array_equal(_text(_model(TINY), tokens), _text(_model(dataclasses.replace(TINY, vision=None)), tokens))


def test_which_tokens_see_which_image_told_as_a_story():
    """A document begins with two words, shows a picture, speaks of it, shows another and speaks on."""
    _, images, valid = _batch()
    words = jnp.array(np.random.default_rng(1).normal(size=(2, 8, 16)), jnp.float32)

    def told(sees="latest", **given):
        """What a block of cross-attention makes of the words."""
        model = _model(dataclasses.replace(TINY, vision=VisionConfig(ENCODER, dataclasses.replace(CROSS, sees=sees))))
        graph, parameters = nnx.split(model.cross_attention)
        first_block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], parameters))
        seen = {"images": images, "image_valid": valid, "image_index_BT": INDEX, "first_image_BT": FIRST} | given
        return first_block(words, model.look(*seen.values()))

    other_first, other_second = images.copy(), images.copy()
    other_first[:, 0], other_second[:, 1] = 255 - images[:, 0], 255 - images[:, 1]
    # The words before the first picture stay what they were; those after it do not.
    assert np.array_equal(_touched(words, told())[0], [False] * 2 + [True] * 6)
    assert np.array_equal(told()[0, :2], words[0, :2])
    # Another first picture changes what is said until the second is shown, but no word after it.
    assert np.array_equal(_touched(told(), told(images=other_first))[0], [False] * 2 + [True] * 3 + [False] * 3)
    # Another second picture changes what is said from then on, and nothing said before.
    assert np.array_equal(_touched(told(), told(images=other_second))[0], [False] * 5 + [True] * 3)
    # In the second row a document ends after its picture; the next begins without one, whatever its neighbour showed.
    assert np.array_equal(_touched(words, told())[1], [True] * 3 + [False] * 2 + [True] * 3)
    assert np.array_equal(_touched(told(), told(images=other_first))[1], [True] * 3 + [False] * 5)
    # Where all pictures of a document are seen, the words after the second change with the first too.
    assert np.array_equal(_touched(told("all"), told("all", images=other_first))[0], [False] * 2 + [True] * 6)
    assert np.array_equal(_touched(told("all"), told("all", images=other_first))[1], [True] * 3 + [False] * 5)
    # A word whose picture is missing sees nothing.
    missing = told(image_valid=valid & np.array([True, False]))
    assert np.array_equal(_touched(words, missing), [[False] * 2 + [True] * 3 + [False] * 3, [True] * 3 + [False] * 5])


def test_a_later_image_never_changes_an_earlier_token_in_any_depth():
    tokens, images, valid = _batch()
    model = _model(dataclasses.replace(TINY, num_layers=4))
    other = images.copy()
    other[0, 1] = 0
    changed = _touched(*(_forward(model, tokens, these, valid) for these in (images, other)))
    assert not changed[0, :5].any() and changed[0, 5:].all() and not changed[1].any()


def test_an_image_that_is_not_there_has_no_effect():
    tokens, images, valid = _batch()
    config = dataclasses.replace(TINY, vision=VisionConfig(ENCODER, dataclasses.replace(CROSS, sees="all")))
    valid[:, 1] = False
    other = images.copy()
    other[:, 1] = 0
    one, two = (_forward(_model(config), tokens, these, valid) for these in (images, other))
    assert np.array_equal(one, two) and np.isfinite(one).all()


def test_without_an_image_the_feed_forward_is_left_out_unless_it_is_wished():
    tokens, images, valid = _batch()
    wished = dataclasses.replace(CROSS, feed_forward_without_image=True)
    text = _text(_model(dataclasses.replace(TINY, vision=None)), tokens)
    nothing = np.full_like(INDEX, -1)
    left, applied = (
        _forward(_model(dataclasses.replace(TINY, vision=VisionConfig(ENCODER, cross))), tokens, images, valid, nothing)
        for cross in (CROSS, wished)
    )
    assert relative_difference(left, text) < 1e-6 and relative_difference(applied, text) > 1e-2


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_packed_row_is_its_documents_in_rows_of_their_own(config):
    tokens, images, valid = _batch()
    packed = _forward(_model(config), tokens, images, valid)[1]

    def rows(x, padding):
        """The two documents of the second row, each at the beginning of a row."""
        return np.stack([np.pad(x[1, at], (0, 8 - at.stop + at.start), constant_values=padding) for at in documents])

    documents, segments = (slice(0, 3), slice(3, 8)), np.ones_like(SEGMENTS)
    of_images = (np.stack([x[1], x[1]]) for x in (images, valid))
    of_rows = (rows(INDEX, -1), rows(FIRST, -1), rows(POSITIONS, 0), rows(segments, 0))
    alone = _forward(_model(config), rows(tokens, 0), *of_images, *of_rows)
    assert relative_difference(packed, jnp.concatenate([alone[0, :3], alone[1, :5]])) < 1e-5


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_prefill_and_decode_equal_the_whole(config):
    model, whole = _model(config), _forward(_model(config), *_batch())[:1]
    tokens, images, valid = (x[:1] for x in _batch())
    media = nnx.jit(lambda model: model.keep(model.look(images, valid, INDEX[:1], FIRST[:1])))(model)
    assert media.keys.shape[:2] == (config.num_cross_attention_layers, 1)

    @nnx.jit
    def step(model, cache, media, tokens, positions):
        x, out = model(tokens, positions, jnp.ones_like(tokens), dropless=True, cache=cache, media=media)
        return x, out.cache

    def see(media: Media, at: slice) -> Media:
        """Once kept, features are not looked at again."""
        seen = media.image_index_BT[:, at], media.first_image_BT[:, at]
        return dataclasses.replace(media, image_index_BT=seen[0], first_image_BT=seen[1])

    cache, parts = model.init_cache(1, 8), []
    for at in (slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 7), slice(7, 8)):
        blind = dataclasses.replace(see(media, at), features_BIRD=jnp.full_like(media.features_BIRD, jnp.nan))
        x, cache = step(model, cache, blind, tokens[:, at], POSITIONS[:1, at])
        parts.append(x)
    assert relative_difference(jnp.concatenate(parts, axis=1), whole) < 1e-5


@pytest.mark.parametrize("name", ["before every second", "resampler", "in a loop"])
def test_in_the_first_step_only_the_gates_of_what_is_new_are_moved(name):
    tokens, images, valid = _batch()

    @nnx.jit
    def gradients(model):
        return nnx.grad(_objective)(model, tokens, images, valid)

    def moved(open_gates: bool) -> set[str]:
        flat = nnx.to_flat_state(gradients(_model(VARIANTS[name], open_gates)))
        new = ("cross_attention", "vision_encoder", "resampler")
        return {".".join(map(str, path)) for path, leaf in flat if path[0] in new and np.any(leaf[...] != 0)}

    gates = {"cross_attention.attention_gate", "cross_attention.feed_forward_gate"}
    assert moved(open_gates=False) == gates
    rest = moved(open_gates=True) - gates
    assert {name.split(".")[0] for name in rest} == {"cross_attention", "vision_encoder"} | (
        {"resampler"} if name == "resampler" else set()
    )


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_is_counted(config):
    shapes = nnx.to_flat_state(nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[1])
    counted = parameters.count(config)
    sizes = {}
    for path, leaf in shapes:
        sizes[path[0]] = sizes.get(path[0], 0) + leaf.get_value().size
    assert sum(sizes.values()) == counted.total
    for part in ("vision_encoder", "resampler", "cross_attention", "spelling"):
        assert sizes.get(part, 0) == getattr(counted, part)


@pytest.mark.parametrize(
    ("name", "frames"),
    [("before every layer", 1), ("resampler", 1), ("layer norms, vector gates", 1), ("frames", 3)],
)
def test_the_flops_of_an_image_are_those_of_the_compiled_program(name, frames):
    config = VARIANTS[name]
    image = np.zeros((1, 1, frames, 8, 12, 3), np.float32)

    @jax.jit
    def see(model):
        nothing = np.zeros((1, 1), np.int32)
        return model.keep(model.look(image, np.ones((1, 1, frames), bool), nothing, nothing))

    compiled = see.lower(_model(config)).compile().cost_analysis()["flops"]
    # Norms, softmax and activations come on top of the matrix products.
    assert vision.flops_per_image(config, frames) <= compiled < 1.35 * vision.flops_per_image(config, frames)


def test_recomputing_and_pieces_of_queries_change_no_gradient():
    tokens, images, valid = _batch()

    def gradients(config):
        found = nnx.jit(nnx.grad(_objective))(_model(config), tokens, images, valid)
        return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(found)}

    pieces = dataclasses.replace(TINY, remat="full", attention=dataclasses.replace(TINY.attention, query_chunk=3))
    plain, recomputed = gradients(TINY), gradients(pieces)
    # What is added to every key alike moves no weight of a softmax: its gradient is rounding and nothing else.
    for path in plain.keys() - {"vision_encoder.blocks.key.bias"}:
        assert np.linalg.norm(plain[path]) > 1e-3, path
        assert relative_difference(recomputed[path], plain[path]) < 1e-5, path


def test_a_clip_of_frames_is_one_image():
    tokens, images, _ = _batch()
    clips, valid = np.stack([images, 255 - images], axis=2), np.ones((2, 2, 2), bool)
    parts = VisionConfig(ENCODER, CROSS)
    by_encoder = dataclasses.replace(parts, encoder=dataclasses.replace(ENCODER, max_frames=2))
    by_resampler = dataclasses.replace(parts, resampler=dataclasses.replace(RESAMPLER, max_frames=2))
    for vision_config in (parts, by_encoder, by_resampler):
        config = dataclasses.replace(TINY, vision=vision_config)
        both = _forward(_model(config), tokens, clips, valid)
        swapped = _forward(_model(config), tokens, clips[:, :, ::-1], valid)
        first_only = _forward(_model(config), tokens, clips, valid & np.array([True, False]))
        assert relative_difference(both, first_only) > 1e-3
        # Only embeddings of frames tell their order.
        assert (relative_difference(both, swapped) > 1e-3) == (vision_config is not parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_layers": 3, "vision": VisionConfig(ENCODER, dataclasses.replace(CROSS, every=2))},
            "CrossAttentionConfig.every=2 must divide the layers",
        ),
        ({"moe_every": 2, "dense_hidden_dim": 4}, "CrossAttentionConfig.every=1 must be a multiple of moe_every"),
        ({"vision": "yes"}, "vision='yes' must be a VisionConfig or None"),
    ],
)
def test_layers_that_cross_attention_does_not_divide_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def _blocks(model):
    """The blocks of cross-attention one by one."""
    graph, stacked = nnx.split(model.cross_attention)
    count = len(model.cross_attention.attention_gate[...])
    return [nnx.merge(graph, jax.tree.map(lambda leaf, at=at: leaf[at], stacked)) for at in range(count)]


@nnx.jit
def _weights(model, tokens, images, valid):
    media = model.look(images, valid, INDEX, FIRST)
    x_BTD, out = model(tokens, POSITIONS, SEGMENTS, dropless=True, media=media, with_cross_weights=True)
    return x_BTD, out.cross_weights_LBTNS, media


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_weights_sum_to_one_over_what_is_seen_and_make_what_is_read(config):
    model, batch = _model(config), _batch()
    x_BTD, weights_LBTNS, media = _weights(model, *batch)
    np.testing.assert_allclose(x_BTD, _forward(model, *batch), atol=1e-5)
    visible_BTS = np.asarray(media.visible_BTS())
    assert not np.asarray(weights_LBTNS)[np.broadcast_to(~visible_BTS[:, :, None], weights_LBTNS.shape)].any()
    sums = np.broadcast_to(visible_BTS.any(-1)[..., None], weights_LBTNS.shape[:-1])
    np.testing.assert_allclose(jnp.sum(weights_LBTNS, -1), sums, atol=1e-5)
    x_BTD = jax.random.normal(jax.random.key(3), x_BTD.shape)
    for block in _blocks(model):
        block.feed_forward_gate[...] = jnp.zeros_like(block.feed_forward_gate[...])
        _, values_BSMH = block.keys_values(media.features_BIRD)
        values_BSNH = jnp.repeat(values_BSMH, config.vision.cross_attention.num_heads // values_BSMH.shape[2], axis=2)
        read_BTNH = jnp.einsum("BTNS,BSNH->BTNH", block.weights(x_BTD, media), values_BSNH)
        made_BTD = jnp.tanh(block.attention_gate[...]) * jnp.einsum("BTNH,NHD->BTD", read_BTNH, block.output[...])
        assert relative_difference(block(x_BTD, media) - x_BTD, made_BTD) < 1e-5


def test_every_head_looks_at_the_patch_that_its_query_asks_for():
    """Features are one-hot and keys are they; every token asks for patch 4 by the first head, patch 1 by the second."""
    vision = VisionConfig(ENCODER, dataclasses.replace(CROSS, qk_norm=False))
    block = _blocks(_model(dataclasses.replace(TINY, vision=vision)))[0]
    features = jnp.eye(6, 8)[None, None]
    index = jnp.zeros((1, 3), jnp.int32)
    block.key[...] = 20 * jnp.broadcast_to(jnp.eye(8)[:, None], block.key.shape)
    block.query[...] = jnp.broadcast_to(jnp.eye(8)[jnp.array([4, 1])], block.query.shape)
    weights_BTNS = block.weights(jnp.ones((1, 3, 16)), Media(features, jnp.ones((1, 1, 6), bool), index, index))
    wanted = np.broadcast_to(np.eye(6)[[4, 1]], (1, 3, 2, 6))
    np.testing.assert_allclose(weights_BTNS, wanted, atol=1e-6)


def test_the_weights_of_a_block_are_those_at_its_place_among_the_layers():
    """Cross-attention before layers 1 and 3: its weights change with what comes before a block only."""
    model, batch = _model(VARIANTS["offset"]), _batch()
    before = _weights(model, *batch)[1]
    graph, params = nnx.split(model)
    for layer in range(4):
        changed = jax.tree.map(lambda leaf: leaf, params)
        output = changed["blocks"]["attention"]["output"]
        output[...] = output[...].at[layer].multiply(-3.0)
        after = _weights(nnx.merge(graph, changed), *batch)[1]
        moved = [bool(np.abs(before[block] - after[block]).max() > 1e-4) for block in range(2)]
        assert moved == [layer < 1, layer < 3]
    gate = params["cross_attention"]["attention_gate"]
    gate[...] = gate[...].at[0].set(-2.0)  # of the first block: its own weights are those before it has added anything
    after = _weights(nnx.merge(graph, params), *batch)[1]
    assert [bool(np.abs(before[block] - after[block]).max() > 1e-4) for block in range(2)] == [False, True]
