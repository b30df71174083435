"""From a text model's checkpoint to a model that reads images: the text model stays, the adapter begins fresh."""

import contextlib
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from gpt4moe.config.check import CallerError
from gpt4moe.config.variants import variant
from gpt4moe.config.vision import CrossAttentionConfig, EncoderConfig, ResamplerConfig, VisionConfig
from gpt4moe.infer import trained
from gpt4moe.train import adapter, beginning, evaluate, loop, step, trainable
from tests.train import tiny
from tests.train.test_trainable import by_name, keep_gradients, names_of_state

DECODER = ("*", "!vision_encoder.*", "!resampler.*", "!cross_attention.*")
GATES = {"cross_attention.attention_gate", "cross_attention.feed_forward_gate"}
MODEL = dataclasses.replace(tiny.MODEL, num_layers=1)
VISION = VisionConfig(
    EncoderConfig(height=8, width=8, patch_size=4, dim=8, num_layers=1, num_heads=2, hidden_dim=16),
    CrossAttentionConfig(every=1, num_heads=2, head_dim=8, hidden_dim=24),
    ResamplerConfig(num_latents=3, num_layers=1, num_heads=2, hidden_dim=16),
)
BARE = dataclasses.replace(VISION, resampler=None)
ROWS = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    tiny.write_corpus(directory)
    return directory


def run_of(corpus, model=MODEL, optimizer=None, **train):
    train = {"steps": 2, "checkpoint_every": 2, "batch_tokens": ROWS * tiny.LENGTH} | train
    run = tiny.run_config(corpus, model=model, **train)
    return dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, **optimizer or {}))


def seeing(model=MODEL, vision=VISION):
    return dataclasses.replace(model, vision=vision)


@pytest.fixture(scope="module")
def text(corpus, tmp_path_factory):
    """(run, work directory, held-out results) of a text model."""
    run, workdir = run_of(corpus), tmp_path_factory.mktemp("text") / "run"
    return run, workdir, loop.train(run, workdir, config_text="", show_progress=False).evaluation


@pytest.fixture(scope="module")
def images(corpus, text, tmp_path_factory):
    """(run, work directory, what was said) of a model that learned to read images upon the text model."""
    workdir, said = tmp_path_factory.mktemp("images") / "run", io.StringIO()
    run = run_of(corpus, seeing(vision=BARE), init_from=str(text[1]))
    with contextlib.redirect_stderr(said):
        loop.train(run, workdir, config_text="")
    return run, workdir, said.getvalue()


def begin(run, workdir):
    return beginning.begin(run, epath.Path(workdir), "", allow_change=False, progress=None)


def microbatches(seed):
    """One microbatch of rows whose second half sees one image each."""
    batch, draw = tiny.random_batch(ROWS, seed=seed), np.random.default_rng(seed)
    index_BT = np.where(batch.positions >= 4, 0, -1).astype(np.int32)
    images = draw.integers(0, 256, (ROWS, 1, 8, 8, 3)).astype(np.uint8)
    of_images = {"images": images, "image_valid": np.ones((ROWS, 1), bool)}
    batch = dataclasses.replace(batch, **of_images, image_index=index_BT, first_image=index_BT)
    return jax.tree.map(lambda leaf: leaf[None], batch)


def take(start, steps):
    """State and metrics after so many steps on rows with images, past the warm-up."""
    train_step, at = step.make_step(start.run, 2, start.abstract), beginning.first_position(start).state
    for seed in range(steps):
        at, metrics = train_step(at, microbatches(seed), jnp.int32(1), jnp.float32(1000))
    return jax.device_get((at, metrics))


def test_the_decoder_stays_bit_for_bit_and_the_adapter_learns(corpus, text, tmp_path):
    text_run, source, held_out = text
    before = by_name(jax.device_get(nnx.split(trained.restore(text_run, source).model)[1]))
    start = begin(run_of(corpus, seeing(), {"frozen": DECODER}, init_from=str(source)), tmp_path)
    fresh = by_name(jax.device_get(beginning.first_position(start).state.params))
    at, metrics = take(start, 3)
    after = by_name(at.params)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert names_of_state(at.opt_state) == after.keys() - before.keys()
    assert {name.partition(".")[0] for name in names_of_state(at.opt_state)} == set(adapter.PARTS) - {"spelling"}
    assert all((after[name] != fresh[name]).any() for name in GATES)
    assert int(metrics.skipped_steps) == 0 and metrics.grad_norm > 0 and not metrics.expert_grad_norm_LE.any()
    assert evaluate.evaluate(start.run, start.store, jax.device_put(at.params)).sets == held_out.sets


def test_a_gate_that_is_a_vector_is_measured_by_its_mean_magnitude(corpus, tmp_path):
    vision = dataclasses.replace(BARE, cross_attention=dataclasses.replace(BARE.cross_attention, gate="vector"))
    run = run_of(corpus, seeing(tiny.MODEL, vision), {"learning_rate": 0.3})  # so that tanh bends
    at, metrics = take(begin(run, tmp_path), 2)
    block = at.params["cross_attention"]
    for measured_L, gate in zip(metrics.gates_2L, (block["attention_gate"], block["feed_forward_gate"]), strict=True):
        assert (np.sign(gate[...]) < 0).any() and (np.sign(gate[...]) > 0).any()
        np.testing.assert_allclose(measured_L, np.abs(np.tanh(gate[...])).mean(1), rtol=1e-5)


def test_at_first_only_the_gates_have_a_gradient(corpus, text, tmp_path):
    settings = {"frozen": DECODER, "build": keep_gradients}
    at, _ = take(begin(run_of(corpus, seeing(), settings, init_from=str(text[1])), tmp_path), 1)
    gradients = by_name(at.opt_state[1][0].trace)
    assert {name for name, gradient in gradients.items() if gradient.any()} == GATES


def test_it_is_said_which_parts_are_fresh_and_training_goes_on_from_them(corpus, text, images, tmp_path):
    run, source, said = images
    fresh = f"parameters are those of step 2 of {text[1]}; fresh are vision_encoder and cross_attention\n"
    assert fresh in said
    again = dataclasses.replace(run, model=seeing(), train=dataclasses.replace(run.train, init_from=str(source)))
    start = begin(again, tmp_path / "resampled")
    assert adapter.new_parts(source, 2, start.abstract.params) == ("resampler",)
    got = by_name(beginning.first_position(start).state.params)
    want = by_name(nnx.split(trained.restore(run, source).model)[1])
    assert {name.partition(".")[0] for name in got.keys() - want.keys()} == {"resampler"}
    assert all(np.array_equal(got[name], value) for name, value in want.items())
    with pytest.raises(CallerError, match=r"has vision_encoder and cross_attention, which this model lacks; give the"):
        begin(run_of(corpus, init_from=str(source)), tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_an_encoder_of_images_goes_on_with_pages_in_tiles(corpus, images, tmp_path):
    run, source, _ = images
    tiles = dataclasses.replace(BARE, encoder=dataclasses.replace(BARE.encoder, max_frames=3))
    paged = run_of(corpus, seeing(vision=tiles), init_from=str(source))
    start = begin(paged, tmp_path / "pages")
    assert adapter.new_parts(source, 2, start.abstract.params) == ("vision_encoder.frames",)
    got = by_name(beginning.first_position(start).state.params)
    want = by_name(nnx.split(trained.restore(run, source).model)[1])
    assert got.keys() - want.keys() == {"vision_encoder.frames"} and got["vision_encoder.frames"].any()
    assert all(np.array_equal(got[name], value) for name, value in want.items())
    loop.train(
        dataclasses.replace(paged, train=dataclasses.replace(paged.train, steps=1)), tmp_path / "pages", config_text=""
    )
    with pytest.raises(CallerError, match=r"has vision_encoder\.frames, which this model lacks"):
        begin(run_of(corpus, seeing(vision=BARE), init_from=str(tmp_path / "pages")), tmp_path / "back")


def test_any_other_difference_is_refused_as_ever(corpus, text, tmp_path):
    model = dataclasses.replace(seeing(), tie_embeddings=False)
    with pytest.raises(
        CallerError, match=f"^INIT_FROM='{text[1]}' is of another model: params.head is missing; use the"
    ):
        begin(run_of(corpus, model, init_from=str(text[1])), tmp_path / "headed")


def test_experts_of_a_dense_model_and_an_adapter_at_once(corpus, tmp_path):
    dense = dataclasses.replace(MODEL, moe=variant(MODEL.moe, compare="dense_active"))
    run = run_of(corpus, dense)
    loop.train(run, tmp_path / "dense", config_text="", show_progress=False)
    start = begin(run_of(corpus, seeing(vision=BARE), init_from=str(tmp_path / "dense")), tmp_path / "seeing")
    params = beginning.first_position(start).state.params
    assert trainable.names(params) == trainable.names(start.abstract.params)
    want = nnx.split(trained.restore(run, tmp_path / "dense").model)[1]
    np.testing.assert_array_equal(params["embedding"][...], want["embedding"][...])
